"""Checkpoints written block by block, put together at the end, published by one rename.

    .<output>.partial/            beside the output, so that a rename is enough
        blocks/<name>.safetensors what ShardWriter.write leaves; survives a kill
        checkpoint/               what finish() makes of them (hard links): the future output
        rank-<n>/                 of a run in several processes: what the others need while they work

Nothing appears under the output's own name before `publish`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmcomp import native
from llmcomp.digests import file_sha256
from llmcomp.errors import OutputExists, RunError, UserError

CHECKPOINT = "checkpoint"
INDEX = "model.safetensors.index.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Shard:
    """One written file. `sha256`: of its bytes."""

    name: str
    nbytes: int
    sha256: str


class ShardWriter:
    """Writes the shards of one checkpoint; holds no tensors between calls.

    Args:
        partial: the partial directory (`partial_of`); made if absent.

    Raises:
        UserError: the directory cannot be written to.
        RunError: the disk is full.
    """

    def __init__(self, partial: Path) -> None:
        self.partial = partial
        self._blocks = partial / "blocks"
        with writing(self._blocks):
            self._blocks.mkdir(parents=True, exist_ok=True)
            for stray in self._blocks.glob(".tmp*"):  # safetensors' own temporary files, after a kill
                stray.unlink()

    @property
    def checkpoint(self) -> Path:
        """Where `finish` puts the checkpoint together."""
        return self.partial / CHECKPOINT

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> Shard:
        """Write one shard, such as 'block-00003', whole or not at all; an older one of that name is replaced.
        Tensors may lie on any device.

        Raises:
            UserError: the directory cannot be written to.
            RunError: the disk is full.
        """
        path = self.path(name)
        temporary = path.with_suffix(".tmp")
        contiguous = _apart(tensors)
        try:
            with writing(path):
                temporary.touch()
                mode = temporary.stat().st_mode  # safetensors renames a file of mode 0600 over it
                save_file(contiguous, temporary, metadata={"format": "pt"})
                temporary.chmod(mode)
                _sync(temporary)
                temporary.replace(path)
                _sync(self._blocks)
        finally:
            temporary.unlink(missing_ok=True)
        return Shard(name, path.stat().st_size, file_sha256(path))

    def adopt(self, save: Callable[[Path], None]) -> list[str]:
        """Let a library write all shards itself, into an empty directory; their names, first to last.

        Raises:
            UserError: the directory cannot be written to.
            RunError: the disk is full, or nothing was written.
        """
        with writing(self._blocks):
            shutil.rmtree(self._blocks)
            self._blocks.mkdir()
            save(self._blocks)
            mode = self.partial.stat().st_mode & 0o666  # safetensors makes files of mode 0600
            for name in self.shards():
                self.path(name).chmod(mode)
                _sync(self.path(name))
        if not self.shards():
            raise RunError(f"No weights were written to {self._blocks}.")
        return self.shards()

    def shards(self) -> list[str]:
        """Names of the shards that are there, sorted."""
        return sorted(path.stem for path in self._blocks.glob("*.safetensors"))

    def holds(self, shard: Shard) -> bool:
        """Whether the file of `shard` is there, with the bytes that it was written with."""
        path = self.path(shard.name)
        return path.is_file() and path.stat().st_size == shard.nbytes and file_sha256(path) == shard.sha256

    def finish(
        self,
        order: Sequence[str],
        config: Mapping[str, Any],
        files: Sequence[Path] = (),
        extra: Mapping[str, str | bytes] | None = None,
        root: Path | None = None,
    ) -> Path:
        """Put the checkpoint together; may be called again after a kill.

        Args:
            order: the shards that belong to the model, first to last; others are left out.
            config: content of config.json (`checkpoint_config`).
            files: tokenizer files, generation config and the like, copied under their own names; of a folder
                only the folder.
            extra: further files by name.
            root: directory of `files`, below which their folders are kept; without it they lie at the top.

        Returns:
            The directory of the checkpoint.

        Raises:
            RunError: a shard is missing, a tensor stands in two shards, or the disk is full.
        """
        target = self.checkpoint
        with writing(target):
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            index: dict[str, str] = {}
            total = 0
            for number, name in enumerate(order, 1):
                file = "model.safetensors"
                if len(order) > 1:
                    file = f"model-{number:05d}-of-{len(order):05d}.safetensors"
                path = self.path(name)
                if not path.is_file():
                    raise RunError(f"Shard {name} is missing in {self._blocks}; run the same command again.")
                total += _enter(path, file, index)
                _link(path, target / file)
            if len(order) > 1:
                table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
                _write_text(target / INDEX, json.dumps(table, indent=2) + "\n")
            for source in files:
                copy = target / (source.name if root is None else source.relative_to(root))
                folder = copy if source.is_dir() else copy.parent
                folder.mkdir(parents=True, exist_ok=True)
                if folder is not copy:
                    shutil.copyfile(source, copy)
            _write_text(target / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
            for file, content in (extra or {}).items():
                _write_text(target / file, content)
            _sync(target)
        return target

    def path(self, name: str) -> Path:
        """The file of a shard."""
        return self._blocks / f"{name}.safetensors"


def checkpoint_config(
    source: Mapping[str, Any],
    architecture: str,
    dtype: str,
    quantization: Mapping[str, Any] | None,
    untied: bool = False,
) -> dict[str, Any]:
    """config.json of the compressed checkpoint: the source's own fields with what changed.

    Args:
        source: the source's config.json (or `config.to_dict()`).
        architecture: class name of the model.
        dtype: of the dense weights, such as 'bfloat16'.
        quantization: `Layout.config`.
        untied: a tie broke (`formats.broken_ties`), so transformers must not tie again.
    """
    dropped = ("quantization_config", "torch_dtype")
    config = {key: value for key, value in source.items() if key not in dropped}
    config["architectures"] = [architecture]
    config["dtype"] = dtype
    if untied:
        config["tie_word_embeddings"] = False
    if quantization is None:
        return config
    if quantization["quant_method"] == native.METHOD:
        return native.wrap(config, quantization)
    return {**config, "quantization_config": dict(quantization)}


def partial_of(output: Path) -> Path:
    """Where the work for `output` lies until it is published: its sibling `.<name>.partial`."""
    output = _absolute(output)
    return output.with_name(f".{output.name}.partial")


def output_of(partial: Path) -> Path:
    """The output that a partial directory is for."""
    return partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))


def scratch_of(partial: Path, rank: int) -> Path:
    """Where a rank that keeps nothing works meanwhile, on its own host."""
    return partial / f"rank-{rank}"


def clear_scratch(scratch: Path) -> None:
    """Remove `scratch_of`, and on a host without the partial directory itself what was made to hold it."""
    shutil.rmtree(scratch, ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty: it is the first rank's
        scratch.parent.rmdir()


def preflight(source: Path, output: Path, overwrite: bool, nbytes: int) -> None:
    """Refuse before any work what `publish` would refuse after it, and what would replace the source.

    Args:
        source: the directory that is read. output: the directory to be made.
        overwrite: whether an existing checkpoint there may be replaced.
        nbytes: of the checkpoint, with its partial directory.

    Raises:
        OutputExists: something is there and may not be overwritten, or it holds the source.
        UserError: its parent cannot be written to, or the disk has too little room.
    """
    output = _absolute(output)
    read, made = source.resolve(), output.resolve()
    if overwrite and (made == read or made in read.parents):
        raise OutputExists(f"{output} holds what is read, so --overwrite leaves it; choose another --output.")
    _check_free(output, overwrite)
    parent = output.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{parent} cannot be written to; choose another output than {output}.")
    require_room(parent, nbytes, str(output))


def require_room(folder: Path, nbytes: int, what: str) -> None:
    """Refuse to write `what`, of `nbytes` bytes, where the disk of `folder` has no room for it.

    Raises:
        UserError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        need, have = nbytes / 1e9, free / 1e9
        raise UserError(
            f"{what} needs {need:.2f} GB, but its disk has {have:.2f} GB free; make room or choose another output."
        )


def publish(partial: Path, output: Path, overwrite: bool = False) -> None:
    """Make the finished checkpoint appear as `output` by renaming it, then remove the partial directory.

    Killed at any moment, either the old or the new directory is whole: an old one is moved aside to
    `.<name>.replaced` and deleted only when the new one stands.

    Raises:
        OutputExists: something is there and may not be overwritten.
        UserError, RunError: the directory cannot be written to.
    """
    output = _absolute(output)
    aside = output.with_name(f".{output.name}.replaced")
    _check_free(output, overwrite)
    with writing(output):
        if output.exists():
            shutil.rmtree(aside, ignore_errors=True)
            output.rename(aside)
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            (partial / CHECKPOINT).rename(output)
        except OSError:
            if aside.exists():
                aside.rename(output)
            raise
        _sync(output.parent)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into one sentence.

    Raises:
        RunError: the disk is full, or another input/output error.
        UserError: no permission, or a read-only file system.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number in _FULL:
            raise RunError(
                f"The disk that holds {path.parent} is full; make room, then the same command resumes."
            ) from error
        if number in _FORBIDDEN:
            raise UserError(f"{path} cannot be written ({error}); choose an --output that can be.") from error
        raise RunError(f"{path} could not be written: {error}.") from error


def _absolute(path: Path) -> Path:
    """Absolute, but with symbolic links kept: a link given as output must be seen as one."""
    return Path.cwd() / path


def _errno(error: OSError | SafetensorError) -> int | None:
    """The system's error number; safetensors only has it in its text: '… (os error 28)'."""
    if isinstance(error, OSError):
        return error.errno
    _, _, tail = str(error).rpartition("os error ")
    digits = tail.split(")")[0]
    return int(digits) if digits.isdigit() else None


def _check_free(output: Path, overwrite: bool) -> None:
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise OutputExists(f"{output} already exists; choose another --output or add --overwrite.")
    if output.is_symlink() or not output.is_dir():
        raise OutputExists(f"{output} is no directory, so --overwrite leaves it; choose another --output.")
    if any(output.iterdir()) and not ((output / "config.json").is_file() or any(output.glob("*.gguf"))):
        raise OutputExists(f"{output} is no checkpoint, so --overwrite leaves it; choose another --output.")


def _enter(path: Path, file: str, index: dict[str, str]) -> int:
    """Add a shard's tensors to the weight map; returns their bytes."""
    with safe_open(path, framework="pt") as shard:
        keys = list(shard.keys())
    for key in keys:
        if key in index:
            raise RunError(f"{key} would stand in two shards, {index[key]} and {file}.")
        index[key] = file
    with path.open("rb") as raw:
        header = int.from_bytes(raw.read(8), "little")
    return path.stat().st_size - 8 - header


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and of which no two share storage, as parameters of a broken tie still do."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        found[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return found


def _link(source: Path, target: Path) -> None:
    """The same bytes under a second name, or a move where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        source.rename(target)


def _write_text(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    _sync(path)


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk, so that a rename never outlives its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
