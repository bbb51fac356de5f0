"""Many rows: weights decoded a few columns of the output at a time, then multiplied as dense ones.

A tile stays in the cache while it is decoded and multiplied, and what decoding leaves is the machine's own
dense product. All buffers are made once a call: faulting in fresh pages for each tile would cost as much as decoding.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from llmcomp.matmul import multiplies
from llmcomp.schemes import Scheme


class Grid(NamedTuple):
    """What every kernel keeps of a `QuantizedWeight` as it is, all but the integers; fields as there."""

    scheme: Scheme
    columns: int
    scale: Tensor
    zero_point: Tensor | None
    input_scale: Tensor | None


_TILE = 1 << 20  # weights: 2 or 4 MB decoded


@functools.cache
def product_dtype() -> torch.dtype:
    """What this CPU multiplies fastest: bf16 where it has units for it, else float32."""
    return torch.bfloat16 if multiplies(torch.bfloat16) else torch.float32


@functools.cache
def few_rows(bits: int) -> int:
    """Up to how many rows torch's packed operators beat tiles of 8- or 4-bit integers (see the table in
    `llmcomp.kernels`): nibbles take longer to decode, so their tiles win later.

    Where bf16 products are fast, the packed operators, which multiply row by row, fall behind INT8's tiles later:
    decoding a tile costs the same there, and the operators are twice as fast with AVX512. INT4's number has not been
    measured apart there.
    """
    if product_dtype() == torch.bfloat16:
        return 32
    return 20 if bits == 8 else 48


def tile_rows(columns: int, step: int) -> int:
    """Rows of the weight in a tile, a multiple of `step`."""
    return max(1, _TILE // columns // step) * step
