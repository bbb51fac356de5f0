"""ALPS: the mask by ADMM, then the best weights on it by conjugate gradients (Meng et al. 2024, arXiv:2406.07831).

The problem is min ||X (W - B)'||² + damping over B with the pattern's zeros. ADMM (the paper's equation 4) keeps a
copy D of B that has them and a multiplier V that draws the two together, at a price ρ:

    B = argmin over all weights, D = (B + V / ρ) under the pattern, V = V + ρ (B - D).

The paper scales inputs to norm one first. Written for the inputs as they are, ρ becomes ρ s_k² for input k, with s_k²
the damped Gram matrix's diagonal, which is the same iteration. What this one does beyond the paper:

* H + ρ diag(H) is factorized anew whenever ρ has moved, instead of one eigendecomposition of H: float32 holds, and
  one matrix beside the Gram matrix is all that is needed. The Gram matrix survives for the next weight;
* the equation for B is solved for B - W, so that what ADMM and the gradients see are differences, not their remainders;
* rows are taken some thousands at a time, each chunk with a ρ of its own.

ρ starts at 0.1 and grows as in the paper (appendix B.1), by how much of the support has changed in three iterations:
1.3 times beyond a tenth of the kept weights, 1.2 times beyond 0.5%, 1.1 times below. As in the authors' code, a start
at which nothing moves is taken back to a fifth, and from 30 iterations on a change below 0.03% ends it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.errors import BadRecipe
from llmcomp.matmul import fast_matmul
from llmcomp.methods._masks import GONE, grouped_mask, is_final, lowest
from llmcomp.methods._solve import restore_gram
from llmcomp.methods._swept import chunks
from llmcomp.methods.solution import Solution, dead_columns, sampled_row_losses
from llmcomp.methods.wanda import wanda
from llmcomp.patterns import Pattern
from llmcomp.weights import SparseWeight

# Elements of a chunk of rows: ADMM holds about six float32 matrices of them.
_CHUNK_WEIGHTS = 1 << 22

_RHO, _EVERY, _SETTLED_AFTER, _SETTLED = 0.1, 3, 30, 3e-4
_LARGEST_RHO = 1e6


@dataclass(frozen=True)
class ALPSConfig:
    """Settings of ALPS.

    Attributes:
        damping: first share of the mean diagonal to add to H (the paper's 1%).
        iterations: of ADMM, at most (the paper's 300).
        refinements: steps of conjugate gradients on the support, at most.
    """

    damping: float = 0.01
    iterations: int = 300
    refinements: int = 30

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise BadRecipe(f"ALPS's damping must lie in (0, 1], got {self.damping}.")
        if self.iterations < 1 or self.refinements < 1:
            raise BadRecipe(
                f"ALPS's iterations and refinements must be 1 or more, got {self.iterations} and {self.refinements}."
            )


def alps_flops(config: ALPSConfig, rows: float, columns: float) -> float:
    """Operations of a weight [rows, in], if ADMM goes to its last iteration: each solves for all rows with a factor of
    its own, each refinement multiplies by the Gram matrix."""
    each = 2 * rows * columns**2
    return config.iterations * (each + columns**3 / 3) + config.refinements * each


def alps(
    weight: Tensor, stats: InputStats, pattern: Pattern, dtype: torch.dtype,
    config: ALPSConfig = ALPSConfig(), mask: Tensor | None = None,
) -> Solution:
    """Sparsify weight [rows, in] by ADMM, then solve for the weights that stay.

    Args:
        weight: floating [rows, in]. Where the pattern is unstructured its rows compete, some thousands at a time.
        stats: of its input. The Gram matrix is as it was afterwards; from a factor it is restored.
        pattern: its groups divide `in`.
        dtype: of the stored values.
        config: settings.
        mask: bool [rows, in] of an earlier step; what it has removed stays removed. A complete one leaves only its
            weights to be solved for.

    Raises:
        BadRecipe: a width that the pattern does not divide, or a mask that has removed more than the pattern does.
    """
    rows, columns = weight.shape
    parts = chunks(pattern, weight.shape, mask, max(64, _CHUNK_WEIGHTS // columns))
    if stats.gram is None and stats.factor is not None:
        stats.gram, stats.factor = restore_gram(stats.factor), None
    problem = None if stats.gram is None else _damped(stats.gram, config.damping)
    if problem is None:
        solved = wanda(weight, stats, pattern, dtype, mask=mask)
        why = "the Gram matrix does not factor even with full damping: masked by Wanda, nothing made up for"
        return Solution(solved.weight, fallback=why, dead_columns=solved.dead_columns)
    values = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    kept = torch.empty(rows, columns, dtype=torch.bool, device=weight.device)
    final = is_final(pattern, mask)
    try:
        for part, count in parts:
            original, held = weight[part].float(), None if mask is None else mask[part]
            if held is not None and final:
                kept[part], best = held, original
            else:
                kept[part], best = _search(original, problem, pattern, held, count, config.iterations)
            values[part] = _on_support(original, best, kept[part], problem, config.refinements)
    finally:
        problem.restore()
    sparse = SparseWeight(values.masked_fill_(~kept, 0), kept, pattern)
    losses = sampled_row_losses(weight, sparse, stats)
    return Solution(sparse, *losses, problem.damping, None, dead_columns(stats))


@dataclass
class _Problem:
    """H + damping in the Gram matrix's own storage.

    Attributes:
        gram: float32 [in, in]. original: its diagonal as it was. diagonal: as it is with the damping.
    """

    gram: Tensor
    original: Tensor
    diagonal: Tensor
    damping: float

    def factor(self, rho: float) -> Tensor:
        """The lower Cholesky factor of H + ρ diag(H)."""
        self.gram.diagonal().copy_(self.diagonal * (1 + rho))
        lower, _ = torch.linalg.cholesky_ex(self.gram)  # H alone has been seen to factor
        self.gram.diagonal().copy_(self.diagonal)
        return lower

    def times(self, rows: Tensor) -> Tensor:
        """rows [any, in] H."""
        with fast_matmul():
            return rows @ self.gram

    def restore(self) -> None:
        """The Gram matrix as it was."""
        self.gram.diagonal().copy_(self.original)


def _damped(gram: Tensor, damping: float) -> _Problem | None:
    """The problem with the least damping, ten times more each time, at which it is definite; None where even that by
    the whole mean diagonal is not enough."""
    original = gram.diagonal().clone()
    share = damping
    while share <= 1.0:
        shifted = original + share * original.mean()
        gram.diagonal().copy_(shifted)
        if not int(torch.linalg.cholesky_ex(gram)[1]) and bool((shifted > 0).all()):
            return _Problem(gram, original, shifted, share)
        share *= 10
    gram.diagonal().copy_(original)
    return None


def _search(
    weight: Tensor, problem: _Problem, pattern: Pattern, held: Tensor | None, count: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """(mask, weights under it) of ADMM for weight, float32 [rows, in]; both [rows, in]."""
    scale, rho, has_moved = problem.diagonal, _RHO, False
    removes = count + (0 if held is None else held.numel() - int(held.sum()))
    size = weight.numel()
    present = size - removes if pattern.group is None else size // pattern.group * (pattern.kept or 0)
    lower = problem.factor(rho)
    mask = _project(weight, scale, pattern, held, removes)
    start = before = mask
    constrained = weight * mask
    multiplier = torch.zeros_like(weight)
    free = weight
    for iteration in range(1, iterations + 1):
        price = rho * scale
        right = (constrained - weight).mul_(price).sub_(multiplier)
        # Columns of right' are rows of right: what LAPACK wants lies as it is.
        free = torch.cholesky_solve(right.t(), lower).t().add_(weight)
        torch.addcdiv(free, multiplier, price, out=constrained)
        mask = _project(constrained, scale, pattern, held, removes)
        constrained.masked_fill_(~mask, 0)
        multiplier.add_((free - constrained).mul_(price))
        if iteration % _EVERY:
            continue
        changed = int((mask != before).sum())
        before = mask
        if iteration >= _SETTLED_AFTER and changed < _SETTLED * present:
            break
        if changed > 0.005 * present or (changed and has_moved):
            has_moved = True
            rho *= 1.3 if changed > 0.1 * present else 1.2 if changed > 0.005 * present else 1.1
        elif has_moved:
            break
        else:  # at this price nothing moves: a fifth of it, from the start
            rho /= 5
            mask = before = start
            constrained = weight * mask
            multiplier.zero_()
        lower = torch.empty(0)  # gone before the next takes its place
        lower = problem.factor(min(rho, _LARGEST_RHO))
    mask = _project(free, scale, pattern, held, removes)
    return mask, free * mask


def _project(
    weight: Tensor, scale: Tensor, pattern: Pattern, held: Tensor | None, removes: int
) -> Tensor:
    """The pattern's mask that keeps most of sum scale_k w_k², bool [rows, in]."""
    scores = weight.square().mul_(scale)
    if held is not None:
        scores.masked_fill_(~held, GONE)
    if pattern.group is not None:
        return grouped_mask(scores, pattern)
    return lowest(scores, removes).logical_not_()


def _on_support(weight: Tensor, start: Tensor, mask: Tensor, problem: _Problem, steps: int) -> Tensor:
    """The weights [rows, in] on the support that come closest to `weight` in the norm of H: conjugate gradients for all
    rows at once, preconditioned by the diagonal; no step makes a row worse, and a row that is solved stays."""
    found = start * mask
    residual = problem.times(weight - found).masked_fill_(~mask, 0)
    direction = residual / problem.diagonal
    energy = (residual * direction).sum(1, dtype=torch.float64)
    enough = energy * 1e-10
    for _ in range(steps):
        product = problem.times(direction).masked_fill_(~mask, 0)
        curvature = (direction * product).sum(1, dtype=torch.float64)
        open_ = (energy > enough) & (curvature > 0)
        if not bool(open_.any()):
            break
        step = torch.where(open_, energy / curvature, 0.0).float().unsqueeze(1)
        found.addcmul_(direction, step)
        residual.addcmul_(product, step, value=-1)
        scaled = residual / problem.diagonal
        after = (residual * scaled).sum(1, dtype=torch.float64)
        direction.mul_(torch.where(open_, after / energy, 0.0).float().unsqueeze(1)).add_(scaled)
        energy = torch.where(open_, after, energy)
    return found
