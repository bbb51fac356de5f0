"""What every checkpoint format offers: a `Layout`, made for one model's whole plan.

How one weight is stored may depend on the others (a reader may know only one scheme a checkpoint), so a
format is asked once, with every weight that is to be compressed, and answers for each.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmcomp import native_kinds
from llmcomp.errors import BadRecipe
from llmcomp.kinds import Kind, LowRank, integers_of
from llmcomp.schemes import INT8_STATIC, Scheme
from llmcomp.weights import CompressedWeight, QuantizedWeight


class Ref(Protocol):
    """What formats know of a compressible weight (`llmcomp.adapters.base.LinearRef` has it)."""

    @property
    def name(self) -> str: ...

    @property
    def role(self) -> str: ...

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def transposed(self) -> bool: ...


Entry = tuple[Ref, Kind]
# How the names of a weight's tensors go on after that of its module, before "weight": a low-rank one has parts.
PARTS = ("", *(f"{part}." for part in native_kinds.PARTS))
_DIVIDED = ("weight_scale", "weight_values", "weight")
Quantized = tuple[Ref, Scheme]


class Layout(Protocol):
    """How each compressed weight of one checkpoint is stored.

    Attributes:
        dense: {module name: why}: weights that are compressed but cannot be stored packed. They are written
            from `weight.dense()` and belong in the report.
        notes: sentences for the report, such as a weight stored wider than asked.
    """

    @property
    def dense(self) -> Mapping[str, str]: ...

    @property
    def notes(self) -> Sequence[str]: ...

    def tensors(self, ref: Ref, weight: CompressedWeight) -> dict[str, Tensor]:
        """What the file holds for this weight, by full tensor name; every tensor contiguous."""

    def blank(self, ref: Ref, kind: Kind, dtype: torch.dtype) -> dict[str, Tensor]:
        """What `tensors` returns for a weight of that kind, on meta: names, dtypes and shapes. `dtype`: of the dense
        weight."""

    def decode(self, ref: Ref, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `tensors`: the dense weight as the module holds it, decoded as a reader does."""

    def nbytes(self, ref: Ref, itemsize: int) -> int:
        """Bytes of what `tensors` returns; `itemsize`: bytes of one dense value."""

    def config(self, model: nn.Module) -> dict[str, Any] | None:
        """`quantization_config` for config.json, None where none is needed. `model` may lie on meta."""


class Format(Protocol):
    """A layout for a plan; `model`, which may lie on meta, tells what its family's loader cannot take."""

    def __call__(self, entries: Sequence[Entry], model: nn.Module | None = None) -> Layout: ...


def integers_only(entries: Sequence[Entry], format: str) -> list[Quantized]:
    """The entries of a format that holds integers, which those of a quantized weight are wherever it is sparse, too.

    Raises:
        BadRecipe: a weight that stays floating, or one of low rank.
    """
    found: list[Quantized] = []
    for ref, kind in entries:
        if (scheme := integers_of(kind)) is None:
            low = isinstance(kind, LowRank)
            what = "low-rank weights" if low else "sparse weights that are not quantized as well"
            instead = "--format llmcomp holds their factors" if low else (
                "skip them in both steps, or write 'format: dense' in the recipe"
            )  # fmt: skip
            raise BadRecipe(f"Format {format} has no form for {what}, such as {ref.name}: {instead}.")
        found.append((ref, scheme))
    return found


def dense_tensors(ref: Ref, weight: CompressedWeight) -> dict[str, Tensor]:
    """The weight as a plain checkpoint holds it: [out, in], or [in, out] for a Conv1D."""
    dense = weight.dense()
    return {f"{ref.name}.weight": (dense.t() if ref.transposed else dense).contiguous()}


def blank_dense(ref: Ref, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `dense_tensors` returns, on meta."""
    shape = (ref.out_features, ref.in_features)
    return {f"{ref.name}.weight": torch.empty(shape[::-1] if ref.transposed else shape, dtype=dtype, device="meta")}


def blank_integers(ref: Ref, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    """A quantized weight without values."""
    values = torch.empty(ref.out_features, ref.in_features, dtype=torch.int8, device="meta")
    scale = torch.empty(ref.out_features, scheme.groups(ref.in_features), dtype=dtype, device="meta")
    zero = None if scheme.symmetric else torch.empty(scale.shape, dtype=torch.int8, device="meta")
    return QuantizedWeight(values, scale, zero, scheme, scale[0, :1] if scheme.activations == INT8_STATIC else None)


def divide_rows(ref: Ref, tensors: Mapping[str, Tensor], divisor: Tensor) -> dict[str, Tensor]:
    """A weight's tensors in the file with its rows divided: of integers the scales, of a sparse one what is kept, of
    two factors the left one and the base below them, else the weight itself.

    Args:
        tensors: by full name, as `Layout.tensors` returns them. divisor: float32 [out].
    """
    divided = dict(tensors)
    for part in ("", f"{native_kinds.LEFT}.", f"{native_kinds.BASE}."):
        name = next((key for one in _DIVIDED if (key := f"{ref.name}.{part}{one}") in tensors), None)
        if name is None:
            continue
        # A dense weight lies as its module holds it; compressed-tensors packs that as it is, llmcomp's layout [out, …].
        dense = name == f"{ref.name}.weight"
        turned = ref.transposed and (dense or len(tensors[name]) != ref.out_features)
        shape = (1, -1) if turned else (-1, 1)
        divided[name] = (tensors[name] / divisor.view(shape)).to(tensors[name].dtype)
    return divided


def broken_ties(ties: Mapping[str, str], compressed: Collection[str]) -> dict[str, str]:
    """The ties that a file cannot keep once the modules named `compressed` are quantized.

    transformers ties all or nothing (`tie_word_embeddings`), so when one side of one tie is quantized every
    tied parameter is stored by itself and config.json needs `tie_word_embeddings: false`.

    Args:
        ties: {parameter name: name of the parameter it shares storage with}.
        compressed: module names.

    Returns:
        `ties` itself where one of them breaks, else {}.
    """
    touched = {f"{name}.weight" for name in compressed}
    return dict(ties) if touched & (set(ties) | set(ties.values())) else {}


def linears_of(model: nn.Module) -> set[str]:
    """Names of the model's linears."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def made_when_alone(model: nn.Module) -> set[str]:
    """Linears that the base model makes only where it is loaded by itself, such as BERT's pooler.

    No checkpoint of `model` holds them, so a reader that packed them would decode whatever memory held.
    """
    base: Any = getattr(model, "base_model", model)
    if base is model:
        return set()
    with torch.device("meta"):
        return linears_of(type(base)(copy.deepcopy(base.config))) - linears_of(base)
