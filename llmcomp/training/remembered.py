"""What a teacher says of each sample, kept on disk, so that it runs once: later epochs and later runs read it.

    DIR/<what was asked of whom>/cache.json               the same in words
                                 <which samples>.safetensors

A directory's name is a digest of all that answers depend on (the teachers' weights, the temperature, how much is kept),
a file's name one of the samples in it. So a killed run goes on with the file that is missing, another run over the same
text reads all, and what changed is asked anew. Files are written whole or not at all, checked before they are read, and
mapped: of a cache that is larger than memory only what a batch wants is read. A sample is found by its token ids or
pixel values, so the answers are a function of what the student reads, like any teacher.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from llmcomp.checkpoint import Checkpoint
from llmcomp.digests import file_sha256
from llmcomp.errors import BadRecipe, RunError, UserError
from llmcomp.formats.save import writing
from llmcomp.kept import Kept, decode, encode, fewer, keep
from llmcomp.matmul import fast_matmul
from llmcomp.progress import Progress
from llmcomp.ranks import ALONE, World
from llmcomp.training.data import Batch, Samples, key_of, rows_of
from llmcomp.training.distilling import Guide, Targets

_LAYOUT = 1
_OF_A_FILE, _OF_A_FORWARD = 1 << 18, 1 << 12  # tokens; the first is some 50 MB of answers about a next token
_COUNTS, _DIGEST = "positions", "sha256"
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Asked:
    """What is kept of the answers of whom.

    Attributes:
        folder: of all caches. identity: what else answers depend on, in words and digests.
        classes: of a distribution, those that the student has too. count: how many of them are kept.
        bits: of a logarithm. temperature: of the distributions. regression: answers are scores.
    """

    folder: Path
    identity: Mapping[str, Any]
    classes: int
    count: int = 64
    bits: int = 16
    temperature: float = 1.0
    regression: bool = False

    def directory(self) -> Path:
        """Where these answers lie, made if it is not there.

        Raises:
            UserError: a place where nothing can be written.
        """
        said = {"layout": _LAYOUT, "classes": self.classes, "kept": self.count, "bits": self.bits,
                "temperature": self.temperature, **self.identity}  # fmt: skip
        text = json.dumps(said, indent=1, sort_keys=True)
        found = self.folder / hashlib.sha256(text.encode()).hexdigest()[:24]
        try:
            found.mkdir(parents=True, exist_ok=True)
            if not (found / "cache.json").exists():
                (found / "cache.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--teacher-cache {self.folder} cannot be written ({error.strerror}); give a directory that can be."
            ) from error
        return found

    def kept(self, logits: Tensor | Kept) -> dict[str, Tensor]:
        """Of logits [n, classes or more] what is stored."""
        if isinstance(logits, Kept):
            return encode(fewer(logits, self.count), self.bits)
        if self.regression:
            return {"scores": logits.float()}
        return encode(keep(logits[:, : self.classes], self.count, self.temperature), self.bits)

    def said(self, arrays: dict[str, Tensor]) -> Tensor | Kept:
        """The inverse."""
        return arrays["scores"] if self.regression else decode(arrays, self.classes)


@dataclass(frozen=True)
class _File:
    """One file: which samples it holds, in order; digests of what is read [16 bytes each], numbers in the data."""

    path: Path
    keys: list[bytes]
    numbers: list[int]

    def damage(self) -> str | None:
        """What is wrong with it, in words; None where it is whole and holds what it should."""
        try:
            with safe_open(self.path, "np") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                known = (file.metadata() or {}).get(_DIGEST)
        except (OSError, SafetensorError) as error:
            return str(error)
        if known != _digest(arrays) or len(arrays[_COUNTS]) != len(self.keys):
            return "its content is not what was written"
        return None


def remembered(
    guide: Guide, samples: Samples, collate: Callable[[Sequence[Batch]], Batch], asked: Asked, progress: Progress, *,
    device: torch.device | str = "cpu", world: World = ALONE,
) -> Guide:  # fmt: skip
    """A teacher that has been asked about all samples, and is not needed any more.

    Args:
        guide: it; called with what is not on disk yet, and with nothing where all is.
        collate: samples → batch, which must show a sample the same each time.
        world: whose ranks share the work, and read what all have written.

    Raises:
        UserError: a place where nothing can be written, or that not all hosts see.
    """
    files = _files(asked.directory(), samples, collate)
    waiting = []
    for file in world.share(files):
        if not file.path.exists():
            waiting.append(file)
        elif damage := file.damage():
            progress.note(f"The teacher's cache {file.path} is made anew: {damage}.")
            waiting.append(file)
    if waiting:
        progress.phase("ask the teacher", sum(len(file.keys) for file in waiting))
    for file in waiting:
        with fast_matmul():
            _write(file, guide, samples, collate, asked, device)
        progress.step(len(file.keys))
    world.total(0)  # all have written theirs
    if missing := [file.path for file in files if not file.path.exists()]:
        raise BadRecipe(
            f"{missing[0]} was written by another process and is not here; give a --teacher-cache that all hosts see."
        )
    return _recalling(files, asked, device)


def _files(folder: Path, samples: Samples, collate: Callable[[Sequence[Batch]], Batch]) -> list[_File]:
    """All samples, equal ones once, in files of about as many tokens."""
    found: dict[bytes, int] = {}
    for number in range(len(samples)):
        (row,) = rows_of(collate([samples[number]]))
        found.setdefault(key_of(row), number)
    groups: list[list[bytes]] = [[]]
    tokens, lengths = 0, samples.lengths
    for key, number in found.items():
        if tokens >= _OF_A_FILE:
            groups.append([])
            tokens = 0
        groups[-1].append(key)
        tokens += lengths[number]
    return [_file(folder, keys, found) for keys in groups]


def _file(folder: Path, keys: list[bytes], numbers: Mapping[bytes, int]) -> _File:
    name = hashlib.blake2b(b"".join(keys), digest_size=12).hexdigest()
    return _File(folder / f"{name}.safetensors", keys, [numbers[key] for key in keys])


def _write(
    file: _File, guide: Guide, samples: Samples, collate: Callable[[Sequence[Batch]], Batch], asked: Asked,
    device: torch.device | str,
) -> None:  # fmt: skip
    """Ask about the samples of a file, in batches of like lengths that depend on nothing else."""
    every = samples.lengths
    lengths = [every[number] for number in file.numbers]
    said: dict[int, Arrays] = {}
    for places in _forwards(lengths):
        batch = collate([samples[file.numbers[place]] for place in places])
        scored = batch["scored"]
        inputs = {name: value.to(device) for name, value in batch.items() if name not in ("labels", "scored")}
        logits = guide(inputs).logits
        if isinstance(logits, Tensor):
            logits = logits[scored.to(device)]
        kept = {name: value.cpu().numpy() for name, value in asked.kept(logits).items()}
        ends = scored.reshape(len(places), -1).sum(1).cumsum(0).tolist()
        for place, start, end in zip(places, [0, *ends], ends, strict=False):
            said[place] = {name: value[start:end] for name, value in kept.items()}
    names = list(said[0])
    arrays = {name: np.concatenate([said[place][name] for place in range(len(lengths))]) for name in names}
    arrays[_COUNTS] = np.array([len(said[place][names[0]]) for place in range(len(lengths))], dtype=np.int32)
    with writing(file.path):
        beside = file.path.with_suffix(f".{os.getpid()}.tmp")
        save_file(arrays, beside, metadata={_DIGEST: _digest(arrays)})
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(file.path)


def _forwards(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places in a file by length, as many at once as tokens allow."""
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (lengths[place], place)):
        if group and (len(group) + 1) * lengths[place] > _OF_A_FORWARD:
            yield group
            group = []
        group.append(place)
    yield group


def _recalling(files: Sequence[_File], asked: Asked, device: torch.device | str) -> Guide:
    """The answers as they lie on disk."""
    handles = [safe_open(file.path, "np") for file in files]
    names = [name for name in handles[0].keys() if name != _COUNTS]  # noqa: SIM118
    ends = [handle.get_tensor(_COUNTS).cumsum() for handle in handles]
    empty = {name: handles[0].get_tensor(name)[:0].copy() for name in names}  # of samples in which nothing was masked
    where = {key: (number, place) for number, file in enumerate(files) for place, key in enumerate(file.keys)}

    def recall(inputs: Mapping[str, Tensor]) -> Targets:
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for row in rows_of(inputs):
            known = where.get(key_of(row))
            if known is None:
                raise RunError("A sample is in training that the teacher was never asked about; this is a bug.")
            number, place = known
            start, end = int(ends[number][place - 1]) if place else 0, int(ends[number][place])
            for name in names:  # a slice of nothing behind the last position is an error to safetensors
                found[name].append(handles[number].get_slice(name)[start:end] if start < end else empty[name])
        arrays = {name: torch.from_numpy(np.concatenate(parts)).to(device) for name, parts in found.items()}
        return Targets(asked.said(arrays))

    return recall


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def vocabulary_sha256(vocabulary: dict[str, int]) -> str:
    """SHA-256 of a tokenizer's tokens and their ids."""
    return hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()


def content(path: Path) -> str:
    """SHA-256 of a model's config and weights, whatever they are called and wherever they lie."""
    files = sorted({place.file for place in Checkpoint.open(path).keys.values()})
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in files:
        digest.update(file_sha256(file).encode())
    return digest.hexdigest()
