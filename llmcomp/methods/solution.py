"""What a method gives back: the compressed weight and what is worth reporting of how it came about."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.methods._solve import in_order, row_quadratics
from llmcomp.weights import CompressedWeight

_CHUNK = 1024
_SAMPLED_ROWS = 128


@dataclass(frozen=True)
class Solution:
    """A compressed weight and its account.

    Attributes:
        weight: rows as in the weight that was given.
        row_error: float64 [rows], e' H e of each row's error, NaN where a row was not measured; None without
            statistics.
        row_norm: float64 [rows], w' H w.
        damping: share of the mean diagonal added before factorizing, None where nothing was factorized.
        fallback: why something other than the method was done, else None.
        dead_columns: inputs that calibration never saw active.
    """

    weight: CompressedWeight
    row_error: Tensor | None = None
    row_norm: Tensor | None = None
    damping: float | None = None
    fallback: str | None = None
    dead_columns: int = 0

    def rows(self, start: int, stop: int) -> Solution:
        """The part of a stacked solution that belongs to rows start..stop."""
        return Solution(
            self.weight.rows(start, stop),
            None if self.row_error is None else self.row_error[start:stop],
            None if self.row_norm is None else self.row_norm[start:stop],
            self.damping,
            self.fallback,
            self.dead_columns,
        )


def row_losses(weight: Tensor, solved: CompressedWeight, gram: Tensor) -> tuple[Tensor, Tensor]:
    """(e' H e, w' H w), float64 [rows], for a weight [rows, in] and its compressed form."""
    errors, norms = [], []
    for start in range(0, weight.shape[0], _CHUNK):
        part = weight[start : start + _CHUNK].float()
        error = part - solved.rows(start, start + _CHUNK).dense().float()
        errors.append(quadratics(error, gram))
        norms.append(quadratics(part, gram))
    return torch.cat(errors), torch.cat(norms)


def sampled_row_losses(
    weight: Tensor, solved: CompressedWeight, stats: InputStats | None
) -> tuple[Tensor | None, Tensor | None]:
    """(e' H e, w' H w), float64 [rows], of evenly spaced rows and NaN for those between, where there are many; None
    without statistics.

    All rows of a wide weight would cost more than its mask, and only the ratio of the sums is reported.
    """
    if stats is None or (stats.gram is None and stats.factor is None):
        return None, None
    measured = torch.arange(0, weight.shape[0], max(1, weight.shape[0] // _SAMPLED_ROWS), device=weight.device)
    part, losses = weight[measured].float(), []
    for rows in (part - solved.by_rows(lambda tensor: tensor[measured]).dense().float(), part):
        loss = torch.full((weight.shape[0],), torch.nan, dtype=torch.float64, device=weight.device)
        if stats.gram is not None:
            loss[measured] = quadratics(rows, stats.gram)
        else:
            loss[measured] = row_quadratics(stats.factor, in_order(rows, stats.factor))
        losses.append(loss)
    return losses[0], losses[1]


def quadratics(rows: Tensor, gram: Tensor) -> Tensor:
    """r' G r, float64 [rows], of each row of [rows, in]."""
    return ((rows @ gram) * rows).sum(1, dtype=torch.float64).clamp_min(0)


def dead_columns(stats: InputStats) -> int:
    """Inputs that were zero in every token."""
    return int((stats.absmax == 0).sum())
