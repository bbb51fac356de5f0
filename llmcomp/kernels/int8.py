"""Symmetric integers of 8 bits, one scale a row: torch's operator for few rows, tiles for many."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmcomp import native
from llmcomp.kernels.tiles import Grid, few_rows, product_dtype, tile_rows
from llmcomp.schemes import Scheme

# `aten::_weight_int8pack_mm` reads whole vectors: where they do not divide a row, two rows of inputs and more give
# wrong numbers, or a segmentation fault (torch 2.13, columns 12, 20 and 33).
VECTOR = 32
# It reads inputs only from multiples of so many bytes (AVX2: 16, AVX512: 32), and with AVX512 the integers, too;
# anywhere else it faults. Files promise 8.
_INPUTS, _INTEGERS = 32, 16


def fits(scheme: Scheme, rows: int, columns: int, device: str) -> bool:
    alone = scheme.bits == 8 and scheme.symmetric and scheme.groups(columns) == 1 and scheme.activations is None
    return device == "cpu" and alone and columns % VECTOR == 0


def hold(stored: Tensor, grid: Grid) -> dict[str, Tensor]:
    """`integers` int8 [rows, columns], and the operator's `factors` bf16 [rows]."""
    integers = readable(native.integers(stored, 8, grid.columns))
    return {"integers": integers, "factors": grid.scale.view(-1).to(torch.bfloat16)}


def product(x: Tensor, held: Mapping[str, Tensor], grid: Grid) -> Tensor:
    rows, integers = x.reshape(-1, x.shape[-1]), held["integers"]
    if len(rows) <= few_rows(8):
        out = packed(rows, integers, held["factors"])
    else:
        out = by_tiles(rows.to(product_dtype()), integers).mul_(grid.scale.view(-1))
    return out.to(x.dtype).view(*x.shape[:-1], len(grid.scale))


def values(held: Mapping[str, Tensor], grid: Grid) -> Tensor:
    return held["integers"]


def readable(integers: Tensor) -> Tensor:
    """Integers [out, columns] from where `packed` can read them, on most machines where they already lie."""
    return integers if torch.backends.cpu.get_cpu_capability() == "AVX2" else _aligned(integers, _INTEGERS)


def packed(x: Tensor, integers: Tensor, factors: Tensor) -> Tensor:
    """x [rows, columns] times the transpose of factors bf16 [out] times `readable` integers, in bf16."""
    rows = _aligned(x.to(torch.bfloat16).contiguous(), _INPUTS)
    product: Tensor = torch.ops.aten._weight_int8pack_mm(rows, integers, factors)
    return product


def _aligned(tensor: Tensor, step: int) -> Tensor:
    return tensor if tensor.data_ptr() % step == 0 else tensor.clone()


def by_tiles(x: Tensor, integers: Tensor) -> Tensor:
    """x [rows, columns] times the transpose of integers [out, columns], in x's dtype."""
    out = torch.empty(len(x), len(integers), dtype=x.dtype)
    step = min(tile_rows(x.shape[1], 1), len(integers))
    decoded = torch.empty(step, x.shape[1], dtype=x.dtype)
    for start in range(0, len(integers), step):
        tile = integers[start : start + step]
        part = decoded[: len(tile)].copy_(tile)
        out[:, start : start + step] = x @ part.t()
    return out
