"""A source checkpoint, read lazily: config.json and safetensors, checked before any weight is touched.

Opening reads headers only (see `llmcomp.shards`). Tensors are memory-mapped; `release` lets their pages go
again. `bind` says which stored tensor is which parameter, by transformers' own renaming rules, so that what
llmcomp reads is what `from_pretrained` would have loaded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmcomp.errors import BadCheckpoint, UnknownArchitecture
from llmcomp.experts import expert_shares, file_renaming
from llmcomp.export_record import RECORD_NAME
from llmcomp.sentences import sentence_modules
from llmcomp.shards import (
    AGAIN,
    PICKLES,
    Shard,
    TensorInfo,
    is_pickle,
    leaves,
    load_pickle,
    read_json_object,
    read_shard,
    weight_files,
)

_OTHER_WEIGHTS = (".safetensors", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".tflite", ".mlmodel")
_LARGEST_COPY = 64 * 2**20  # bytes; the largest tokenizer.json on the Hub takes half of it


class Checkpoint:
    """A local directory with config.json and weights; make one with `Checkpoint.open`.

    Attributes:
        path: the directory.
        config: config.json as it stands.
        keys: every stored tensor by its name in the files.
        trust_remote_code: what it was opened with.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], shards: dict[Path, Shard], keys: dict[str, TensorInfo],
        trust_remote_code: bool,
    ) -> None:  # fmt: skip
        self.path = path
        self.config = config
        self.keys = keys
        self.trust_remote_code = trust_remote_code
        self._shards = shards
        self._handles: dict[Path, Any] = {}

    @classmethod
    def open(
        cls, path: str | Path, *, allow_pickle: bool = False, trust_remote_code: bool = False
    ) -> Checkpoint:
        """Check a directory and read its headers, but no weights.

        Args:
            path: a directory as `save_pretrained` writes it.
            allow_pickle: where there are no safetensors, read pytorch_model.bin (by torch's weights-only
                unpickler, memory-mapped).
            trust_remote_code: accept a model that needs the Python code it brings along.

        Raises:
            BadCheckpoint: anything about it that would fail later, in one sentence.
        """
        path = Path(path)
        config = _read_config(path)
        if not trust_remote_code:
            _refuse_code(path, config)
        _refuse_pickled_modules(path)
        index, files = weight_files(path, allow_pickle)
        shards = {file: read_shard(file) for file in files}
        keys = {key: info for shard in shards.values() for key, info in shard.tensors.items()}
        for key, name in index.items():
            if key not in shards[path / name].tensors:
                raise BadCheckpoint(f"{path}: the index places {key} in {name}, which lacks it; {AGAIN}.")
            keys[key] = shards[path / name].tensors[key]
        return cls(path, config, shards, keys, trust_remote_code)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, without headers."""
        return sum(info.nbytes for info in self.keys.values())

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The config's quantization_config, None for a dense checkpoint."""
        found = self.config.get("quantization_config") or self.config.get("compression_config")
        return found if isinstance(found, dict) else None

    def require_dense(self) -> None:
        """Raise BadCheckpoint where the weights are quantized already."""
        if self.quantization is not None:
            method = self.quantization.get("quant_method", "an unnamed method")
            raise BadCheckpoint(
                f"{self.path} is already quantized ({method}); give the full-precision checkpoint instead."
            )

    def tensor(self, key: str) -> Tensor:
        """The stored tensor, memory-mapped: read-only by contract, pages are read when touched.

        Raises:
            BadCheckpoint: no such key.
        """
        if key not in self.keys:
            raise BadCheckpoint(f"{self.path} holds no tensor called {key}.")
        file = self.keys[key].file
        if file not in self._handles:
            self._handles[file] = load_pickle(file, None) if is_pickle(file) else safe_open(file, "pt")
        handle = self._handles[file]
        return handle[key] if isinstance(handle, dict) else handle.get_tensor(key)

    def release(self) -> None:
        """Close the files; their mapped pages go with the last tensor that was read from them."""
        self._handles.clear()

    def fingerprint(self, times: bool = True) -> str:
        """SHA-256 over config.json and every weight file's name, size, header and, with `times`, modification time,
        which copies on other hosts do not share."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted(self._shards):
            stat = file.stat()
            name = file.relative_to(self.path).as_posix()
            digest.update(f"\n{name} {stat.st_size} {stat.st_mtime_ns if times else ''} ".encode())
            digest.update(self._shards[file].header)
        return digest.hexdigest()

    def copied_files(self) -> list[Path]:
        """What should travel with a compressed copy: tokenizer, generation config, licence, …

        Paths below `path`, sorted. From the top: whatever is small and neither weights, their index,
        config.json, README.md nor hidden; Python only with `trust_remote_code`. sentence-transformers' module
        folders (named by modules.json) travel whole, however large, but for pickles; a folder without files
        (2_Normalize) stands for itself.
        """
        found = [file for file in self.path.iterdir() if self._travels(file)]
        found += _files_below(self.path / "additional_chat_templates")
        found = [file for file in found if file.stat().st_size <= _LARGEST_COPY]
        for folder in _module_folders(self.path):
            found += _files_below(folder) or ([folder] if folder.is_dir() else [])
        return sorted(set(found))

    def _travels(self, file: Path) -> bool:
        name = file.name
        if not file.is_file() or name.startswith(".") or name in ("config.json", "README.md", RECORD_NAME):
            return False
        if name.endswith(".py"):
            return self.trust_remote_code
        return not name.endswith((*PICKLES, *_OTHER_WEIGHTS, ".index.json"))


@dataclass(frozen=True)
class Binding:
    """Which stored tensor is which parameter or persistent buffer of a model.

    Attributes:
        key_of: name in the model → key in the checkpoint; both ends of a tie lead to the one stored tensor.
        dtypes: name in the model → dtype that the model has it in.
        ties: {name: name it shares storage with}, those that hold for these weights.
        missing: names without a tensor of their own: supplied by a tie, or buffers that the model computes.
        unused: keys that the model has no place for.
        renamed: of a model with experts, {name: key} where transformers renames the key as it loads; files are
            written with these keys, which other readers know.
    """

    checkpoint: Checkpoint
    key_of: dict[str, str]
    dtypes: dict[str, torch.dtype]
    ties: dict[str, str]
    missing: list[str]
    unused: list[str]
    renamed: dict[str, str]

    def tensor(self, name: str) -> Tensor:
        """The value that `from_pretrained` gives the parameter `name`: as stored, in the model's dtype."""
        return self.checkpoint.tensor(self.key_of[name]).to(self.dtypes[name])

    def file_name(self, name: str) -> str:
        """What a tensor is called in the file that is written: a parameter, or a part of a compressed weight."""
        module, weight, part = name.rpartition(".weight")
        whole = module + weight or name
        return self.renamed.get(whole, whole) + (part if module else "")


def bind(checkpoint: Checkpoint, model: Any) -> Binding:
    """Match stored tensors with the parameters of a skeleton, by transformers' rules for prefixes, legacy
    names and ties.

    Where config.json ties two parameters but the file holds two different tensors, they are not tied: the tie
    goes from `model.all_tied_weights_keys` too, as `from_pretrained` does it, so `bind` before `discover`.

    Raises:
        BadCheckpoint: parameters without a tensor, or tensors of the wrong shape or kind.
        UnknownArchitecture: the stored tensors must be split or merged to become parameters.
    """
    slots: dict[str, Tensor] = model.state_dict()
    key_of, unused = _match(checkpoint, model, slots)
    renamed = _renamed(model, key_of) if expert_shares(model) else {}
    for name, key in key_of.items():
        _check_fit(checkpoint, model, name, key, slots[name])
    own = set(key_of)
    ties = _resolve_ties(checkpoint, model, key_of)
    buffers = {name for name, _ in model.named_buffers()}
    lost = [name for name in slots if name not in key_of and name not in buffers]
    if lost:
        raise BadCheckpoint(_lost_message(checkpoint, model, lost))
    missing = [name for name in slots if name not in own]
    dtypes = {name: slots[name].dtype for name in key_of}
    return Binding(checkpoint, key_of, dtypes, ties, missing, unused, renamed)


# --- opening ---


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise BadCheckpoint(f"{path} is not a directory; expected a folder with config.json and safetensors.")
    if not any(path.iterdir()):
        raise BadCheckpoint(f"{path} is an empty directory; expected config.json and safetensors in it.")
    file = path / "config.json"
    if not file.is_file():
        raise BadCheckpoint(f"{path} has no config.json; give the folder that save_pretrained wrote.")
    return read_json_object(file)


def _refuse_code(path: Path, config: dict[str, Any]) -> None:
    if not config.get("auto_map"):
        return
    import transformers

    names = config.get("architectures") or ["its model class"]
    known = config.get("model_type") in transformers.CONFIG_MAPPING
    if not known or not hasattr(transformers, str(names[0])):
        raise BadCheckpoint(
            f"{path} needs Python code that it brings along for {names[0]}, which could do anything here; "
            "read that code, then pass --trust-remote-code."
        )


def _module_folders(path: Path) -> list[Path]:
    """The subfolders that sentence-transformers' modules.json names."""
    return [path / name for _, name in sentence_modules(path) if name and not leaves(name)]


def _files_below(folder: Path) -> list[Path]:
    """Every file in a folder, at any depth, but pickles; none where there is no such folder."""
    inside = folder.rglob("*") if folder.is_dir() else iter(())
    return [file for file in inside if file.is_file() and not file.name.endswith(PICKLES)]


def _refuse_pickled_modules(path: Path) -> None:
    """A module whose only weights are pickled would be missing from the compressed copy."""
    for folder in _module_folders(path):
        pickled = [file for file in sorted(folder.glob("*")) if file.name.endswith(PICKLES)]
        if pickled and not any(folder.glob("*.safetensors")):
            raise BadCheckpoint(
                f"{pickled[0]} is a pickled module, which can run code when opened and is not copied; save the "
                "model once again with SentenceTransformer(...).save_pretrained(...) and give that directory."
            )


# --- binding ---


def _match(
    checkpoint: Checkpoint, model: Any, slots: dict[str, Tensor]
) -> tuple[dict[str, str], list[str]]:
    """Name in the model → key, and the keys left over; the renaming of `from_pretrained`, step for step."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix = model.base_model_prefix
    key_of: dict[str, str] = {}
    unused: list[str] = []
    for key in sorted(checkpoint.keys, key=dot_natural_key):
        name, conversion = rename_source_key(key, renamings, converters, prefix, slots)
        if name not in slots:  # experts that were taken apart need no merging
            name, conversion = rename_source_key(key, renamings, [], prefix, slots)
        if name not in slots and key in slots:
            name, conversion = rename_source_key(key, [], [], prefix, slots)
        if name not in slots:
            unused.append(key)
        elif conversion is not None:
            converter = next(c for c in converters if conversion in c.source_patterns)
            steps = " + ".join(type(operation).__name__ for operation in converter.operations)
            raise UnknownArchitecture(
                f"{type(model).__name__} needs the tensor conversion {steps} that makes {name} of stored "
                f"tensors such as {key}, which llmcomp cannot do yet."
            )
        else:
            key_of.setdefault(name, key)
    return key_of, unused


def _renamed(model: Any, key_of: dict[str, str]) -> dict[str, str]:
    rename = file_renaming(model)
    return {name: key for name, key in key_of.items() if name != key and rename(key) == name}


def _check_fit(checkpoint: Checkpoint, model: Any, name: str, key: str, slot: Tensor) -> None:
    info = checkpoint.keys[key]
    wanted = tuple(slot.shape)
    if info.shape != wanted:
        raise BadCheckpoint(
            f"{checkpoint.path}: {key} has the shape {list(info.shape)}, but {type(model).__name__} has "
            f"{list(wanted)} for {name}; config.json and weights do not belong together."
        )
    if slot.dtype.is_floating_point and not info.dtype.is_floating_point:
        raise BadCheckpoint(
            f"{checkpoint.path}: {key} holds {info.dtype}, not floating-point weights; give the "
            "full-precision checkpoint instead."
        )


def _resolve_ties(checkpoint: Checkpoint, model: Any, key_of: dict[str, str]) -> dict[str, str]:
    """Ties that hold; completes `key_of` with the ends that have no tensor of their own.

    As `tie_weights(missing_keys=...)` in transformers: a tie works in both directions, and two stored tensors
    that differ are left alone.
    """
    pairs = dict(model.all_tied_weights_keys)
    groups: dict[str, list[str]] = {}
    for target, source in pairs.items():
        groups.setdefault(source, [source]).append(target)
    for names in groups.values():
        supplier = next((name for name in names if name in key_of), None)
        for name in names:
            if supplier is not None:
                key_of.setdefault(name, key_of[supplier])
    ties: dict[str, str] = {}
    for target, source in pairs.items():
        if target not in key_of or source not in key_of:
            continue
        one, other = key_of[target], key_of[source]
        if one == other or torch.equal(checkpoint.tensor(one), checkpoint.tensor(other)):
            ties[target] = source
        else:
            model.all_tied_weights_keys.pop(target)
    return ties


def _lost_message(checkpoint: Checkpoint, model: Any, lost: list[str]) -> str:
    architecture, prefix = type(model).__name__, model.base_model_prefix + "."
    named = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
    body = [name for name in lost if name.startswith(prefix) and ".pooler." not in name]
    if hasattr(model, model.base_model_prefix) and not body:
        return (
            f"{checkpoint.path} has no trained head: {architecture} needs {named}; fine-tune it first, or "
            "correct 'architectures' in config.json to the class that these weights are of."
        )
    return f"{checkpoint.path} lacks {named}, which {architecture} needs; {AGAIN}."
