"""How much an unstructured pattern removes of each weight, under one budget for all.

Each weight brings the loss it takes at a few sparsities, in units that compare between weights (such as e' H e summed
over its rows, not relative to anything). Between two of them the loss is taken as linear, and of all curves the lower
convex hull: any mix of two sparsities can be had by removing more in some rows than in others. Then what is cheapest
is removed first, piece after piece of falling worth, and that is optimal for these curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from llmcomp.errors import BadRecipe

Curve = Sequence[tuple[float, float]]


def allocate(
    curves: Mapping[str, Curve], sizes: Mapping[str, int], removed: int, low: float = 0.0, high: float = 1.0
) -> dict[str, float]:
    """The sparsity of each weight that costs least, `removed` weights being removed in all.

    Args:
        curves: of each weight, (sparsity, loss) at some sparsities in [0, 1]; no removal is taken to cost nothing
            where it is not among them. No weight is removed beyond the last.
        sizes: how many weights each has, of the same names.
        removed: the budget.
        low: every sparsity is at least so much. high: and at most so much.

    Returns:
        {name: sparsity}; `round(sparsity * size)` adds up to the budget exactly. In the order of `curves`.

    Raises:
        BadRecipe: a budget that the bounds leave no room for, a curve with fewer than two points, or one that repeats
            a sparsity.
    """
    floors, pieces = {}, []
    for place, (name, curve) in enumerate(curves.items()):
        size, points = sizes[name], _hull(name, curve)
        last = min(high, points[-1][0])
        start = min(_whole(low * size, up=True), size)
        floors[name] = start
        for (left, below), (right, above) in pairwise(points):
            first, stop = max(_whole(left * size), start), min(_whole(right * size), _whole(last * size))
            if stop > first:
                pieces.append(((above - below) / ((right - left) * size), place, first, name, stop - first))
    counts, room = floors, removed - sum(floors.values())
    most = sum(floors.values()) + sum(piece[-1] for piece in pieces)
    if room < 0 or removed > most:
        raise BadRecipe(
            f"{removed} weights cannot be removed: sparsities of {low:g} to {high:g}, and none above what is measured, "
            f"remove {sum(floors.values())} to {most}."
        )
    for _, _, _, name, count in sorted(pieces):
        taken = min(room, count)
        counts[name] += taken
        room -= taken
    return {name: count / sizes[name] for name, count in counts.items()}


def _hull(name: str, curve: Curve) -> list[tuple[float, float]]:
    """The lower convex hull of a curve, from no removal to its last point."""
    points = sorted(curve)
    if points and points[0][0] > 0:
        points = [(0.0, 0.0), *points]
    shares = [share for share, _ in points]
    if len(points) < 2 or len(set(shares)) < len(shares) or not 0 <= shares[0] <= shares[-1] <= 1:
        raise BadRecipe(
            f"The losses of {name} must stand at two or more different sparsities between 0 and 1, not at {shares}."
        )
    hull: list[tuple[float, float]] = []
    for share, loss in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (share, loss)):
            hull.pop()
        hull.append((share, loss))
    return hull


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


def _whole(count: float, up: bool = False) -> int:
    """A number of weights: the next below (or above), unless float's own rounding is all that parts it from the
    nearest."""
    nearest = round(count)
    if abs(count - nearest) < 1e-6:
        return nearest
    return int(count) + up
