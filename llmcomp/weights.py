"""What a method returns for one linear: a weight in compressed form that can show itself dense.

A kind of compressed weight is a frozen dataclass with `dense()` and `nbytes`; formats look at the kind and
choose how to name and pack its tensors. Today there is one kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.schemes import Scheme

INPUT_SCALE = "input_scale"  # of a module that rounds its inputs by a fixed scale, as compressed-tensors calls it


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers on a grid: `dense = (values - zero_point) * scale`.

    Attributes:
        values: int8 [out, in], each in [scheme.qmin, scheme.qmax].
        scale: [out, groups], in the dtype it is stored in (and the dtype of the dense weight).
        zero_point: int8 [out, groups], or None when the scheme is symmetric.
        scheme: bits, group size, symmetry.
        input_scale: [1], in the scale's dtype, by which the linear rounds its inputs, where its scheme says that this
            is known beforehand; methods leave it out.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme
    input_scale: Tensor | None = None

    def dense(self) -> Tensor:
        """The weight [out, in] as a reader decodes it, bit for bit: arithmetic in the scale's own dtype."""
        return dequantize(self.values, self.scale, self.zero_point)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the packed integers, scales and zero points, without container overhead."""
        rows, columns = self.values.shape
        packed = rows * _packed_words(columns, self.scheme.bits) * 4
        zeros = 0
        if self.zero_point is not None:
            zeros = _packed_words(rows, self.scheme.bits) * self.scale.shape[1] * 4
        floats = self.scale.numel() + (0 if self.input_scale is None else self.input_scale.numel())
        return packed + floats * self.scale.element_size() + zeros


CompressedWeight = QuantizedWeight


def dequantize(values: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Decode integers [out, in] with scale and zero_point [out, groups]; result in scale's dtype."""
    rows, columns = values.shape
    grouped = values.reshape(rows, scale.shape[1], columns // scale.shape[1]).to(scale.dtype)
    if zero_point is not None:
        grouped = grouped - zero_point.to(scale.dtype).unsqueeze(-1)
    return (grouped * scale.unsqueeze(-1)).reshape(rows, columns)


def _packed_words(count: int, bits: int) -> int:
    """32-bit words that `count` densely packed integers take."""
    return -(-count * bits // 32)
