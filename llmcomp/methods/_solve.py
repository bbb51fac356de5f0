"""The algebra that GPTQ-like methods share: a triangular factor of the Gram matrix and a blocked column sweep.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) quantizes a row w of the weight one column after the other and
moves the error of each column into those that follow, through the Cholesky factor of the *inverse* Hessian.
QuIP (Chee et al. 2023, arXiv:2307.13304, theorem 6) shows that the same integers follow from a factorization
of H itself, without any inverse:

    H + damping = R R',  R upper triangular,  U = R / diag(R)                              (LDL form)
    target_k = w_k + sum_{i<k} (w_i - q_i) U_ik,   q_k = round to grid(target_k)
    loss     = sum_k R_kk² (target_k - q_k)²

This costs one n³/3 factorization instead of a factorization, an inverse and a second factorization, keeps
float32 accurate (nothing is inverted), happens in the Gram matrix's own storage, and says which weight R_kk²
an error in column k carries.

Shapes: weights and targets are transposed, [in, rows], so that a column of W is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.matmul import fast_matmul

BLOCK = 128
INNER = 32
TILE = 512

# Rows of a chunk whose error is measured: the mean over them stands for all.
_MEASURED_ROWS = 128


@dataclass(frozen=True)
class Factor:
    """`H + damping * mean(diag H) * I = R R'` for H permuted by `order`.

    Attributes:
        upper: float32 [in, in], R; zero below the diagonal.
        order: int64 [in], the column that is quantized k-th.
        damping: share of the mean diagonal that was added until the factorization held.
        shift: what was added to every diagonal entry, damping * mean(diag H).
    """

    upper: Tensor
    order: Tensor
    damping: float
    shift: float

    @property
    def pivots(self) -> Tensor:
        """R_kk² [in] in the order of quantization: what an error in column k costs after compensation."""
        return self.upper.diagonal().square()


def in_order(weight: Tensor, factor: Factor) -> Tensor:
    """Rows [rows, in] of a weight as the sweep takes them: float32 [in, rows], columns in the factor's order."""
    # Whole columns are gathered: from rows, each entry would be fetched from a line of its own.
    return weight.t().contiguous()[factor.order].float()


def row_quadratics(factor: Factor, matrix: Tensor) -> Tensor:
    """m' H m, float64 [rows], for each row of M given as [in, rows] in the order of quantization; undamped."""
    upper, total = factor.upper, torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    size = upper.shape[0]
    with fast_matmul():
        for start in range(0, size, TILE):
            stop = min(start + TILE, size)
            product = torch.zeros(stop - start, matrix.shape[1], device=matrix.device)
            for row in range(0, stop, TILE):
                end = min(row + TILE, stop)
                product.addmm_(upper[row:end, start:stop].t(), matrix[row:end])
            total += product.square_().sum(0, dtype=torch.float64)
    return (total - factor.shift * matrix.square().sum(0, dtype=torch.float64)).clamp_min_(0)


def sampled_losses(factor: Factor, error: Tensor, ordered: Tensor) -> tuple[Tensor, Tensor]:
    """e'He and w'Hw, float64 [rows], of evenly spaced rows; NaN for those between, where there are many.

    Both cost as much as the sweep itself, and only their ratio over a whole weight is reported.
    """
    rows = error.shape[1]
    measured = torch.arange(0, rows, max(1, rows // _MEASURED_ROWS), device=error.device)
    losses = []
    for matrix in (error, ordered):
        loss = torch.full((rows,), torch.nan, dtype=torch.float64, device=error.device)
        loss[measured] = row_quadratics(factor, matrix[:, measured])
        losses.append(loss)
    return losses[0], losses[1]


def factorize(gram: Tensor, damping: float, order: Tensor | None = None) -> Factor | None:
    """Factorize a Gram matrix in place.

    Args:
        gram: float32 [in, in], symmetric; its storage becomes the factor.
        damping: first share of the mean diagonal to add; ten times more each time the factorization fails.
        order: int64 [in], columns in the order they will be quantized; default as they stand.

    Returns:
        The factor, or None where even damping by the whole mean diagonal leaves a pivot that is not
        positive (then `gram` is spent).
    """
    size = gram.shape[0]
    if order is None:
        order = torch.arange(size, device=gram.device)
    else:
        permute_symmetric_(gram, order)
    diagonal = gram.diagonal().clone()
    tiles = [gram[i : i + TILE, i : i + TILE].clone() for i in range(0, size, TILE)]
    mean = float(diagonal.mean())
    share = damping
    while share <= 1.0:
        shift = share * mean
        gram.diagonal().copy_(diagonal + shift)
        if _factorize_upper_(gram):
            return Factor(gram.triu_(), order, share, shift)
        _restore_upper_(gram, tiles)
        share *= 10
    return None


def restore_gram(factor: Factor) -> Tensor:
    """The Gram matrix that was factorized, to float32's accuracy, in the factor's storage; the factor is spent."""
    matrix = factor.upper
    size = matrix.shape[0]
    with fast_matmul():
        # Tile (i, j) of R R' reads tiles right of j in block row i, so rows may be overwritten from the left.
        for row in range(0, size, TILE):
            stop = min(row + TILE, size)
            for column in range(row, size, TILE):
                end = min(column + TILE, size)
                product = torch.zeros(stop - row, end - column, device=matrix.device)
                for inner in range(column, size, TILE):
                    last = min(inner + TILE, size)
                    product.addmm_(matrix[row:stop, inner:last], matrix[column:end, inner:last].T)
                matrix[row:stop, column:end].copy_(product)
    matrix.diagonal().sub_(factor.shift)
    for row in range(0, size, TILE):
        stop = min(row + TILE, size)
        for column in range(stop, size, TILE):
            end = min(column + TILE, size)
            matrix[column:end, row:stop].copy_(matrix[row:stop, column:end].t())
    permute_symmetric_(matrix, factor.order.argsort())
    return matrix


def shared_factor(stats: InputStats, damping: float, act_order: bool, group: int = 1) -> Factor | None:
    """The factor of these statistics, made on first use in place of the Gram matrix; None where it does not factor.

    Args:
        stats: of an input; `stats.factor` keeps the factor for the next weight.
        damping: first share of the mean diagonal to add.
        act_order: columns by falling activation, rather than as they stand.
        group: so many consecutive columns stay together and in their order, as masks of N:M want it. A factor in an
            order that parts them is made anew.
    """
    if stats.factor is not None and not _keeps_together(stats.factor.order, group):
        stats.gram, stats.factor = restore_gram(stats.factor), None
    if stats.factor is None and stats.gram is not None:
        gram, stats.gram = stats.gram, None
        order = falling_order(stats.diagonal, group) if act_order else None
        stats.factor = factorize(gram, damping, order)
    return stats.factor


def falling_order(diagonal: Tensor, group: int = 1) -> Tensor:
    """int64 [in]: groups of consecutive columns by falling sum of their diagonal [in]."""
    if group == 1:
        return diagonal.argsort(descending=True, stable=True)
    groups = diagonal.reshape(-1, group).sum(1).argsort(descending=True, stable=True)
    return (groups.unsqueeze(1) * group + torch.arange(group, device=groups.device)).flatten()


def _keeps_together(order: Tensor, group: int) -> bool:
    if group == 1:
        return True
    first = order[::group].unsqueeze(1)
    steps = torch.arange(group, device=order.device)
    return bool((first % group == 0).all()) and bool((order.reshape(-1, group) == first + steps).all())


def _factorize_upper_(matrix: Tensor) -> bool:
    """Blocked `A = R R'` in the upper triangle, last block first. Below the diagonal only the diagonal tiles
    of TILE are touched. False where a pivot is not positive."""
    size = matrix.shape[0]
    with fast_matmul():
        # Blocks start at multiples of BLOCK, so that none reaches into a lower tile: a second try needs those.
        for start in range((size - 1) // BLOCK * BLOCK, -1, -BLOCK):
            stop = min(start + BLOCK, size)
            block = matrix[start:stop, start:stop].triu()
            # A = R R' with R upper is the Cholesky factorization of A read backwards.
            lower, info = torch.linalg.cholesky_ex((block + block.triu(1).T).flip(0, 1))
            if int(info) or not bool(torch.isfinite(lower).all()):
                return False
            corner = lower.flip(0, 1)
            matrix[start:stop, start:stop].copy_(corner)
            if start:
                identity = torch.eye(stop - start, device=corner.device)
                inverse = torch.linalg.solve_triangular(corner, identity, upper=True)
                panel = matrix[:start, start:stop].clone()
                for rows in panel.split(TILE):
                    rows.copy_(rows @ inverse.T)
                matrix[:start, start:stop].copy_(panel)
                _subtract_outer_(matrix, panel)
    return True


def _subtract_outer_(matrix: Tensor, panel: Tensor) -> None:
    """`A[:n, :n] -= panel panel'` for panel [n, BLOCK], on the tiles of the upper triangle only.

    Tiles of one size, here and below: oneDNN compiles a kernel for every shape it meets and keeps it, so
    products of ever-changing length would cost a second and hundreds of megabytes.
    """
    stop = panel.shape[0]
    for row in range(0, stop, TILE):
        row_stop = min(row + TILE, stop)
        for column in range(row, stop, TILE):
            end = min(column + TILE, stop)
            matrix[row:row_stop, column:end].addmm_(panel[row:row_stop], panel[column:end].T, alpha=-1.0)


def _restore_upper_(matrix: Tensor, tiles: list[Tensor]) -> None:
    """Undo a factorization: the upper tiles from the lower ones, the diagonal tiles from their copies."""
    size = matrix.shape[0]
    for n, tile in enumerate(tiles):
        row, stop = n * TILE, min((n + 1) * TILE, size)
        matrix[row:stop, row:stop].copy_(tile)
        for column in range(stop, size, TILE):
            end = min(column + TILE, size)
            matrix[row:stop, column:end].copy_(matrix[column:end, row:stop].T)


def permute_symmetric_(matrix: Tensor, order: Tensor) -> None:
    """`A <- A[order][:, order]` in place for a symmetric A: rows, transpose, rows again."""
    positions = order.tolist()
    _permute_rows_(matrix, positions)
    _transpose_(matrix)
    _permute_rows_(matrix, positions)


def _permute_rows_(matrix: Tensor, order: list[int]) -> None:
    """`A <- A[order]` in place, cycle by cycle, with one row held aside."""
    done = [False] * len(order)
    for first in range(len(order)):
        if done[first] or order[first] == first:
            continue
        held, row = matrix[first].clone(), first
        while order[row] != first:
            matrix[row].copy_(matrix[order[row]])
            done[row] = True
            row = order[row]
        matrix[row].copy_(held)
        done[row] = True


def _transpose_(matrix: Tensor) -> None:
    """In-place transpose of a square matrix by tiles."""
    size = matrix.shape[0]
    for row in range(0, size, TILE):
        stop = min(row + TILE, size)
        for column in range(row, size, TILE):
            end = min(column + TILE, size)
            # Copies also where a tile is a single row, which is contiguous as it stands.
            upper = matrix[row:stop, column:end].t().clone(memory_format=torch.contiguous_format)
            lower = matrix[column:end, row:stop].t().clone(memory_format=torch.contiguous_format)
            matrix[column:end, row:stop].copy_(upper)
            if row != column:
                matrix[row:stop, column:end].copy_(lower)


# (position k, target [rows]) -> the value [rows] that a reader will see in column k
ColumnFunction = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class LookAhead:
    """What a sweep shows of columns before it comes to them.

    Attributes:
        width: columns that are shown together; a multiple of these starts each time.
        see: (position of the first, their values [width or fewer, rows]), called when the errors of all columns
            before them are compensated and none of their own.
    """

    width: int
    see: Callable[[int, Tensor], None]


def sweep(
    weight: Tensor, factor: Factor, quantize_column: ColumnFunction, ahead: LookAhead | None = None
) -> Tensor:
    """Quantize column after column, each error compensated in the columns that follow.

    Args:
        weight: float32 [in, rows], columns of W in the order of quantization; not changed.
        factor: of the Gram matrix in the same order.
        quantize_column: (position k, target [rows]) → the value [rows] that a reader will see for it. May
            use its argument's storage.
        ahead: what wants to see columns before they are quantized.

    Returns:
        float32 [in, rows], `W - Q` in the order of quantization.
    """
    size = weight.shape[0]
    error = torch.empty_like(weight)
    scale = factor.upper.diagonal().reciprocal()
    block, strip = _widths(ahead)
    with fast_matmul():
        for start in range(0, size, block):
            stop = min(start + block, size)
            target = weight[start:stop].clone()
            for row in range(0, start, TILE):
                end = min(row + TILE, start)
                coupling = factor.upper[row:end, start:stop] * scale[start:stop]
                target.addmm_(coupling.T, error[row:end])
            local = (factor.upper[start:stop, start:stop] * scale[start:stop]).triu(1)
            _sweep_block(weight[start:stop], target, error[start:stop], local, start, strip, quantize_column, ahead)
    return error


def _widths(ahead: LookAhead | None) -> tuple[int, int]:
    """Columns of a block and of its strips, such that what is shown together lies in one strip, or is a block."""
    if ahead is None:
        return BLOCK, INNER
    if ahead.width > INNER:
        return ahead.width, INNER
    strip = INNER // ahead.width * ahead.width
    return BLOCK // strip * strip, strip


def _updated(weight: Tensor, target: Tensor, coupling: Tensor) -> Tensor:
    """What GPTQ would hold in some columns before it comes to the first of them, [columns, rows].

    A target counts the errors of earlier columns, and of those between only when they are known: as it stands it takes
    them to be zero. GPTQ's updated weights are what the targets come to if each column between is left at its own,
    an error of w_i - target_i: e_j + sum_{i<j} U_ij e_i = w_j - (what the target is so far), targets w - e.
    """
    error = torch.linalg.solve_triangular(coupling.T, weight - target, upper=False, unitriangular=True)
    return torch.sub(weight, error, out=torch.empty_like(weight))  # rows contiguous, which LAPACK's answer is not


def _sweep_block(
    weight: Tensor, target: Tensor, error: Tensor, coupling: Tensor, offset: int, strip: int,
    quantize_column: ColumnFunction, ahead: LookAhead | None,
) -> None:
    """One block of `sweep`: small strips by rank-one updates, the rest of the block by products."""
    size = weight.shape[0]
    weights, targets, errors = weight.unbind(), target.unbind(), error.unbind()
    for start in range(0, size, strip):
        stop = min(start + strip, size)
        if start:
            target[start:stop].addmm_(coupling[:start, start:stop].T, error[:start])
        for k in range(start, stop):
            if ahead is not None and k % ahead.width == 0:
                part = slice(k, k + ahead.width)
                ahead.see(offset + k, _updated(weight[part], target[part], coupling[part, part]))
            torch.sub(weights[k], quantize_column(offset + k, targets[k]), out=errors[k])
            if k + 1 < stop:
                target[k + 1 : stop].addr_(coupling[k, k + 1 : stop], errors[k])
