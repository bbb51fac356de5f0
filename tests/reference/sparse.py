"""Sparsification in float64, one weight at a time where the papers' code works on blocks: SparseGPT with the inverse of
the Hessian, Wanda by sorting each row, and the best weights on a support by its normal equations.

Slow and obvious on purpose. Rows are independent where the pattern is N:M; `margin` says how far each row came from a
tie, where float32 may choose otherwise and the rest of the row then differs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmcomp.patterns import Pattern

# (row, column, target) -> (the value that is stored for it, distance to a tie)
Round = Callable[[int, int, float], tuple[float, float]]


def exact(row: int, column: int, target: float) -> tuple[float, float]:
    return target, 1.0


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of H + damping * mean(diag H), as SparseGPT's code has it."""
    H = hessian.double()
    damped = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)


def sparsegpt(
    weight: Tensor, hessian: Tensor, pattern: Pattern, order: Tensor, damping: float = 0.01, block: int = 128,
    rounding: Round = exact,
) -> tuple[Tensor, Tensor, Tensor]:
    """Frantar & Alistarh 2023 (arXiv:2301.00774), algorithm 1 column by column.

    Returns:
        (weights float64, mask, margin float64 [rows]), columns as in `weight`.
    """
    C = inverse_factor(hessian[order][:, order], damping)
    W = weight.double()[:, order].clone()
    rows, columns = W.shape
    mask = torch.ones(rows, columns, dtype=torch.bool)
    margin = torch.ones(rows, dtype=torch.float64)
    gone = 0
    for k in range(columns):
        if pattern.of is not None and k % pattern.of == 0:
            cost = W[:, k : k + pattern.of] ** 2 / C.diagonal()[k : k + pattern.of] ** 2
            for row in range(rows):
                ranked = cost[row].argsort(stable=True, descending=True)
                mask[row, k + ranked[pattern.kept :]] = False
                least, most = cost[row, ranked[pattern.kept - 1]], cost[row, ranked[pattern.kept]]
                margin[row] = min(float(margin[row]), float((least - most) / least))
        if pattern.of is None and k % block == 0:
            stop = min(k + block, columns)
            cost = (W[:, k:stop] ** 2 / C.diagonal()[k:stop] ** 2).t().flatten()
            count = int(int(pattern.sparsity * rows * columns + 0.5) * stop / columns + 0.5) - gone
            lost = cost.argsort(stable=True, descending=True)[len(cost) - count :]
            flat = torch.ones(len(cost), dtype=torch.bool)
            flat[lost] = False
            mask[:, k:stop] = flat.reshape(stop - k, rows).t()
            gone += count
        stored = torch.zeros(rows, dtype=torch.float64)
        for row in range(rows):
            if mask[row, k]:
                stored[row], distance = rounding(row, int(order[k]), float(W[row, k]))
                margin[row] = min(float(margin[row]), distance)
        error = (W[:, k] - stored) / C[k, k]
        W[:, k:] -= error.unsqueeze(1) * C[k, k:]
        W[:, k] = stored
    back = order.argsort()
    return W[:, back], mask[:, back], margin


def by_row(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask that keeps the best of each row, or of each group: one by one, the earlier of equals."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    width = scores.shape[1] if pattern.of is None else pattern.of
    kept = width - int(pattern.sparsity * width + 0.5) if pattern.kept is None else pattern.kept
    for row, line in enumerate(scores.tolist()):
        for start in range(0, len(line), width):
            best = sorted(range(start, start + width), key=lambda column: (-line[column], column))
            mask[row, best[:kept]] = True
    return mask


def by_matrix(scores: Tensor, removed: int) -> Tensor:
    """The mask that removes the least of all: of equals the later column, and in a column the later row."""
    rows, columns = scores.shape
    line = scores.tolist()
    places = [(row, column) for row in range(rows) for column in range(columns)]
    places.sort(key=lambda place: (line[place[0]][place[1]], -place[1], -place[0]))
    mask = torch.ones(rows, columns, dtype=torch.bool)
    for row, column in places[:removed]:
        mask[row, column] = False
    return mask


def best_on_support(weight: Tensor, hessian: Tensor, mask: Tensor, damping: float) -> Tensor:
    """argmin over weights on the support of (w - b)' H (w - b), damped: each row's normal equations, float64."""
    H = hessian.double()
    H = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    best = torch.zeros(weight.shape, dtype=torch.float64)
    for row, stays in enumerate(mask):
        if bool(stays.any()):
            right = (H @ weight[row].double())[stays]
            best[row, stays] = torch.linalg.solve(H[stays][:, stays], right)
    return best


def loss(weight: Tensor, dense: Tensor, hessian: Tensor, damping: float = 0.0) -> Tensor:
    """(w - q)' H (w - q) of each row, float64, with the damping where it is given."""
    H, error = hessian.double(), weight.double() - dense.double()
    return ((error @ H) * error).sum(1) + damping * H.diagonal().mean() * error.square().sum(1)
