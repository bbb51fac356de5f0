"""What a checkpoint costs: parameters and bytes from its headers, zeros, latency, peak memory.

Peak memory is taken in a process of its own (`python -m llmcomp.measure.cost DIRECTORY`): what this process
has imported, cached or freed before would otherwise decide the figure.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llmcomp import bnb, lora, native, remote_code
from llmcomp.errors import BadCheckpoint
from llmcomp.feeds import around, vocabulary
from llmcomp.measure.fresh import ask
from llmcomp.measure.load import first_forward, load, prepare
from llmcomp.measure.resident import resident_now, resident_peak
from llmcomp.native import SHAPE
from llmcomp.native_kinds import MARKS, VALUES
from llmcomp.packed import Packed
from llmcomp.report.schema import Size
from llmcomp.shards import TensorInfo, read_json_object, read_shard, weight_files

# What is stored beside a packed or integer weight; counted as bytes, not as parameters.
_BESIDE = (
    *("input_scale", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale"),
    *bnb.BESIDE,
)


def size_of(
    directory: str | Path, role: Callable[[str], str] | None = None, *, allow_pickle: bool = False
) -> Size:
    """Parameters and bytes, from the headers alone.

    Args:
        role: tensor name → role; None leaves `parts` empty.
        allow_pickle: read pytorch_model.bin where there are no safetensors.

    Returns:
        `parameters` counts a quantized weight's elements, not its packed words, and neither scales nor zero
        points nor integer buffers. `bytes_on_disk`: weight files with headers; `parts`: tensors.

    Raises:
        BadCheckpoint: no weights, or a file that is truncated or no safetensors.
    """
    _, files = weight_files(Path(directory), allow_pickle)
    if (adapter := lora.beside(directory)) is not None:
        files = [*files, adapter / lora.WEIGHTS]
    stored = {name: info for file in files for name, info in read_shard(file).tensors.items()}
    parts: dict[str, int] = {}
    if role is not None:
        for name, info in stored.items():
            parts[role(name)] = parts.get(role(name), 0) + info.nbytes
    parameters = sum(_parameters(name, info, stored) for name, info in stored.items())
    return Size(parameters, sum(file.stat().st_size for file in files), parts)


def loaded_bytes(directory: str | Path, *, allow_pickle: bool = False) -> int:
    """Bytes of the model in memory once it has run: every parameter dense, in the dtype the config names.

    compressed-tensors models are decompressed by their first forward (measured on transformers 5.23, CPU);
    those of bitsandbytes and in llmcomp's own layout stay packed, but for floating sparse weights.

    Raises:
        BadCheckpoint: as `size_of`.
    """
    settings = read_json_object(Path(directory) / "config.json")
    if bnb.is_bnb(settings):
        return size_of(directory).bytes_on_disk
    if native.is_native(settings):
        return size_of(directory).bytes_on_disk + _spread_bytes(Path(directory))
    dtype = str(settings.get("dtype") or settings.get("torch_dtype") or "float32")
    itemsize = 2 if dtype.endswith("16") else 8 if dtype == "float64" else 4
    return size_of(directory, allow_pickle=allow_pickle).parameters * itemsize


def weights_of(model: nn.Module, directory: str | Path | None = None) -> Iterator[Tensor]:
    """A model's parameters as it computes with them, without what is kept beside them.

    Args:
        directory: that it was loaded from, None where it was not. Weights of bitsandbytes are decoded from the
            files: in memory they may be laid out for a kernel.
    """
    if directory is not None and bnb.is_bnb(read_json_object(Path(directory) / "config.json")):
        return _decoded(Path(directory))
    first_forward(model)
    packed = (module.dense() for module in model.modules() if isinstance(module, Packed))
    return chain(packed, (value for name, value in model.named_parameters() if not name.endswith(_BESIDE)))


def _decoded(directory: Path) -> Iterator[Tensor]:
    """The weights of a bitsandbytes checkpoint, one at a time."""
    _, files = weight_files(directory, False)
    for file in files:
        with safe_open(file, framework="pt") as shard:
            names = set(shard.keys())
            kinds = bnb.modules(names)
            for module, kind in kinds.items():
                parts = [name for name in bnb.Stored(kind, torch.float32).names(module) if name in names]
                tensors = {name.removeprefix(f"{module}."): shard.get_tensor(name) for name in parts}
                yield bnb.Stored(kind, torch.float32).decode(tensors)
            packed = {f"{module}.weight" for module in kinds}
            yield from (shard.get_tensor(name) for name in names - packed if not name.endswith(_BESIDE))


@torch.inference_mode()
def sparsity_of(parameters: Iterable[Tensor]) -> float:
    """Share of exact zeros among a model's weights as it computes with them (matrices and larger).

    Norms and biases are left out: their zeros are no saving, and a fresh bias is all zeros.
    """
    zeros = total = 0
    for parameter in parameters:
        if parameter.ndim > 1 and parameter.is_floating_point():
            zeros += int((parameter == 0).sum())
            total += parameter.numel()
    return zeros / total if total else 0.0


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward: the median of the repeats with their quartiles."""

    median: float
    low: float
    high: float


@torch.inference_mode()
def latency(
    models: Sequence[nn.Module], batch: int = 1, sequence: int = 128, repeats: int = 10
) -> list[Latency]:
    """Time whole forwards of random tokens [batch, sequence] (seeded), after two that are not counted. Models that
    read images or sound get noise; an encoder-decoder's two sides get the same tokens.

    Several models take turns, so that what else the machine does falls on all of them.
    """
    seconds: list[list[float]] = [[] for _ in models]
    inputs = [around(model, random_tokens(model, batch, sequence)) for model in models]
    for turn in range(repeats + 2):
        for model, given, taken in zip(models, inputs, seconds, strict=True):
            start = time.perf_counter()
            model(**given)
            if next(model.parameters()).is_cuda:
                torch.cuda.synchronize()
            if turn >= 2:
                taken.append(time.perf_counter() - start)
    return [_summary(taken) for taken in seconds]


def peak_memory(
    directory: str | Path, *, task: str | None = None, batch: int = 1, sequence: int = 128
) -> int:
    """Peak resident bytes of loading a checkpoint and running one forward of [batch, sequence] tokens, over
    what the process held after its imports; measured in a fresh process.

    Mapped pages of the weight files count while they are resident, as in any tool that shows resident memory.

    Raises:
        RunError: the process failed; the message ends with what it said.
    """
    arguments = [str(directory), task or "", str(batch), str(sequence)]
    arguments += ["trusted"] if remote_code.trusts(Path(directory)) else []
    found = ask("llmcomp.measure.cost", arguments, f"Measuring the peak memory of {directory}")
    return int(found["peak_memory"])


def _spread_bytes(directory: Path) -> int:
    """Bytes of the zeros between kept floating values, which a file in llmcomp's own layout leaves out."""
    _, files = weight_files(directory, False)
    stored = {name: info for file in files for name, info in read_shard(file).tensors.items()}
    kept = {name: info for name, info in stored.items() if name.endswith(f".{VALUES}")}
    removed = {name: _parameters(name, info, stored) - math.prod(info.shape) for name, info in kept.items()}
    return sum(count * kept[name].dtype.itemsize for name, count in removed.items())


def _parameters(name: str, info: TensorInfo, stored: Mapping[str, TensorInfo]) -> int:
    """The weights that a stored tensor stands for."""
    if name.endswith(_BESIDE):
        return 0
    if name.endswith(MARKS):
        beside = f"{name.rpartition('.')[0]}.{SHAPE}"
        if beside not in stored:
            raise BadCheckpoint(f"{info.file} holds {name} without {beside}; its size cannot be told.")
        return math.prod(_read(stored[beside].file, beside).tolist())
    if shape := bnb.weight_shape(name, stored, lambda other: _read(stored[other].file, other)):
        return math.prod(shape)
    if info.dtype.is_floating_point or name.removesuffix("weight") + "SCB" in stored or name + "_scale" in stored:
        return math.prod(info.shape)
    return 0


def _read(file: Path, name: str) -> Tensor:
    """One stored tensor."""
    with safe_open(file, framework="pt") as handle:
        tensor: Tensor = handle.get_tensor(name)
    return tensor


def random_tokens(model: Any, batch: int, sequence: int) -> Tensor:
    """Token ids [batch, sequence] from a fixed seed, none of them the padding token."""
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    size = vocabulary(model) or 1
    padding = getattr(config, "pad_token_id", None) or 0
    lowest = 1 + max(0, padding) if size > 1 + padding else 0
    return torch.randint(lowest, size, (batch, sequence), generator=generator).to(device)


def _summary(seconds: list[float]) -> Latency:
    if len(seconds) < 2:
        return Latency(seconds[0], seconds[0], seconds[0])
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Latency(median, low, high)


def _main(directory: str, task: str, batch: int, sequence: int, *trusted: str) -> None:
    """Load, run once, print {"peak_memory": bytes}; the fresh process behind `peak_memory`."""
    if trusted:
        remote_code.register(Path(directory))
    prepare(directory, task or None)
    before = resident_now()
    model = load(directory, task or None)
    with torch.inference_mode():
        model(**around(model, random_tokens(model, batch, sequence)))
    print(json.dumps({"peak_memory": max(0, resident_peak() - before)}))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
