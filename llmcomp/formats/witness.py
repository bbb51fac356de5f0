"""What verification compares a written checkpoint with, gathered while the model was compressed.

    <directory>/digests/<key>.json   {parameter name: {sha256, shape, dtype}}, one file a block
    <directory>/witness.json         the plan: compressed modules, source's names, shapes and dtypes
    <directory>/witness.safetensors  model inputs and the stream's own outputs for them

A digest is of the dense tensor as a reader decodes it, so a checkpoint passes only where every parameter is
the same to the bit. Files are written by rename, so a killed run resumes with what is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmcomp.errors import RunError
from llmcomp.formats.save import writing

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Digest:
    """What identifies one dense tensor. `sha256`: of its elements' bytes in row-major order."""

    sha256: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Pruned:
    """What is zero in a weight stored dense, as the module holds it.

    Attributes:
        zeros: how many. kept, of: N and M of N:M along the input, None where unstructured.
        transposed: the module holds [in, out].
    """

    zeros: int
    kept: int | None = None
    of: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Witness:
    """Everything that verification knows of the model as it was compressed.

    Attributes:
        digests: {state_dict name in the plainly loaded model: Digest}, tied parameters under each name.
        compressed: {module name: scheme label} of the modules stored in compressed form.
        source: {state_dict name: (shape, dtype)} of the source model.
        inputs: what the model is called with, such as input_ids and attention_mask [windows, length].
        output: the model's first output for them (`model_output`), [windows, length, …] or [windows, …].
        device: what computed it, 'cpu' or 'cuda'.
        adapter: {name: Digest} of the tensors of an adapter that lies beside the weights; its outputs are with it.
        pruned: {parameter: what is zero in it} of weights stored dense.
    """

    digests: dict[str, Digest]
    compressed: dict[str, str]
    source: dict[str, tuple[tuple[int, ...], str]]
    inputs: dict[str, Tensor]
    output: Tensor
    device: str = "cpu"
    adapter: dict[str, Digest] = field(default_factory=dict)
    pruned: dict[str, Pruned] = field(default_factory=dict)


def digest(tensor: Tensor) -> Digest:
    """The identity of a tensor; copies at most a chunk of it at a time."""
    hasher = hashlib.sha256()
    for rows in _row_chunks(tensor.detach()):
        hasher.update(rows.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return Digest(hasher.hexdigest(), tuple(tensor.shape), dtype_name(tensor.dtype))


def dtype_name(dtype: torch.dtype) -> str:
    """'bfloat16' for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def record(
    directory: Path, key: str, tensors: Mapping[str, Tensor], known: Mapping[str, Digest] | None = None
) -> None:
    """Note the digests of some parameters; a second call with the same key replaces the first.

    Args:
        directory: of the witness; made if absent.
        key: such as 'block-00003'.
        tensors: dense tensors by state_dict name, as a reader of the checkpoint decodes them.
        known: digests of further ones, whose tensors are gone.

    Raises:
        UserError, RunError: the directory cannot be written to.
    """
    folder = directory / "digests"
    found = {**{name: digest(tensor) for name, tensor in tensors.items()}, **(known or {})}
    digests = {name: asdict(one) for name, one in found.items()}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / f"{key}.json", digests)


def save(
    directory: Path,
    *,
    compressed: Mapping[str, str],
    source: Mapping[str, tuple[tuple[int, ...], str]],
    inputs: Mapping[str, Tensor],
    output: Tensor,
    adapter: Mapping[str, Tensor] | None = None,
    pruned: Mapping[str, Pruned] | None = None,
) -> None:
    """Write what is known at the end of the stream (fields of `Witness`; the adapter's tensors themselves).

    Raises:
        UserError, RunError: the directory cannot be written to.
    """
    plan: dict[str, Any] = {"compressed": dict(compressed), "source": dict(source), "device": output.device.type}
    plan["pruned"] = {name: asdict(one) for name, one in (pruned or {}).items()}
    plan["adapter"] = {name: asdict(digest(tensor)) for name, tensor in (adapter or {}).items()}
    tensors = {f"input.{name}": tensor for name, tensor in inputs.items()} | {"output": output}
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    temporary = directory / "witness.tmp"
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        save_file(stored, temporary)
        temporary.replace(directory / "witness.safetensors")
        _write_json(directory / "witness.json", plan)


def load(directory: Path) -> Witness:
    """Read a witness back.

    Raises:
        RunError: it is incomplete.
    """
    try:
        plan = json.loads((directory / "witness.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "witness.safetensors")
        digests: dict[str, Digest] = {}
        for path in sorted((directory / "digests").glob("*.json")):
            for name, fields in json.loads(path.read_text(encoding="utf-8")).items():
                digests[name] = _digest_of(fields)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{directory} holds no complete witness ({error}); run again.") from error
    return Witness(
        digests=digests,
        compressed=plan["compressed"],
        source={name: (tuple(shape), dtype) for name, (shape, dtype) in plan["source"].items()},
        inputs={name[6:]: tensor for name, tensor in tensors.items() if name.startswith("input.")},
        output=tensors["output"],
        device=plan["device"],
        adapter={name: _digest_of(fields) for name, fields in plan["adapter"].items()},
        pruned={name: Pruned(**fields) for name, fields in plan["pruned"].items()},
    )


def _digest_of(fields: Mapping[str, Any]) -> Digest:
    return Digest(fields["sha256"], tuple(fields["shape"]), fields["dtype"])


def model_output(result: Any) -> Tensor:
    """The tensor of a transformers model's output that is compared.

    Raises:
        RunError: it has none of the known ones.
    """
    for name in ("logits", "start_logits", "last_hidden_state"):
        tensor = getattr(result, name, None)
        if isinstance(tensor, Tensor):
            return tensor
    raise RunError(f"{type(result).__name__} has no logits, start_logits or last_hidden_state to compare.")


def _row_chunks(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.ndim == 0 or tensor.numel() == 0:
        yield tensor
        return
    step = max(1, _CHUNK // max(1, tensor[0].numel() * tensor.element_size()))
    yield from tensor.split(step)


def _write_json(path: Path, data: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
