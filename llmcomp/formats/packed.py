"""llmcomp's own layout (`llmcomp.native`): any mixture of schemes, embeddings, Conv1D and experts included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from llmcomp import native, packing
from llmcomp.errors import BadRecipe
from llmcomp.formats.base import Entry, Ref, integers_only
from llmcomp.schemes import INT8_STATIC, Scheme
from llmcomp.weights import CompressedWeight, QuantizedWeight


@dataclass(frozen=True)
class NativeLayout:
    """`formats.base.Layout`. `schemes`: of every module, in the order of the plan."""

    schemes: Mapping[str, Scheme]
    dense: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def tensors(self, ref: Ref, weight: CompressedWeight) -> dict[str, Tensor]:
        assert isinstance(weight, QuantizedWeight)  # the plan packs nothing else so
        looked_up = ref.role == "embeddings"
        return {f"{ref.name}.{part}": tensor for part, tensor in native.to_tensors(weight, looked_up).items()}

    def decode(self, ref: Ref, tensors: Mapping[str, Tensor]) -> Tensor:
        own = {name.removeprefix(f"{ref.name}."): tensor for name, tensor in tensors.items()}
        dense = native.from_tensors(own, self.schemes[ref.name]).dense()
        return dense.t().contiguous() if ref.transposed else dense

    def nbytes(self, ref: Ref, itemsize: int) -> int:
        rows, columns, scheme = ref.out_features, ref.in_features, self.schemes[ref.name]
        groups = scheme.groups(columns)
        zeros = 0 if scheme.symmetric else packing.words(rows, scheme.bits) * 4 * groups
        inputs = itemsize if scheme.activations == INT8_STATIC else 0
        packed = columns if scheme.bits == 8 else packing.words(columns, scheme.bits) * 4
        return rows * packed + rows * groups * itemsize + zeros + inputs + 2 * 8

    def config(self, model: nn.Module) -> dict[str, Any] | None:
        return native.describe(self.schemes) if self.schemes else None


def layout(entries: Sequence[Entry], model: nn.Module | None = None) -> NativeLayout:
    """The layout for any plan.

    Raises:
        BadRecipe: sparse weights that are not quantized, or inputs of an embedding, which are no numbers, to be
            rounded.
    """
    quantized = integers_only(entries, "llmcomp")
    for ref, scheme in quantized:
        if ref.role == "embeddings" and scheme.activations:
            raise BadRecipe(f"{ref.name} looks rows up, so it has no inputs to round; leave --activations out there.")
    return NativeLayout({ref.name: scheme for ref, scheme in quantized})
