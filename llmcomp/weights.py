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


_ROWS = 1024  # of a low-rank weight that are multiplied at a time


@dataclass(frozen=True)
class LowRankWeight:
    """Two thin factors instead of one matrix: `dense = left @ right`, on top of `base` where there is one.

    Attributes:
        left: [out, rank], floating, or quantized (then decoded first, as it decodes itself).
        right: [rank, in], likewise and of the same dtype.
        base: [out, in], what the factors correct: dense = base + left @ right.
    """

    left: Tensor | QuantizedWeight
    right: Tensor | QuantizedWeight
    base: QuantizedWeight | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """left [out, rank] and right [rank, in] as a reader decodes them, in the weight's own dtype."""
        return _decoded(self.left), _decoded(self.right)

    def dense(self) -> Tensor:
        """The weight [out, in] in the factors' dtype: decoded factors (and base) are widened to float64, multiplied
        and added there, and rounded once.

        Products of two 16-bit numbers are exact in float64, so whatever order a machine sums them in, what is rounded
        differs by less than rank * 2^-53 of its terms: a 16-bit result is the same bit for bit everywhere but for odds
        of one entry in 10^12; of a float32 weight an entry in 10^7 may differ in its last bit.
        """
        left, right = self.factors()
        dense = torch.empty(self.shape, dtype=left.dtype, device=left.device)
        wide, base = right.double(), None if self.base is None else self.base.dense()
        for start in range(0, left.shape[0], _ROWS):
            part = slice(start, start + _ROWS)
            product = left[part].double() @ wide
            dense[part] = product if base is None else product.add_(base[part])
        return dense

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.left.shape[0], self.right.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weight and of both decoded factors."""
        return self.left.dtype if isinstance(self.left, Tensor) else self.left.scale.dtype

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors and the base, without container overhead."""
        return self.left.nbytes + self.right.nbytes + (0 if self.base is None else self.base.nbytes)


def _decoded(weight: Tensor | QuantizedWeight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dense()
