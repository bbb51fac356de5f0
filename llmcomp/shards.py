"""Weight files as they lie on disk: which there are, and what their headers promise.

A safetensors file is eight bytes of length, that much JSON, then the data and nothing else, so a truncated or
corrupt shard shows without reading its data: the size must be exactly what the header adds up to.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from llmcomp.errors import BadCheckpoint

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
AGAIN = "copy or download it again"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a stored tensor is and what it is, without its values. `nbytes`: of its data in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One file's tensors and the bytes that tell it from a changed one."""

    tensors: dict[str, TensorInfo]
    header: bytes


def weight_files(path: Path, allow_pickle: bool) -> tuple[dict[str, str], list[Path]]:
    """The index (key → file name; empty for a single file) and the files, as from_pretrained chooses them.

    Raises:
        BadCheckpoint: no weights, only pickled ones, or an index that names what it must not or is not there.
    """
    pairs = [(SINGLE, INDEX), *([(PICKLED, PICKLED_INDEX)] if allow_pickle else [])]
    for single, index in pairs:
        if (path / single).is_file():
            return {}, [path / single]
        if (path / index).is_file():
            return _read_index(path, index, Path(single).suffix)
    names = sorted(file.name for file in path.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES) and name != "training_args.bin"]
    others = [name for name in names if name.endswith(".safetensors")]
    if pickles and not others:
        raise BadCheckpoint(
            f"{path} holds only pickled weights ({pickles[0]}), which can run code when opened and are never "
            "loaded; where you trust them, convert: AutoModel.from_pretrained(...).save_pretrained(...)."
        )
    found = f" (found only {', '.join(others[:3])})" if others else ""
    raise BadCheckpoint(f"{path} has config.json but no weights; expected {SINGLE} or {INDEX}{found}.")


def _read_index(path: Path, index: str, suffix: str) -> tuple[dict[str, str], list[Path]]:
    places = read_json_object(path / index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(n, str) for n in places.values()):
        raise BadCheckpoint(f"{path / index} has no weight_map from tensor names to files; {AGAIN}.")
    names = sorted(set(places.values()))
    for name in names:
        # Only the name must stay inside: the Hub's cache links files to blobs elsewhere.
        if leaves(name) or not name.endswith(suffix):
            raise BadCheckpoint(
                f"{path / index} points at {name!r}; expected the name of a {suffix} file in the directory."
            )
        if not (path / name).is_file():
            raise BadCheckpoint(f"{path / index} names {name}, which is not there; {AGAIN}.")
    return places, [path / name for name in names]


def leaves(name: str) -> bool:
    """Whether a relative name could lead out of its directory, on any system."""
    windows = PureWindowsPath(name)  # takes both separators
    return bool(windows.drive or windows.root) or ".." in windows.parts or not windows.name


def is_pickle(file: Path) -> bool:
    return file.name.endswith(PICKLES)


def read_shard(file: Path) -> Shard:
    """Read and check one file's header.

    Raises:
        BadCheckpoint: unreadable, or its data do not take exactly the bytes that its header promises.
    """
    if is_pickle(file):
        state = load_pickle(file, "meta")
        tensors = {k: TensorInfo(file, t.dtype, tuple(t.shape), t.nbytes) for k, t in state.items()}
        told = sorted((key, str(info.dtype), info.shape) for key, info in tensors.items())
        return Shard(tensors, repr(told).encode())
    header, start, size = _read_header(file)
    tensors, position = {}, 0
    for key, info, (begin, end) in sorted(_entries(file, header), key=lambda entry: entry[2]):
        if begin != position or end - begin != info.nbytes:
            raise _corrupt(file, f"{key} should take {info.nbytes} bytes, its header gives it {end - begin}")
        tensors[key], position = info, end
    if size != start + position:
        raise _corrupt(file, f"its header promises {start + position} bytes, the file has {size}")
    return Shard(tensors, header)


def _read_header(file: Path) -> tuple[bytes, int, int]:
    """Header, where the data starts, file size; all from the first bytes."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise _corrupt(file, f"its header should take {length} bytes, the file has {size}")
            return stream.read(length), 8 + length, size
    except OSError as error:
        raise BadCheckpoint(f"{file} cannot be read ({error.strerror}).") from error


def _entries(file: Path, header: bytes) -> Iterator[tuple[str, TensorInfo, tuple[int, int]]]:
    try:
        entries = json.loads(header)
        for key, entry in entries.items():
            if key == "__metadata__":
                continue
            dtype, shape = _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
            if any(n < 0 for n in shape):
                raise ValueError(f"shape {list(shape)} of {key}")
            yield key, TensorInfo(file, dtype, shape, math.prod(shape) * dtype.itemsize), (begin, end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(file, f"its header is unreadable, {type(error).__name__} {error}") from error


def _corrupt(file: Path, why: str) -> BadCheckpoint:
    return BadCheckpoint(f"{file} is truncated or corrupt ({why}); {AGAIN}.")


def load_pickle(file: Path, device: str | None) -> dict[str, Tensor]:
    """Tensors of a pickled state dict, memory-mapped on `device` (None: where they were), no code run.

    Raises:
        BadCheckpoint: not a state dict that the weights-only unpickler takes.
    """
    try:
        state = torch.load(file, map_location=device, mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise _corrupt(file, str(error).splitlines()[0]) from error
    if not isinstance(state, dict):
        raise _corrupt(file, f"it holds a {type(state).__name__}, not a state dict")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        BadCheckpoint: unreadable, not JSON or another kind of value.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{file} is not JSON ({error}); {AGAIN}.") from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{file} must hold a JSON object, not a {type(value).__name__}; {AGAIN}.")
    return value
