"""What a method returns for one linear: a weight in compressed form that can show itself dense.

A kind of compressed weight is a frozen dataclass with `dense()` and `nbytes`; formats look at the kind and
choose how to name and pack its tensors. A mask is bool [out, in], True where a weight is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmcomp.errors import RunError
from llmcomp.patterns import Pattern, check_mask
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
        pattern: by which weights were removed as well, or None.
        mask: bool [out, in], True where kept, where there is a pattern. A removed weight is exactly zero: its integer
            is the zero point. A kept one may be rounded to zero, too.

    Raises:
        RunError: a mask that is not exactly its pattern's, or a removed weight that is not zero.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme
    input_scale: Tensor | None = None
    pattern: Pattern | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.pattern is None) != (self.mask is None):
            raise RunError("A mask comes with its pattern, and a pattern with its mask.")
        if self.pattern is not None and self.mask is not None:
            check_mask(self.pattern, self.mask)
            if bool((_from_zero(self.values, self.zero_point) & ~self.mask).any()):
                raise RunError("A weight that its mask removes is not zero.")

    def dense(self) -> Tensor:
        """The weight [out, in] as a reader decodes it, bit for bit: arithmetic in the scale's own dtype."""
        return dequantize(self.values, self.scale, self.zero_point)

    def by_rows(self, function: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        """The weight whose tensors, of a line for each row, are the function's of this one's."""
        zero = None if self.zero_point is None else function(self.zero_point)
        mask = None if self.mask is None else function(self.mask)
        return replace(self, values=function(self.values), scale=function(self.scale), zero_point=zero, mask=mask)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Rows start..stop."""
        return self.by_rows(lambda tensor: tensor[start:stop])

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the packed integers, scales and zero points, without container overhead.

        Of N:M only the kept integers count, and where in their group they stand.
        """
        rows, columns = self.values.shape
        stored = columns
        if self.pattern is not None and self.pattern.group is not None:
            stored = self.pattern.kept_in_row(columns)
        packed = rows * _packed_words(stored, self.scheme.bits) * 4 + _index_bytes(self.pattern, rows, columns)
        zeros = 0
        if self.zero_point is not None:
            zeros = _packed_words(rows, self.scheme.bits) * self.scale.shape[1] * 4
        floats = self.scale.numel() + (0 if self.input_scale is None else self.input_scale.numel())
        return packed + floats * self.scale.element_size() + zeros


@dataclass(frozen=True)
class SparseWeight:
    """Floating weights of which some are exactly zero.

    Attributes:
        values: [out, in], in the dtype it is stored in; zero where removed. A kept weight may be zero, too.
        mask: bool [out, in], True where kept.
        pattern: which masks can be; N:M is exact in every row.

    Raises:
        RunError: a mask that is not exactly its pattern's, or a removed weight that is not zero.
    """

    values: Tensor
    mask: Tensor
    pattern: Pattern

    def __post_init__(self) -> None:
        check_mask(self.pattern, self.mask)
        if bool(self.values.bool().gt(self.mask).any()):  # the two read as 0 and 1
            raise RunError("A weight that its mask removes is not zero.")

    def dense(self) -> Tensor:
        """The weight [out, in] as it is stored."""
        return self.values

    def by_rows(self, function: Callable[[Tensor], Tensor]) -> SparseWeight:
        """The weight whose tensors are the function's of this one's."""
        return replace(self, values=function(self.values), mask=function(self.mask))

    def rows(self, start: int, stop: int) -> SparseWeight:
        """Rows start..stop."""
        return self.by_rows(lambda tensor: tensor[start:stop])

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the kept values and of where in their group they stand; unstructured, of the dense weight, since
        no format packs it."""
        rows, columns = self.values.shape
        stored = columns if self.pattern.group is None else self.pattern.kept_in_row(columns)
        return rows * stored * self.values.element_size() + _index_bytes(self.pattern, rows, columns)



def _from_zero(values: Tensor, zero_point: Tensor | None) -> Tensor:
    """bool [out, in]: which integers stand for something else than zero."""
    if zero_point is None:
        return values != 0
    rows, columns = values.shape
    return (values.reshape(rows, zero_point.shape[1], -1) != zero_point.unsqueeze(-1)).reshape(rows, columns)


def dequantize(values: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Decode integers [out, in] with scale and zero_point [out, groups]; result in scale's dtype."""
    rows, columns = values.shape
    grouped = values.reshape(rows, scale.shape[1], columns // scale.shape[1]).to(scale.dtype)
    if zero_point is not None:
        grouped = grouped - zero_point.to(scale.dtype).unsqueeze(-1)
    return (grouped * scale.unsqueeze(-1)).reshape(rows, columns)


def _index_bytes(pattern: Pattern | None, rows: int, columns: int) -> int:
    """Bytes that say where in their groups the kept weights stand; each row fills whole bytes."""
    if pattern is None or pattern.group is None:
        return 0
    return rows * -(-pattern.kept_in_row(columns) * pattern.index_bits // 8)


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

    def by_rows(self, function: Callable[[Tensor], Tensor]) -> LowRankWeight:
        """The weight whose tensors, of a line for each row, are the function's of this one's; rows share `right`."""
        left = function(self.left) if isinstance(self.left, Tensor) else self.left.by_rows(function)
        return replace(self, left=left, base=None if self.base is None else self.base.by_rows(function))

    def rows(self, start: int, stop: int) -> LowRankWeight:
        """Rows start..stop."""
        return self.by_rows(lambda tensor: tensor[start:stop])

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


CompressedWeight = QuantizedWeight | SparseWeight | LowRankWeight


def _decoded(weight: Tensor | QuantizedWeight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dense()
