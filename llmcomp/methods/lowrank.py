"""Low rank: two thin factors for one matrix, by plain SVD, ASVD (arXiv:2312.05821) or SVD-LLM (arXiv:2403.07378).

The three differ in the norm in which the factors are the best of their rank (`_project` has the algebra):

* `svd`: every input counts alike. Needs no data.
* `asvd`: inputs weighted by the power alpha of their size (its S is diagonal).
* `svd_llm`: the exact error of the outputs on the calibration inputs, by their Gram matrix. Where the
  paper whitens by a Cholesky factor and multiplies by its inverse, nothing is factorized here.

`refit` is SVD-LLM's second phase: the best left factor for the inputs that the compressed prefix yields, with the
source's outputs for a target. It moves the factor it is given, so that with equal inputs, to which that factor is
already the answer, nothing changes.

Rows are not independent: weights that share an input are factorized one by one, on one Gram matrix, which is only read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.errors import BadRecipe
from llmcomp.methods._project import (
    Norm,
    diagonal_norm,
    energies,
    input_norm,
    measured_rows,
    solution_of,
    solve_damped,
    times,
    truncate,
)
from llmcomp.methods.rank_budget import Spectrum, check_rank
from llmcomp.methods.solution import Solution
from llmcomp.weights import LowRankWeight

# Share of the mean diagonal. It decides among factors that calibration cannot tell apart (ranks above the number of
# tokens, dead channels), and lies above the rounding of a float32 Gram matrix.
_DAMPING = 1e-6

# Of the update. The products that it takes apart are summed in float32, and with few tokens the inputs of now hardly
# show some directions, in which the source's would ask for large factors that cancel each other. On a small trained
# decoder at a ratio of 0.6 perplexity is 73.2, 73.5, 73.6 and 74.3 with 1e-6, 1e-4, 1e-3 and 1e-2 (98.2 without the
# update) after 128 windows of 256 tokens, and 88.2, 88.0, 87.8 and 87.8 (110.2) after 16; one run each.
REFIT_DAMPING = 1e-3


@dataclass(frozen=True)
class SVDConfig:
    """Plain SVD has nothing to set."""


@dataclass(frozen=True)
class ASVDConfig:
    """Settings of ASVD.

    Attributes:
        alpha: power of a channel's size that weighs it (the paper's 0.5).
        size: what a channel's size is: 'rms', the root of its mean square (the paper has the mean of |x|, which
            statistics do not hold), or 'absmax', the largest |x|.
    """

    alpha: float = 0.5
    size: Literal["rms", "absmax"] = "rms"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise BadRecipe(f"ASVD's alpha must lie in [0, 1], got {self.alpha}.")
        if self.size not in ("rms", "absmax"):
            raise BadRecipe(f"ASVD's size is 'rms' or 'absmax', not {self.size!r}.")


@dataclass(frozen=True)
class SVDLLMConfig:
    """Settings of SVD-LLM.

    Attributes:
        damping: share of the Gram matrix's mean diagonal that is added to it.
    """

    damping: float = _DAMPING

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise BadRecipe(f"SVD-LLM's damping must lie in (0, 1], got {self.damping}.")


def svd(
    weight: Tensor, stats: InputStats | None, rank: int, dtype: torch.dtype, config: SVDConfig = SVDConfig()
) -> Solution:
    """The factors nearest to weight [out, in] itself. Statistics, where there are any, only measure the error.

    Raises:
        BadRecipe: a rank that saves nothing.
    """
    return _factorized(weight, diagonal_norm(), stats, rank, dtype, None)


def asvd(
    weight: Tensor, stats: InputStats, rank: int, dtype: torch.dtype, config: ASVDConfig = ASVDConfig()
) -> Solution:
    """The factors nearest to weight [out, in] where inputs count by their size to the power alpha.

    Args:
        stats: of its input; only read.
        rank: of the factors. dtype: of the factors.

    Raises:
        BadRecipe: a rank that saves nothing.
    """
    size = stats.absmax if config.size == "absmax" else stats.norms / max(stats.tokens, 1) ** 0.5
    norm = diagonal_norm(size.double() ** (2 * config.alpha)).damped(_DAMPING)
    return _factorized(weight, norm, stats, rank, dtype, None)


def svd_llm(
    weight: Tensor, stats: InputStats, rank: int, dtype: torch.dtype, config: SVDLLMConfig = SVDLLMConfig()
) -> Solution:
    """The factors whose outputs are nearest to those of weight [out, in] on the calibration inputs.

    Args:
        stats: of its input; only read, and it may be that another method has factorized the Gram matrix in place.
        rank: of the factors. dtype: of the factors.

    Raises:
        BadRecipe: a rank that saves nothing.
    """
    return _factorized(weight, input_norm(stats).damped(config.damping), stats, rank, dtype, config.damping)


def _factorized(
    weight: Tensor, norm: Norm, stats: InputStats | None, rank: int, dtype: torch.dtype, damping: float | None
) -> Solution:
    check_rank(rank, *weight.shape)
    left, right = truncate(weight, norm, rank)
    return solution_of(weight, LowRankWeight(left.to(dtype), right.to(dtype)), stats, damping)


def spectrum(weight: Tensor, stats: InputStats | None) -> Spectrum:
    """What each rank takes off the loss of weight [out, in], for `rank_budget.allocate`: of its outputs' error with
    statistics, of its own without."""
    norm = diagonal_norm() if stats is None else input_norm(stats)
    return Spectrum(energies(weight, norm), (weight.shape[0], weight.shape[1]))


def refit(
    weight: Tensor,
    low: LowRankWeight,
    gram: Tensor,
    cross: Tensor,
    fixed: Literal["left", "right"] = "right",
    damping: float = REFIT_DAMPING,
) -> LowRankWeight:
    """One factor fitted anew: least squares of ||X W' - X' (base + left right)'||², X the source's inputs of this
    linear and X' those that it gets now.

    Each is moved from where it is, (A + d I)^-1 times the gradient, which for no d makes the error larger.

    Args:
        weight: floating [out, in], the source's.
        low: its factors; a base stays as it is.
        gram: floating [in, in], X'' X'.
        cross: floating [in, in], X' X' with the source's inputs first: cross[i, j] = sum over tokens of x_i x'_j.
        fixed: the factor that stays. The right one (the paper's) needs a factorization [rank, rank]; the left one a
            float64 one [in, in], and gains more: on a small trained decoder at a ratio of 0.6 perplexity goes from 70.0
            to 66.5 and 63.8.
        damping: d as a share of the mean diagonal of A, the matrix of the normal equations.

    Returns:
        The same with a floating factor in the place of the other.
    """
    left, right = (factor.double() for factor in low.factors())
    wide, base = weight.double(), None if low.base is None else low.base.dense().double()
    if fixed == "right":
        seen = times(right, gram)  # [rank, in]
        square = seen @ right.T
        gradient = wide @ times(right, cross.T).T - left @ square
        if base is not None:
            gradient -= base @ seen.T
        left = left + solve_damped(square, gradient, damping)
        return replace(low, left=left.to(low.dtype))
    square = left.T @ left
    now = square @ right if base is None else square @ right + left.T @ base
    gradient = times(left.T @ wide, cross) - times(now, gram)
    across = solve_damped(gram.to(torch.float64, copy=True), gradient, damping)  # [rank, in]
    right = right + solve_damped(square, across.T, damping).T
    return replace(low, right=right.to(low.dtype))


def refit_losses(
    weight: Tensor, low: LowRankWeight, source: InputStats, cross: Tensor, now: InputStats
) -> tuple[Tensor, Tensor]:
    """(||X w - X' w'||², ||X w||²), float64 [out], of evenly spaced rows and NaN for those between, where there are
    many: what `refit` makes small, and the size of what it stands for.

    Args:
        weight: floating [out, in], the source's. low: what stands for it.
        source: of the inputs in the source model. cross: as `refit`. now: of the inputs that there are now.
    """
    rows = measured_rows(weight)
    some, decoded = weight[rows].double(), low.dense()[rows].double()
    norm = input_norm(source).inner(some, some).diagonal()
    between = (times(some, cross) * decoded).sum(1)
    apart = norm - 2 * between + input_norm(now).inner(decoded, decoded).diagonal()
    found = torch.full((2, weight.shape[0]), torch.nan, dtype=torch.float64, device=weight.device)
    found[0, rows], found[1, rows] = apart.clamp_min(0), norm.clamp_min(0)
    return found[0], found[1]
