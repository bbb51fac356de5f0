"""The algebra that low-rank methods share: the best factors of a weight in a norm of its error, and their refit.

Every method here minimizes tr((W - W') G (W - W')') over W' of rank r, for a G of its own: the identity (plain SVD), a
diagonal (ASVD), the Gram matrix of the inputs (SVD-LLM). The papers factorize G = S S', truncate the singular value
decomposition W S = U Σ V' and multiply by the inverse of S. But U' W S = Σ V', so

    W' = U_r Σ_r V_r' S^-1 = U_r U_r' W,    W G W' = U Σ² U',    loss = sum of the Σ² left out:

the outputs are projected on their principal directions. Nothing is whitened and nothing inverted, a singular G is no
special case (what is truncated is the eigendecomposition of W G W'), and U_r has orthonormal columns whatever G is.

An eigenproblem has the smaller side of W for its size. A weight of more rows than columns is W = Q R first, and
R G R' [in, in] has the same eigenvalues. Decompositions are in float64: they square singular values, and an input
whose channels differ a thousandfold leaves little of the small ones in float32 (2048 channels, one of them 3000 times
the others: 2.3 times the least loss; only the product with G in float32, 1.03 times).

Legend: weight [out, in], left [out, rank], right [rank, in], gram [in, in].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.errors import NumericalError
from llmcomp.methods._solve import TILE, Factor
from llmcomp.methods.solution import Solution, dead_columns
from llmcomp.weights import LowRankWeight

# Share of the largest diagonal entry of R below which W'W is too near singular for its Cholesky factor to be R.
_WELL_CONDITIONED = 1e-5

_MOST_DAMPING = 1e3  # in means of the diagonal: with so much any finite Gram matrix factors

_MEASURED_ROWS = 128  # of each weight: they stand for all


@dataclass(frozen=True)
class Norm:
    """How much an error E costs: tr(E G E') for a symmetric G.

    Attributes:
        inner: (a [m, in], b [k, in]), both float64 → a G b', float64 [m, k].
        size: the mean of G's diagonal.
    """

    inner: Callable[[Tensor, Tensor], Tensor]
    size: float

    def damped(self, share: float) -> Norm:
        """The norm of G + share * size * I (of I where G is zero)."""
        shift = share * self.size if self.size > 0 else 1.0
        return Norm(lambda a, b: self.inner(a, b).add_(a @ b.T, alpha=shift), self.size + shift)


def diagonal_norm(diagonal: Tensor | None = None) -> Norm:
    """G = diag of float64 [in], the identity where none is given."""
    if diagonal is None:
        return Norm(lambda a, b: a @ b.T, 1.0)
    return Norm(lambda a, b: (a * diagonal) @ b.T, float(diagonal.mean()))


def gram_norm(gram: Tensor) -> Norm:
    """G = gram [in, in], floating; read a strip at a time, so that it is never widened as a whole."""

    def inner(a: Tensor, b: Tensor) -> Tensor:
        total = a.new_zeros(a.shape[0], b.shape[0])
        for start in range(0, gram.shape[0], TILE):
            strip = slice(start, start + TILE)
            total.addmm_(a @ gram[:, strip].double(), b[:, strip].T)
        return total

    return Norm(inner, float(gram.diagonal().mean(dtype=torch.float64)))


def input_norm(stats: InputStats) -> Norm:
    """G = the Gram matrix of the inputs, also where another method has factorized it in place."""
    if stats.gram is not None:
        return gram_norm(stats.gram)
    assert isinstance(stats.factor, Factor)  # what a method makes of it
    return Norm(_factored_inner(stats.factor), float(stats.diagonal.mean(dtype=torch.float64)))


def _factored_inner(factor: Factor) -> Callable[[Tensor, Tensor], Tensor]:
    """a G b' for G + shift I = R R' in the factor's order."""

    def inner(a: Tensor, b: Tensor) -> Tensor:
        first, second = a[:, factor.order], b[:, factor.order]
        total = (first @ second.T).mul_(-factor.shift)
        for start in range(0, factor.upper.shape[0], TILE):
            stop = start + TILE
            strip = factor.upper[:stop, start:stop].double()
            total.addmm_(first[:, :stop] @ strip, (second[:, :stop] @ strip).T)
        return total

    return inner


def energies(weight: Tensor, norm: Norm) -> Tensor:
    """Σ², float64 [min(out, in)] descending: what each further rank takes off the loss in that norm."""
    wide = weight.double()
    if wide.shape[0] > wide.shape[1]:
        wide = _triangular(wide)[1]
    return torch.linalg.eigvalsh(norm.inner(wide, wide)).flip(0).clamp_min_(0)


def truncate(weight: Tensor, norm: Norm, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of least loss in that norm: left [out, rank] with orthonormal columns, the most important first, and
    right = left' weight [rank, in]; float64."""
    wide = weight.double()
    if wide.shape[0] <= wide.shape[1]:
        left = _principal(norm.inner(wide, wide), rank)
        return left, left.T @ wide
    basis, upper = _triangular(wide)
    vectors = _principal(norm.inner(upper, upper), rank)
    right = vectors.T @ upper
    if basis is None:
        return wide @ torch.linalg.solve_triangular(upper, vectors, upper=True), right
    return basis @ vectors, right


def _principal(matrix: Tensor, rank: int) -> Tensor:
    """Eigenvectors [size, rank] of the largest eigenvalues, in falling order."""
    return torch.linalg.eigh(matrix).eigenvectors[:, -rank:].flip(1)


def _triangular(wide: Tensor) -> tuple[Tensor | None, Tensor]:
    """W = Q R with R [in, in] upper triangular: (None, R) with Q = W R^-1 where W is well conditioned, else (Q, R).

    The Cholesky factor of W'W costs a third of Householder's Q and R, and weights, unlike their inputs, are seldom
    near singular.
    """
    upper, info = torch.linalg.cholesky_ex(wide.T @ wide, upper=True)
    pivots = upper.diagonal()
    if int(info) == 0 and float(pivots.min()) > _WELL_CONDITIONED * float(pivots.max()):
        return None, upper
    basis, upper = torch.linalg.qr(wide)
    return basis, upper


def solve_damped(matrix: Tensor, rhs: Tensor, share: float) -> Tensor:
    """x (A + d I) = rhs for a symmetric A [n, n] without negative eigenvalues; zero where A is.

    Args:
        matrix: float64 [n, n], not the caller's any more: its diagonal is changed.
        rhs: float64 [rows, n].
        share: as in `damped_factor`.
    """
    if float(matrix.diagonal().mean()) <= 0:  # nothing was ever seen: nothing moves
        return torch.zeros_like(rhs)
    return torch.cholesky_solve(rhs.T, damped_factor(matrix, share)).T


def damped_factor(matrix: Tensor, share: float) -> Tensor:
    """L [n, n], lower, with A + d I = L L'; of I where A is zero.

    Args:
        matrix: float64 [n, n], symmetric, not the caller's any more: its diagonal is changed.
        share: d as a share of the mean diagonal, ten times more each time the factorization fails.

    Raises:
        NumericalError: a matrix with NaN or Inf.
    """
    diagonal = matrix.diagonal().clone()
    size = float(diagonal.mean())
    while share <= _MOST_DAMPING:
        matrix.diagonal().copy_(diagonal + (share * size if size > 0 else 1.0))
        lower, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            return lower
        share *= 10
    raise NumericalError("A Gram matrix does not factor, however much it is damped: it holds NaN or Inf.")


def times(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows @ matrix, float64, for float64 [k, in] and a floating matrix [in, in] that is widened a strip at a time."""
    strips = [rows @ matrix[:, start : start + TILE].double() for start in range(0, matrix.shape[1], TILE)]
    return torch.cat(strips, 1)


def measured_rows(weight: Tensor) -> Tensor:
    """Numbers of evenly spaced rows that stand for all of weight [out, in]."""
    rows = weight.shape[0]
    return torch.arange(0, rows, max(1, rows // _MEASURED_ROWS), device=weight.device)


def solution_of(weight: Tensor, low: LowRankWeight, stats: InputStats | None, damping: float | None = None) -> Solution:
    """The factors with their account, measured on what a reader decodes, evenly spaced rows for all."""
    if stats is None:
        return Solution(low)
    rows, measured = weight.shape[0], measured_rows(weight)
    some, norm = weight[measured].double(), input_norm(stats)
    losses = []
    for matrix in (some - low.dense()[measured].double(), some):
        loss = torch.full((rows,), torch.nan, dtype=torch.float64, device=weight.device)
        loss[measured] = norm.inner(matrix, matrix).diagonal().clamp_min(0)
        losses.append(loss)
    return Solution(low, losses[0], losses[1], damping, None, dead_columns(stats))
