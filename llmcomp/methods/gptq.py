"""GPTQ: each column's rounding error is compensated in the columns that follow (arXiv:2210.17323).

What this one does beyond the paper, each chosen on calibration text (evals/RESULTS.md):

* columns in the order of falling activation (act-order) with *static* groups: scales are found before the
  sweep, so groups stay contiguous in the file and no reader needs a permutation;
* the sweep reads the Cholesky factor of H itself; H is never inverted (`_solve`);
* scales are searched by weighted error, the weight of column k being R_kk², exactly what its error will cost
  after compensation (`_grid`);
* damping grows only as far as the factorization needs; a matrix that cannot be factorized falls back on
  `rtn-clip`, and the report counts it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.errors import BadRecipe
from llmcomp.methods._grid import SEARCH, Grid, search_grid
from llmcomp.methods._solve import Factor, factorize, row_quadratics, sweep
from llmcomp.methods.rtn import rtn_clip
from llmcomp.methods.solution import Solution, dead_columns
from llmcomp.schemes import Scheme
from llmcomp.weights import QuantizedWeight

# Elements of a chunk of rows: what the sweep holds beside the factor is about ten bytes for each.
_CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class GPTQConfig:
    """Settings of GPTQ.

    Attributes:
        damping: first share of the mean diagonal to add to H (the paper's 1%).
        act_order: quantize columns by falling activation; off keeps them as they stand.
    """

    damping: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise BadRecipe(f"GPTQ's damping must lie in (0, 1], got {self.damping}.")


def gptq(
    weight: Tensor, stats: InputStats, scheme: Scheme, dtype: torch.dtype, config: GPTQConfig = GPTQConfig()
) -> Solution:
    """Quantize weight [rows, in] with second-order compensation.

    Args:
        weight: floating [rows, in].
        stats: of its input. The Gram matrix is factorized in place: `stats.gram` is None afterwards and
            `stats.factor` serves the next weight that shares the input.
        scheme: its group size divides `in`.
        dtype: of the stored scales.
        config: settings.
    """
    factor = _factor(stats, config)
    if factor is None:
        solved = rtn_clip(weight, stats, scheme, dtype)
        why = "the Gram matrix does not factor even with full damping: rounded to nearest with searched clipping"
        return Solution(solved.weight, fallback=why, dead_columns=solved.dead_columns)
    rows, columns = weight.shape
    importance = torch.empty_like(factor.pivots)
    importance[factor.order] = factor.pivots
    grid = search_grid(weight, scheme, dtype, importance, *SEARCH[scheme.bits])
    values = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    error = torch.empty(rows, dtype=torch.float64, device=weight.device)
    norm = torch.empty_like(error)
    step = max(64, _CHUNK_WEIGHTS // columns)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        values[part], error[part], norm[part] = _solve_rows(weight[part], factor, grid.rows(part))
    solved_weight = QuantizedWeight(values, grid.scale, grid.zero_point, scheme)
    return Solution(solved_weight, error, norm, factor.damping, None, dead_columns(stats))


def _factor(stats: InputStats, config: GPTQConfig) -> Factor | None:
    """The factor of these statistics, made on first use."""
    if stats.factor is None and stats.gram is not None:
        gram, stats.gram = stats.gram, None
        order = stats.diagonal.argsort(descending=True, stable=True) if config.act_order else None
        stats.factor = factorize(gram, config.damping, order)
    return stats.factor


def _solve_rows(weight: Tensor, factor: Factor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """int8 values [rows, in], float64 e'He and w'Hw [rows], for some rows of the weight."""
    order, columns = factor.order, weight.shape[1]
    ordered = weight.float().t()[order]  # [in, rows]
    group = columns // grid.scale.shape[1]
    group_of = order.div(group, rounding_mode="floor").tolist()
    scales = grid.scale.float().t().contiguous()  # [groups, rows]
    inverses = scales.reciprocal()
    zeros = None if grid.zero_point is None else grid.zero_point.float().t().contiguous()
    low, high, exact = grid.scheme.qmin, grid.scheme.qmax, grid.scale.dtype
    chosen = torch.empty(ordered.shape, dtype=torch.int8, device=weight.device)

    def quantize_column(k: int, target: Tensor) -> Tensor:
        g = group_of[k]
        target.mul_(inverses[g])
        if zeros is not None:
            target.add_(zeros[g])
        target.round_().clamp_(low, high)
        chosen[k].copy_(target)
        if zeros is not None:
            target.sub_(zeros[g])
        target.mul_(scales[g])
        # A reader multiplies in the scale's own dtype; its rounding is part of the error.
        return target if exact is torch.float32 else target.to(exact).float()

    error = sweep(ordered, factor, quantize_column)
    values = torch.empty_like(chosen)
    values[order] = chosen
    del chosen
    return values.t(), row_quadratics(factor, error), row_quadratics(factor, ordered)
