"""GPTQ twice, in float64 and one weight at a time: as its paper's code does it, and in QuIP's LDL form.

Slow and obvious on purpose. Both take a static grid and an order of columns, so that what they choose can be
compared integer by integer. Rows are independent: where a target lies within a hair of the middle between two
grid points, float32 may round it the other way and the rest of that row differs. `Rounded.margin` says how
close each row came to that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.schemes import Scheme


@dataclass
class StaticGrid:
    """scale [rows, groups] as stored, zero_point [rows, groups] or None."""

    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme

    def place(self, row: int, column: int, columns: int) -> tuple[Tensor, int]:
        """(scale in the stored dtype, zero point) of one weight."""
        group = column // (columns // self.scale.shape[1])
        zero = 0 if self.zero_point is None else int(self.zero_point[row, group])
        return self.scale[row, group], zero

    def round(self, target: float, row: int, column: int, columns: int) -> tuple[int, float, float]:
        """(integer, the value a reader decodes, distance to the nearest tie) of one weight."""
        scale, zero = self.place(row, column, columns)
        exact = target / float(scale) + zero
        low, high = self.scheme.qmin, self.scheme.qmax
        integer = min(max(round(exact), low), high)
        # Beyond the ends there is no tie; between them it lies half-way between two integers.
        margin = 1.0 if exact < low or exact > high else abs(abs(exact - round(exact)) - 0.5)
        # A reader multiplies in the dtype of the scale.
        decoded = torch.tensor(integer - zero, dtype=scale.dtype) * scale
        return integer, float(decoded), margin


@dataclass
class Rounded:
    """values int64 [rows, in]; dense float64 [rows, in]; margin float64 [rows]; loss float64 [rows] or None."""

    values: Tensor
    dense: Tensor
    margin: Tensor
    loss: Tensor | None = None

    @classmethod
    def empty(cls, weight: Tensor) -> Rounded:
        rows = weight.shape[0]
        return cls(
            torch.zeros(weight.shape, dtype=torch.int64),
            torch.zeros(weight.shape, dtype=torch.float64),
            torch.ones(rows, dtype=torch.float64),
            torch.zeros(rows, dtype=torch.float64),
        )

    def choose(self, grid: StaticGrid, targets: Tensor, column: int) -> Tensor:
        """Round one column's targets [rows]; the decoded values."""
        for row, target in enumerate(targets.tolist()):
            integer, decoded, margin = grid.round(target, row, column, self.values.shape[1])
            self.values[row, column] = integer
            self.dense[row, column] = decoded
            self.margin[row] = min(float(self.margin[row]), margin)
        return self.dense[:, column]


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) * I, float64."""
    H = hessian.double()
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


def gptq(weight: Tensor, hessian: Tensor, grid: StaticGrid, order: Tensor, damping: float) -> Rounded:
    """Frantar et al. 2022 (arXiv:2210.17323), algorithm 1 without its blocks, and as its code writes it:
    the upper Cholesky factor of the inverse, whose row k spreads column k's error over the later columns."""
    H = damped(hessian, damping)[order][:, order]
    W = weight.double()[:, order].clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    result = Rounded.empty(weight)
    for k in range(W.shape[1]):
        quantized = result.choose(grid, W[:, k].clone(), int(order[k]))
        error = (W[:, k] - quantized) / upper[k, k]
        for j in range(k, W.shape[1]):
            W[:, j] -= error * upper[k, j]
    return result


def quip(weight: Tensor, hessian: Tensor, grid: StaticGrid, order: Tensor, damping: float) -> Rounded:
    """Chee et al. 2023 (arXiv:2307.13304), LDLQ: H = (U + I) D (U + I)' with U strictly upper triangular, and
    each column's target is its weight plus the errors of the earlier columns times U."""
    H = damped(hessian, damping)[order][:, order]
    W = weight.double()[:, order]
    n = W.shape[1]
    unit, D = torch.eye(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for k in range(n - 1, -1, -1):
        D[k] = H[k, k] - sum(unit[k, j] ** 2 * D[j] for j in range(k + 1, n))
        for i in range(k):
            products = (unit[i, k + 1 :] * unit[k, k + 1 :] * D[k + 1 :]).sum()
            unit[i, k] = (H[i, k] - products) / D[k]
    result = Rounded.empty(weight)
    assert result.loss is not None
    error = torch.zeros_like(W)
    for k in range(n):
        target = W[:, k] + error[:, :k] @ unit[:k, k]
        quantized = result.choose(grid, target, int(order[k]))
        error[:, k] = W[:, k] - quantized
        result.loss += D[k] * (target - quantized) ** 2
    return result


def row_loss(weight: Tensor, dense: Tensor, hessian: Tensor) -> Tensor:
    """(w - q)' H (w - q) of each row, float64."""
    error = weight.double() - dense.double()
    return torch.stack([e @ hessian.double() @ e for e in error])
