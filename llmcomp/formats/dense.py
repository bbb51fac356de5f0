"""Plain safetensors in the source's dtype: weights on the quantization grid, but as large as before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmcomp.errors import BadRecipe
from llmcomp.formats.base import Entry, Ref, blank_dense, dense_tensors
from llmcomp.kinds import Kind, integers_of
from llmcomp.weights import CompressedWeight


@dataclass(frozen=True)
class DenseLayout:
    """`formats.base.Layout` that packs nothing, because that is what was asked for (so `dense` is empty)."""

    dense: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def tensors(self, ref: Ref, weight: CompressedWeight) -> dict[str, Tensor]:
        return dense_tensors(ref, weight)

    def blank(self, ref: Ref, kind: Kind, dtype: torch.dtype) -> dict[str, Tensor]:
        return blank_dense(ref, dtype)

    def decode(self, ref: Ref, tensors: Mapping[str, Tensor]) -> Tensor:
        # Not mapped: where a weight begins in memory may decide how products with few tokens are rounded.
        return tensors[f"{ref.name}.weight"].clone()

    def nbytes(self, ref: Ref, itemsize: int) -> int:
        return ref.out_features * ref.in_features * itemsize

    def config(self, model: nn.Module) -> dict[str, Any] | None:
        return None


def layout(entries: Sequence[Entry], model: nn.Module | None = None) -> DenseLayout:
    """The layout for any plan of weights alone.

    Raises:
        BadRecipe: activations are to be rounded, which a dense checkpoint cannot say.
    """
    if any((scheme := integers_of(kind)) is not None and scheme.activations for _, kind in entries):
        raise BadRecipe("--format dense cannot say that activations are rounded; leave one of the two out.")
    return DenseLayout()
