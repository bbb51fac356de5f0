"""Where the grid points lie: scales and zero points for groups of weights, and rounding onto them.

The scale of a group is searched by the error it causes, each column's error weighted by what it costs
(`importance`): shrinking the range clips the largest weights and serves all others with a finer grid, worth
as much as the method itself at 2 and 3 bits. Two things are done that minimum-maximum search does not:

* A symmetric b-bit grid has one more point below zero than above. The scale's *sign* chooses the side that
  gets it (decoding `value * scale` does not care), which at 2 bits is a quarter of all points.
* The best shrunk scale is refined in closed form: for fixed integers the error is quadratic in the scale.

Scales are rounded to the dtype in which they are stored before any integer is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.schemes import Scheme

# Rows of a chunk are chosen so that its temporaries stay in the second-level cache.
_CHUNK_WEIGHTS = 1 << 17

# Bits → (shares of the full range that are tried, closed-form refinements of the best). Fewer bits clip more.
SEARCH: dict[int, tuple[tuple[float, ...], int]] = {
    2: (tuple(1 - 0.05 * n for n in range(14)), 2),
    3: (tuple(1 - 0.05 * n for n in range(12)), 2),
    4: (tuple(1 - 0.07 * n for n in range(5)), 1),
    8: ((1.0, 0.95, 0.9), 1),
}


@dataclass(frozen=True)
class Grid:
    """scale [rows, groups] in the stored dtype; zero_point int8 [rows, groups] or None; of one scheme."""

    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme

    def rows(self, part: slice) -> Grid:
        """The grid of some rows."""
        zero = None if self.zero_point is None else self.zero_point[part]
        return Grid(self.scale[part], zero, self.scheme)

    def fill(self, part: slice, other: Grid) -> None:
        """Take over another grid for some rows."""
        self.scale[part] = other.scale
        if self.zero_point is not None and other.zero_point is not None:
            self.zero_point[part] = other.zero_point


def empty_grid(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """A grid for weight [rows, in] that has yet to be filled."""
    shape = (weight.shape[0], scheme.groups(weight.shape[1]))
    scale = torch.empty(shape, dtype=dtype, device=weight.device)
    zero = None if scheme.symmetric else torch.empty(shape, dtype=torch.int8, device=weight.device)
    return Grid(scale, zero, scheme)


def search_grid(
    weight: Tensor, scheme: Scheme, dtype: torch.dtype, importance: Tensor | None = None,
    shrinks: tuple[float, ...] = (1.0,), refinements: int = 0,
) -> Grid:
    """The grid of least weighted rounding error.

    Args:
        weight: floating [rows, in].
        scheme: its group size divides `in`.
        dtype: of the stored scale.
        importance: float32 [in], cost of a squared error in each column; None weighs all alike.
        shrinks: shares of the full range that are tried, 1.0 for minimum-maximum.
        refinements: closed-form updates of the best scale.
    """
    rows, columns = weight.shape
    groups, grid = scheme.groups(columns), empty_grid(weight, scheme, dtype)
    cost = torch.ones(columns, device=weight.device) if importance is None else importance
    cost = cost.reshape(groups, -1)
    step = max(1, _CHUNK_WEIGHTS // columns)
    for start in range(0, rows, step):
        part = weight[start : start + step].float().reshape(-1, groups, columns // groups)
        best_scale, best_zero = _search(part, cost, scheme, dtype, shrinks, refinements)
        grid.scale[start : start + step] = best_scale
        if grid.zero_point is not None and best_zero is not None:
            grid.zero_point[start : start + step] = best_zero.to(torch.int8)
    return grid


def round_to(weight: Tensor, grid: Grid) -> Tensor:
    """Nearest grid points of weight [rows, in], as int8 values."""
    rows, columns = weight.shape
    groups = grid.scale.shape[1]
    values = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    step = max(1, _CHUNK_WEIGHTS // columns)
    for start in range(0, rows, step):
        part = weight[start : start + step].float().reshape(-1, groups, columns // groups)
        inverse = grid.scale[start : start + step].float().reciprocal().unsqueeze(-1)
        zero = None if grid.zero_point is None else grid.zero_point[start : start + step].float().unsqueeze(-1)
        points = _integers(part, inverse, zero, grid.scheme)
        values[start : start + step] = points.reshape(-1, columns).to(torch.int8)
    return values


def _integers(part: Tensor, inverse: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    points = part * inverse
    if zero is not None:
        points += zero
    return points.round_().clamp_(scheme.qmin, scheme.qmax)


def _search(
    part: Tensor, cost: Tensor, scheme: Scheme, dtype: torch.dtype, shrinks: tuple[float, ...], refinements: int
) -> tuple[Tensor, Tensor | None]:
    """Best (scale, zero_point) [rows, groups] for part [rows, groups, size] and cost [groups, size]."""
    high = part.amax(-1).clamp_min(0)
    low = part.amin(-1).clamp_max(0)
    best: tuple[Tensor, Tensor, Tensor | None] | None = None
    for shrink in shrinks:
        for scale, zero in _candidates(low * shrink, high * shrink, scheme, dtype):
            best = _better(best, _loss(part, cost, scale, zero, scheme), scale, zero)
    assert best is not None  # there is at least one shrink
    for _ in range(refinements):
        scale = _refined(part, cost, best[1], best[2], scheme, dtype)
        best = _better(best, _loss(part, cost, scale, best[2], scheme), scale, best[2])
    return best[1], best[2]


def _candidates(
    low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor | None]]:
    """Scales (and zero points) whose grids cover [low, high], one for each side the extra point can lie on."""
    below, above = float(-scheme.qmin), float(scheme.qmax)
    if scheme.symmetric:
        upright = torch.maximum(high / above, -low / below)
        mirrored = torch.maximum(high / below, -low / above)
        return [(stored_scale(upright, dtype), None), (stored_scale(-mirrored, dtype), None)]
    scale = stored_scale((high - low) / (below + above), dtype)
    zero = (scheme.qmin - low / scale.float()).round_().clamp_(scheme.qmin, scheme.qmax)
    return [(scale, zero)]


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the stored dtype; an all-zero group gets scale 1, and none underflows to zero."""
    tiny = torch.finfo(dtype).tiny
    sign = torch.where(scale < 0, -1.0, 1.0)
    scale = torch.where(scale == 0, torch.ones_like(scale), sign * scale.abs().clamp_min(tiny))
    return scale.to(dtype)


def _loss(part: Tensor, cost: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Weighted squared rounding error [rows, groups]."""
    step = scale.float().unsqueeze(-1)
    offset = None if zero is None else zero.unsqueeze(-1)
    points = _integers(part, step.reciprocal(), offset, scheme)
    if offset is not None:
        points -= offset
    points.mul_(step).sub_(part).square_().mul_(cost)
    return points.sum(-1)


def _refined(
    part: Tensor, cost: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, dtype: torch.dtype
) -> Tensor:
    """argmin over s of sum cost (w - (q - z) s)² with q the integers at the present scale."""
    offset = None if zero is None else zero.unsqueeze(-1)
    points = _integers(part, scale.float().reciprocal().unsqueeze(-1), offset, scheme)
    if offset is not None:
        points -= offset
    weighted = points * cost
    norm = (weighted * points).sum(-1)
    refined = (weighted * part).sum(-1) / norm
    return stored_scale(torch.where(norm > 0, refined, scale.float()), dtype)


def _better(
    best: tuple[Tensor, Tensor, Tensor | None] | None, loss: Tensor, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Element by element the candidate with the smaller loss."""
    if best is None:
        return loss, scale, zero
    better = loss < best[0]
    kept = None
    if zero is not None and best[2] is not None:
        kept = torch.where(better, zero, best[2])
    return torch.where(better, loss, best[0]), torch.where(better, scale, best[1]), kept
