"""W8A8: inputs rounded to 8 bits as `llmcomp.activations` says, times integers of 8 bits, one scale a row.

Where the machine multiplies int8 (VNNI, AMX) many rows are products of integers; elsewhere `torch._int_mm` is slower
than float32 by far (the table in `llmcomp.kernels`), and the rounded inputs are multiplied as floating numbers, which
hold such integers exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from llmcomp import native
from llmcomp.activations import integers_of
from llmcomp.kernels.int8 import VECTOR, by_tiles, packed, readable
from llmcomp.kernels.tiles import Grid, few_rows, product_dtype
from llmcomp.schemes import Scheme


@functools.cache
def multiplies_int8() -> bool:
    """Whether this CPU has units for products of int8."""
    return bool(torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())


def fits(scheme: Scheme, rows: int, columns: int, device: str) -> bool:
    return device == "cpu" and scheme.activations is not None and columns % VECTOR == 0


def hold(stored: Tensor, grid: Grid) -> dict[str, Tensor]:
    """`integers` int8 [rows, columns], and ones bf16 [rows] for the operator."""
    integers = readable(native.integers(stored, 8, grid.columns))
    return {"integers": integers, "ones": torch.ones(len(integers), dtype=torch.bfloat16)}


def product(x: Tensor, held: Mapping[str, Tensor], grid: Grid) -> Tensor:
    rounded, input_scales = integers_of(x, grid.input_scale)
    rows, integers = rounded.reshape(-1, x.shape[-1]), held["integers"]
    if multiplies_int8():
        out = torch._int_mm(rows.to(torch.int8), integers.t()).float()
    elif len(rows) <= few_rows(8):
        out = packed(rows, integers, held["ones"]).float()
    else:
        out = by_tiles(rows.to(product_dtype()), integers).float()
    out.mul_(grid.scale.view(-1).float())
    return (out.view(*x.shape[:-1], len(grid.scale)) * input_scales.float()).to(x.dtype)


def values(held: Mapping[str, Tensor], grid: Grid) -> Tensor:
    return held["integers"]
