"""GPTQ: each column's rounding error is compensated in the columns that follow (arXiv:2210.17323).

What this one does beyond the paper:

* columns in the order of falling activation (act-order) with *static* groups: scales are found before the
  sweep, so groups stay contiguous in the file and no reader needs a permutation;
* the sweep reads the Cholesky factor of H itself; H is never inverted (`_solve`);
* scales are searched by weighted error, the weight of column k being R_kk², exactly what its error will cost
  after compensation (`_grid`);
* at few bits the scales are fitted anew to the integers, in the norm of H, and the sweep runs once more;
* damping grows only as far as the factorization needs; a matrix that cannot be factorized falls back on
  `rtn-clip`, and the report counts it;
* weights can be removed in the same sweep (SparseGPT's section 3.5): a removed column is set to zero, a kept one
  rounded, and what either costs is made up for. `_swept` chooses what is removed, or a mask is held. Scales are
  searched for the kept weights as a first sweep that only prunes leaves them, since pruning moves them much; the
  mask is chosen again while quantizing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.errors import BadRecipe
from llmcomp.matmul import fast_matmul
from llmcomp.methods._grid import SEARCH, Grid, empty_grid, search_grid, stored_scale
from llmcomp.methods._solve import Factor, in_order, sampled_losses, shared_factor, sweep
from llmcomp.methods._swept import SweptMask, chunks, order_for, prune
from llmcomp.methods.rtn import rtn_clip
from llmcomp.methods.solution import Solution, dead_columns
from llmcomp.methods.wanda import wanda
from llmcomp.patterns import Pattern
from llmcomp.schemes import Scheme
from llmcomp.weights import QuantizedWeight, SparseWeight

# Elements of a chunk of rows: what the sweep holds beside the factor is about ten bytes for each.
_CHUNK_WEIGHTS = 1 << 22

# Bits → how often scales are fitted anew to the chosen integers (between two fits the sweep runs again).
REFITS = {2: 2, 3: 2, 4: 0, 8: 0}


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
    weight: Tensor, stats: InputStats, scheme: Scheme, dtype: torch.dtype, config: GPTQConfig = GPTQConfig(),
    pattern: Pattern | None = None, mask: Tensor | None = None,
) -> Solution:
    """Quantize weight [rows, in] with second-order compensation.

    Args:
        weight: floating [rows, in].
        stats: of its input. The Gram matrix is factorized in place: `stats.gram` is None afterwards and
            `stats.factor` serves the next weight that shares the input.
        scheme: its group size divides `in`.
        dtype: of the stored scales.
        config: settings.
        pattern: of weights that are removed in the same sweep; its groups divide `in`.
        mask: bool [rows, in] of an earlier step, with its pattern; what it has removed stays removed.

    Raises:
        BadRecipe: a width that the pattern does not divide, or a mask that has removed more than the pattern does.
    """
    if pattern is None and mask is not None:
        raise BadRecipe("GPTQ under a mask wants the mask's pattern with it.")
    parts = _parts(weight, pattern, mask)
    factor = shared_factor(stats, config.damping, *order_for(pattern, mask, config.act_order))
    if factor is None:
        return _fallback(weight, stats, scheme, dtype, pattern, mask)
    importance = torch.empty_like(factor.pivots)
    importance[factor.order] = factor.pivots
    back = factor.order.argsort()
    grid = _searched(weight, scheme, dtype, importance) if pattern is None else empty_grid(weight, scheme, dtype)
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    kept = None if pattern is None else torch.empty_like(values, dtype=torch.bool)
    error = torch.empty(weight.shape[0], dtype=torch.float64, device=weight.device)
    norm = torch.empty_like(error)
    for part, count in parts:
        ordered, swept = in_order(weight[part], factor), None
        if pattern is not None:
            held = None if mask is None else mask[part]
            pruned = prune(ordered, factor, SweptMask(pattern, factor, ordered, held, count))[0][back]
            grid.fill(part, _searched(pruned.t(), scheme, dtype, importance))
            swept = SweptMask(pattern, factor, ordered, held, count)
            del pruned
        values[part], grid.scale[part], error[part], norm[part] = _solve_rows(
            ordered, factor, grid.rows(part), REFITS[scheme.bits], swept
        )
        if kept is not None and swept is not None:
            kept[part] = swept.kept(back)
    solved = QuantizedWeight(values, grid.scale, grid.zero_point, scheme, pattern=pattern, mask=kept)
    return Solution(solved, error, norm, factor.damping, None, dead_columns(stats))


def _parts(weight: Tensor, pattern: Pattern | None, mask: Tensor | None) -> list[tuple[slice, int]]:
    """Chunks of rows, and how many weights an unstructured pattern still removes in each."""
    rows, columns = weight.shape
    step = max(64, _CHUNK_WEIGHTS // columns)
    if pattern is not None:
        return chunks(pattern, weight.shape, mask, step)
    return [(slice(start, min(start + step, rows)), 0) for start in range(0, rows, step)]


def _searched(weight: Tensor, scheme: Scheme, dtype: torch.dtype, importance: Tensor) -> Grid:
    """The grid of least weighted error; weights of zero are on every grid, so removed ones have no say."""
    return search_grid(weight, scheme, dtype, importance, *SEARCH[scheme.bits])


def _fallback(
    weight: Tensor, stats: InputStats, scheme: Scheme, dtype: torch.dtype, pattern: Pattern | None, mask: Tensor | None
) -> Solution:
    """Searched clipping, of what Wanda leaves where a pattern is asked for."""
    why = "the Gram matrix does not factor even with full damping: rounded to nearest with searched clipping"
    if pattern is None:
        solved = rtn_clip(weight, stats, scheme, dtype)
        return Solution(solved.weight, fallback=why, dead_columns=solved.dead_columns)
    masked = wanda(weight, stats, pattern, weight.dtype, mask=mask).weight
    assert isinstance(masked, SparseWeight)  # what Wanda gives
    solved = rtn_clip(masked.values, stats, scheme, dtype)
    assert isinstance(solved.weight, QuantizedWeight)  # what rounding gives
    held = replace(solved.weight, pattern=pattern, mask=masked.mask)
    return Solution(held, fallback=f"{why}, under Wanda's mask", dead_columns=solved.dead_columns)


def _solve_rows(
    ordered: Tensor, factor: Factor, grid: Grid, refits: int, swept: SweptMask | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int8 values [rows, in], scale [rows, groups], float64 e'He and w'Hw [rows], for some rows of the weight.

    Args:
        ordered: float32 [in, rows], their columns in the order of quantization.
        swept: what is removed, chosen in the first sweep and held in those that follow; or None.
    """
    group = ordered.shape[0] // grid.scale.shape[1]
    group_of = factor.order.div(group, rounding_mode="floor")
    scale, chosen, error = grid.scale, *_sweep_rows(ordered, factor, group_of, grid, swept)
    for last in range(refits, 0, -1):
        scale = _refit(ordered, chosen, error, factor, group_of, replace(grid, scale=scale))
        grid = replace(grid, scale=scale)
        if last > 1:
            chosen, error = _sweep_rows(ordered, factor, group_of, grid, swept)
    if refits:
        _decoded_error_(ordered, chosen, error, group_of, grid)
    values = torch.empty_like(chosen)
    values[factor.order] = chosen
    del chosen
    return values.t(), scale, *sampled_losses(factor, error, ordered)


def _sweep_rows(
    ordered: Tensor, factor: Factor, group_of: Tensor, grid: Grid, swept: SweptMask | None
) -> tuple[Tensor, Tensor]:
    """int8 values and float32 errors, both [in, rows] in the order of quantization, on a given grid."""
    exact = grid.scale.dtype
    stored = grid.scale.t().contiguous().unbind()  # a [rows] for each group
    inverses = grid.scale.float().reciprocal().t().contiguous().unbind()
    zeros = None if grid.zero_point is None else grid.zero_point.float().t().contiguous().unbind()
    low, high = grid.scheme.qmin, grid.scheme.qmax
    groups = group_of.tolist()
    removed = None if swept is None else swept.removed
    chosen = torch.empty(ordered.shape, dtype=torch.int8, device=ordered.device)
    decoded = torch.empty(ordered.shape[1], dtype=exact, device=ordered.device)

    def quantize_column(k: int, target: Tensor) -> Tensor:
        g = groups[k]
        target.mul_(inverses[g])
        if zeros is not None:
            target.add_(zeros[g])
        target.round_().clamp_(low, high)
        if removed is not None and zeros is None:
            target.masked_fill_(removed[k], 0.0)
        elif removed is not None and zeros is not None:
            torch.where(removed[k], zeros[g], target, out=target)
        chosen[k].copy_(target)
        if zeros is not None:
            target.sub_(zeros[g])
        # A reader multiplies in the scale's own dtype; its rounding is part of the error.
        return decoded.copy_(target).mul_(stored[g])

    error = sweep(ordered, factor, quantize_column, None if swept is None else swept.ahead)
    if swept is not None:
        swept.settle()
    return chosen, error


def _refit(
    ordered: Tensor, chosen: Tensor, error: Tensor, factor: Factor, group_of: Tensor, grid: Grid
) -> Tensor:
    """Scales [rows, groups] that fit the chosen integers best: least squares in the norm of H, group after group.

    With w - sum_g s_g q_g for the error and R' q_g = p_g, each s_g moves by <p_g, R' error> / <p_g, p_g>.
    """
    scale = grid.scale.float()
    with fast_matmul():
        residual = error.t() @ factor.upper  # [rows, in]
        for g in range(scale.shape[1]):
            members = (group_of == g).nonzero().flatten()
            points = chosen[members].float()
            if grid.zero_point is not None:
                points -= grid.zero_point[:, g].float()
            direction = points.t() @ factor.upper[members]
            norm = direction.square().sum(1)
            step = torch.where(norm > 0, (direction * residual).sum(1) / norm, 0.0)
            # A scale must not vanish or change sides: its integers were chosen for this one.
            moved = scale[:, g] + step
            step = torch.where(moved * scale[:, g] > 0, step, 0.0)
            scale[:, g] += step
            residual -= direction.mul_(step.unsqueeze(1))
    return stored_scale(scale, grid.scale.dtype)


def _decoded_error_(ordered: Tensor, chosen: Tensor, error: Tensor, group_of: Tensor, grid: Grid) -> None:
    """`error <- W - decoded`, column by column, as a reader decodes."""
    scales = grid.scale.t()
    zeros = None if grid.zero_point is None else grid.zero_point.t().to(scales.dtype)
    for k, g in enumerate(group_of.tolist()):
        points = chosen[k].to(scales.dtype)
        if zeros is not None:
            points = points - zeros[g]
        torch.sub(ordered[k], (points * scales[g]).float(), out=error[k])
