"""Masks without a change of the weights that stay: by magnitude, or by magnitude times the input's norm.

Wanda (Sun et al. 2023, arXiv:2306.11695) scores a weight by |w_ij| · ||x_j||, the square root of what removing it
alone costs, and lets only the weights of one output row compete: the paper finds that better than a ranking of the
whole matrix, which magnitude pruning (`magnitude`, its baseline and everyone's floor) uses. N:M compares within groups
of a row in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.methods._masks import (
    check_groups,
    check_removed,
    grouped_mask,
    is_final,
    matrix_mask,
    row_mask,
    shares,
    without,
)
from llmcomp.methods.solution import Solution, dead_columns, sampled_row_losses
from llmcomp.patterns import Pattern
from llmcomp.weights import SparseWeight

_CHUNK_WEIGHTS = 1 << 20  # weights whose scores are held at a time


@dataclass(frozen=True)
class MagnitudeConfig:
    """Masks by magnitude have nothing to set."""


@dataclass(frozen=True)
class WandaConfig:
    """Wanda has nothing to set."""


def magnitude(
    weight: Tensor, stats: InputStats | None, pattern: Pattern, dtype: torch.dtype,
    config: MagnitudeConfig = MagnitudeConfig(), mask: Tensor | None = None,
) -> Solution:
    """Remove the smallest of weight [rows, in]; an unstructured pattern ranks all of them together.

    Statistics, where there are any, only measure the error.

    Args:
        pattern: its groups divide `in`.
        dtype: of the stored values.
        mask: bool [rows, in] of an earlier step; what it has removed stays removed.

    Raises:
        BadRecipe: a width that the pattern does not divide, or a mask that has removed more than the pattern does.
    """
    def score(part: slice) -> Tensor:
        return weight[part].abs().float()

    return _masked(weight, _mask(weight, score, pattern, mask, by_row=False), stats, pattern, dtype)


def wanda(
    weight: Tensor, stats: InputStats, pattern: Pattern, dtype: torch.dtype,
    config: WandaConfig = WandaConfig(), mask: Tensor | None = None,
) -> Solution:
    """Remove from weight [rows, in] what carries least of its input; an unstructured pattern ranks row by row.

    Args:
        stats: of its input; its norms are read, and the Gram matrix or its factor to measure the error.
        pattern, dtype, mask: as in `magnitude`.

    Raises:
        BadRecipe: as `magnitude`.
    """
    norms = stats.norms.to(weight.device)

    def score(part: slice) -> Tensor:
        return weight[part].abs().float().mul_(norms)

    return _masked(weight, _mask(weight, score, pattern, mask, by_row=True), stats, pattern, dtype)


def _mask(
    weight: Tensor, score: Callable[[slice], Tensor], pattern: Pattern, held: Tensor | None, by_row: bool
) -> Tensor:
    """The mask, bool [rows, in], of scores that are asked for by slices of rows."""
    rows, columns = weight.shape
    pattern.check_width(columns)
    if held is not None and is_final(pattern, held):
        return held
    check_groups(pattern, held)
    if pattern.group is None and not by_row:
        return matrix_mask(score, rows, columns, pattern, held)
    removed = None if pattern.group is not None else _removed_of_rows(weight, pattern, held)
    mask = torch.empty(rows, columns, dtype=torch.bool, device=weight.device)
    step = max(1, _CHUNK_WEIGHTS // columns)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        scores = without(score(part), None if held is None else held[part])
        mask[part] = grouped_mask(scores, pattern) if removed is None else row_mask(scores, removed[part])
    return mask


def _removed_of_rows(weight: Tensor, pattern: Pattern, held: Tensor | None) -> Tensor:
    """int64 [rows]: how many weights an unstructured pattern removes of each: equally many, or what an earlier step
    has removed and a share of what is left."""
    rows, columns = weight.shape
    if held is None:
        return torch.full((rows,), pattern.removes(columns), device=weight.device)
    count = pattern.removes(rows * columns)
    check_removed(pattern, held, count)
    left = held.sum(1)
    more = torch.tensor(shares(left.tolist(), count - held.numel() + int(left.sum())), device=weight.device)
    return columns - left + more


def _masked(
    weight: Tensor, mask: Tensor, stats: InputStats | None, pattern: Pattern, dtype: torch.dtype
) -> Solution:
    """The weight under a mask, otherwise as it is."""
    solved = SparseWeight(weight.to(dtype).masked_fill(~mask, 0), mask, pattern)
    losses = sampled_row_losses(weight, solved, stats)
    return Solution(solved, *losses, dead_columns=0 if stats is None else dead_columns(stats))
