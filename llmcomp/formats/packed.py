"""llmcomp's own layout (`llmcomp.native`): any mixture of kinds, embeddings, Conv1D and experts included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmcomp import native, native_kinds
from llmcomp.errors import BadRecipe
from llmcomp.formats.base import Entry, Ref, blank_integers
from llmcomp.kinds import Kind, Sparse, without_inputs
from llmcomp.packed import multiplies
from llmcomp.schemes import Scheme
from llmcomp.weights import CompressedWeight


@dataclass(frozen=True)
class NativeLayout:
    """`formats.base.Layout`. `kinds`: of every module as it is stored, in the order of the plan."""

    kinds: Mapping[str, Kind]
    dense: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def tensors(self, ref: Ref, weight: CompressedWeight) -> dict[str, Tensor]:
        held = native_kinds.to_tensors(weight, self.kinds[ref.name], looked_up=ref.role == "embeddings")
        return {f"{ref.name}.{part}": tensor for part, tensor in held.items()}

    def blank(self, ref: Ref, kind: Kind, dtype: torch.dtype) -> dict[str, Tensor]:
        stored = self.kinds[ref.name]
        if isinstance(stored, Scheme):
            return self.tensors(ref, blank_integers(ref, stored, dtype))
        held = native_kinds.blank(stored, ref.out_features, ref.in_features, dtype)
        return {f"{ref.name}.{part}": tensor for part, tensor in held.items()}

    def decode(self, ref: Ref, tensors: Mapping[str, Tensor]) -> Tensor:
        own = {name.removeprefix(f"{ref.name}."): tensor for name, tensor in tensors.items()}
        dense = native_kinds.from_tensors(own, without_inputs(self.kinds[ref.name])).dense()
        return dense.t().contiguous() if ref.transposed else dense

    def nbytes(self, ref: Ref, itemsize: int) -> int:
        return native_kinds.nbytes(self.kinds[ref.name], ref.out_features, ref.in_features, itemsize)

    def config(self, model: nn.Module) -> dict[str, Any] | None:
        return native.describe(self.kinds) if self.kinds else None


def layout(entries: Sequence[Entry], model: nn.Module | None = None) -> NativeLayout:
    """The layout for any plan.

    Raises:
        BadRecipe: linears of classes of their own; unstructured sparse weights that are not quantized; widths that a
            kind does not fit; embeddings that are no plain integers, or whose inputs, which are no numbers, are to be
            rounded.
    """
    kinds = {ref.name: _stored_as(kind) for ref, kind in entries}
    for ref, _ in entries:
        kind = kinds[ref.name]
        native_kinds.check_fits(kind, ref.out_features, ref.in_features, ref.name)
        if ref.role != "embeddings":
            module = None if model is None else model.get_submodule(ref.name)
            if isinstance(module, nn.Linear) and not multiplies(module):
                raise BadRecipe(
                    f"{ref.name} is a {type(module).__name__}, which computes in a way of its own, so that nothing "
                    "packed can stand in for it; take --format dense."
                )
            continue
        if not isinstance(kind, Scheme):
            raise BadRecipe(f"{ref.name} looks rows up, for which only integers are packed; take --format dense.")
        if kind.activations:
            raise BadRecipe(f"{ref.name} looks rows up, so it has no inputs to round; leave --activations out there.")
    return NativeLayout(kinds)


def _stored_as(kind: Kind) -> Kind:
    """Integers of which some were removed anywhere lie as integers: nothing packs where."""
    if isinstance(kind, Sparse) and kind.values is not None and kind.pattern.group is None:
        return kind.values
    return kind
