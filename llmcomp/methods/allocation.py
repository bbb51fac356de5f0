"""How much an unstructured pattern removes of each weight, under one budget for all.

Each weight brings the loss it takes at a few sparsities (`measured`), in units that compare between weights
(`balanced`). Between two of them the loss is taken as linear, and of all curves the lower
convex hull: any mix of two sparsities can be had by removing more in some rows than in others. Then what is cheapest
is removed first, piece after piece of falling worth, and that is optimal for these curves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from llmcomp.errors import BadRecipe
from llmcomp.methods.solution import Solution
from llmcomp.patterns import Pattern

Curve = Sequence[tuple[float, float]]

_REACH = 0.2  # how far a weight may be from the sparsity of all
_POINTS = 4  # at which losses are measured below that sparsity, and as many above
_SAMPLED_ROWS = 128


def around(sparsity: float) -> tuple[float, ...]:
    """Sparsities at which a weight is measured where all together are to have one: that one in the middle.

    >>> around(0.5)
    (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
    >>> around(0.96)[-2:]
    (0.97, 0.98)
    """
    low, high = max(sparsity - _REACH, sparsity / 2), min(sparsity + _REACH, (1 + sparsity) / 2)
    below = [low + (sparsity - low) * n / _POINTS for n in range(_POINTS)]
    above = [sparsity + (high - sparsity) * n / _POINTS for n in range(1, _POINTS + 1)]
    return tuple(round(share, 6) for share in (*below, sparsity, *above))


def measured(weight: Tensor, sparsities: Sequence[float], remove: Callable[[Tensor, Pattern], Solution]) -> Curve:
    """The loss of weight [out, in] at some sparsities, from rows that stand for all where there are many.

    Args:
        remove: (some rows, an unstructured pattern) → what a method makes of them. Its loss is that of the outputs, as
            it measures it; without statistics, that of the weights.
    """
    rows = weight[:: max(1, len(weight) // _SAMPLED_ROWS)]
    curve = []
    for sparsity in sparsities:
        solution = remove(rows, Pattern(removed=sparsity))
        if solution.row_error is None:
            loss = (rows.double() - solution.weight.dense().double()).square().sum(1).mean()
        else:
            loss = solution.row_error.nanmean()
        curve.append((sparsity, float(loss) * len(weight)))
    return curve


def balanced(curve: Curve, size: int) -> Curve:
    """The same in units in which each of a matrix's `size` weights counts alike: at the sparsity in the middle, which
    all together are to have, the loss of each matrix is its size. A matrix that loses nothing there stays as it is.

    As ranks are shared out (`rank_budget.balanced`), and for the same reason: losses of outputs as they are measured do
    not add up. On a small trained decoder at 70%, by SparseGPT, perplexity is 81.3 with losses as they are, 85.4 with
    each as a share of its output, 66.3 in these units, and 66.4 with one sparsity for all (one run each).
    """
    middle = curve[len(curve) // 2][1]
    return [(sparsity, loss * size / middle) for sparsity, loss in curve] if middle > 0 else curve


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


def by_whole_columns(
    sparsities: Mapping[str, float], sizes: Mapping[str, int], widths: Mapping[str, int]
) -> dict[str, float]:
    """Sparsities that remove equally many weights of each row, where a method does so; what that rounds away of one
    matrix is made up for by the next.

    Args:
        sizes: how many weights each has. widths: in_features of those that are concerned.
    """
    found, missing = dict(sparsities), 0.0
    for name, width in widths.items():
        rows = sizes[name] // width
        wanted = sparsities[name] * width + missing / rows
        columns = min(max(round(wanted), 1), width - 1)
        missing = (wanted - columns) * rows
        found[name] = columns / width
    return found


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
