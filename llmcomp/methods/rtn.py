"""Round to nearest, on the full range (`rtn`) or on a range searched by activation-weighted error (`rtn-clip`).

`rtn` needs no data and is the floor that every other method must beat. `rtn-clip` searches each group's
scale by sum_k E[x_k²] (w_k - q_k)², the diagonal of GPTQ's objective; it is also what GPTQ falls back on where
a Gram matrix does not factor. The search follows the clipping of OmniQuant and AWQ (arXiv:2306.00978,
section 3.2) with what `_grid` adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.methods._grid import SEARCH, round_to, search_grid
from llmcomp.methods.solution import Solution, dead_columns, row_losses
from llmcomp.schemes import Scheme
from llmcomp.weights import QuantizedWeight


@dataclass(frozen=True)
class RTNConfig:
    """Rounding to nearest has nothing to set."""


def rtn(
    weight: Tensor, stats: InputStats | None, scheme: Scheme, dtype: torch.dtype, config: RTNConfig = RTNConfig()
) -> Solution:
    """Round weight [rows, in] to the nearest points of the grid that covers its full range.

    Statistics, where there are any, only measure the error.
    """
    grid = search_grid(weight, scheme, dtype)
    solved = QuantizedWeight(round_to(weight, grid), grid.scale, grid.zero_point, scheme)
    if stats is None or stats.gram is None:
        return Solution(solved)
    return Solution(solved, *row_losses(weight, solved, stats.gram), dead_columns=dead_columns(stats))


def rtn_clip(
    weight: Tensor, stats: InputStats, scheme: Scheme, dtype: torch.dtype, config: RTNConfig = RTNConfig()
) -> Solution:
    """Round weight [rows, in] to the nearest points of the grid with the least activation-weighted error."""
    grid = search_grid(weight, scheme, dtype, stats.diagonal, *SEARCH[scheme.bits])
    solved = QuantizedWeight(round_to(weight, grid), grid.scale, grid.zero_point, scheme)
    if stats.gram is None:
        return Solution(solved, dead_columns=dead_columns(stats))
    return Solution(solved, *row_losses(weight, solved, stats.gram), dead_columns=dead_columns(stats))
