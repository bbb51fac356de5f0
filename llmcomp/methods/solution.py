"""What a method gives back: the compressed weight and what is worth reporting of how it came about."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.weights import CompressedWeight, QuantizedWeight

_CHUNK = 1024


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
        held = self.weight
        zero = None if held.zero_point is None else held.zero_point[start:stop]
        return Solution(
            replace(held, values=held.values[start:stop], scale=held.scale[start:stop], zero_point=zero),
            None if self.row_error is None else self.row_error[start:stop],
            None if self.row_norm is None else self.row_norm[start:stop],
            self.damping,
            self.fallback,
            self.dead_columns,
        )


def row_losses(weight: Tensor, solved: QuantizedWeight, gram: Tensor) -> tuple[Tensor, Tensor]:
    """(e' H e, w' H w), float64 [rows], for a weight [rows, in] and its quantized form."""
    errors, norms = [], []
    for start in range(0, weight.shape[0], _CHUNK):
        part = weight[start : start + _CHUNK].float()
        held = solved.values[start : start + _CHUNK], solved.scale[start : start + _CHUNK]
        zero = None if solved.zero_point is None else solved.zero_point[start : start + _CHUNK]
        error = part - QuantizedWeight(*held, zero, solved.scheme).dense().float()
        errors.append(quadratics(error, gram))
        norms.append(quadratics(part, gram))
    return torch.cat(errors), torch.cat(norms)


def quadratics(rows: Tensor, gram: Tensor) -> Tensor:
    """r' G r, float64 [rows], of each row of [rows, in]."""
    return ((rows @ gram) * rows).sum(1, dtype=torch.float64).clamp_min(0)


def dead_columns(stats: InputStats) -> int:
    """Inputs that were zero in every token."""
    return int((stats.absmax == 0).sum())
