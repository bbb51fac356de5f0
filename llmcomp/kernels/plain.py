"""Any weight on any device: kept as it lies in the file and decoded a tile at a time at each product.

For shapes and schemes that no operator takes, such as rows of 33 weights, or groups of 8-bit integers. Correct
everywhere, and as slow as decoding the whole weight for each token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcomp import native, packing
from llmcomp.activations import quantized
from llmcomp.kernels.tiles import Grid, product_dtype, tile_rows
from llmcomp.schemes import Scheme
from llmcomp.weights import dequantize


def fits(scheme: Scheme, rows: int, columns: int, device: str) -> bool:
    return True


def hold(stored: Tensor, grid: Grid) -> dict[str, Tensor]:
    """`rows`: the integers as the file holds them, int32 [rows, words] or int8 [rows, columns], but never in blocks, of
    which no rows could be taken."""
    if stored.dtype == torch.uint8:
        stored = packing.pack(packing.unpack_blocks(stored), grid.scheme.bits)
    return {"rows": stored}


def product(x: Tensor, held: Mapping[str, Tensor], grid: Grid) -> Tensor:
    if grid.scheme.activations is not None:
        x = quantized(x, grid.input_scale)
    dtype = product_dtype() if x.device.type == "cpu" else x.dtype
    rows, step, tiles = x.reshape(-1, grid.columns).to(dtype), tile_rows(grid.columns, 1), []
    for start in range(0, len(grid.scale), step):
        part = slice(start, start + step)
        zero = None if grid.zero_point is None else grid.zero_point[part]
        integers = native.integers(held["rows"][part], grid.scheme.bits, grid.columns)
        tiles.append(F.linear(rows, dequantize(integers, grid.scale[part].to(dtype), zero)))
    return torch.cat(tiles, -1).to(x.dtype).view(*x.shape[:-1], len(grid.scale))


def values(held: Mapping[str, Tensor], grid: Grid) -> Tensor:
    return native.integers(held["rows"], grid.scheme.bits, grid.columns)
