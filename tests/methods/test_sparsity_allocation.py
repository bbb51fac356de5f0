"""The budget is met exactly, within bounds, and no other allocation on the same curves costs less."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcomp.errors import BadRecipe
from llmcomp.methods.allocation import allocate

SHARES = (0.25, 0.5, 0.75)
losses = st.lists(st.floats(0, 10), min_size=3, max_size=3)
layers = st.lists(st.tuples(losses, st.integers(1, 500)), min_size=1, max_size=6)


@settings(deadline=None)
@given(layers, st.floats(0, 1), st.floats(0, 0.2), st.floats(0.3, 0.9))
def test_the_total_is_exact_and_bounds_hold(
    found: list[tuple[list[float], int]], share: float, low: float, high: float
) -> None:
    curves = {str(n): list(zip(SHARES, loss, strict=True)) for n, (loss, _) in enumerate(found)}
    sizes = {str(n): size for n, (_, size) in enumerate(found)}
    least = sum(-int(-low * size // 1) for size in sizes.values())
    most = sum(int(min(high, 0.75) * size) for size in sizes.values())
    if least > most:
        return
    budget = least + int(share * (most - least))
    sparsities = allocate(curves, sizes, budget, low, high)
    assert list(sparsities) == list(curves)
    counts = {name: round(sparsity * sizes[name]) for name, sparsity in sparsities.items()}
    assert sum(counts.values()) == budget
    for name, count in counts.items():
        assert sparsities[name] == count / sizes[name]
        assert low * sizes[name] - 1e-6 <= count
        assert count <= max(min(high, 0.75) * sizes[name] + 1e-6, -int(-low * sizes[name] // 1))


def lost(curve: list[tuple[float, float]], sparsity: float) -> float:
    """A convex curve between its points."""
    points = [(0.0, 0.0), *curve]
    for (left, below), (right, above) in itertools.pairwise(points):
        if sparsity <= right:
            return below + (above - below) * (sparsity - left) / (right - left)
    raise AssertionError(sparsity)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(0, 5), min_size=3, max_size=3), min_size=2, max_size=3), st.integers(1, 20))
def test_nothing_costs_less_where_curves_are_convex(steps: list[list[float]], budget: int) -> None:
    curves = {}
    for n, slopes in enumerate(steps):
        heights = list(itertools.accumulate(sorted(slopes)))
        curves[str(n)] = list(zip(SHARES, heights, strict=True))
    sizes = dict.fromkeys(curves, 8)
    budget = min(budget, 6 * len(curves))
    ours = sum(lost(curves[name], share) for name, share in allocate(curves, sizes, budget).items())
    every = itertools.product(range(7), repeat=len(curves))
    best = min(
        sum(lost(curve, count / 8) for curve, count in zip(curves.values(), counts, strict=True))
        for counts in every
        if sum(counts) == budget
    )
    assert ours == pytest.approx(best, abs=1e-9)


def test_what_is_cheap_is_removed_first() -> None:
    curves = {"robust": [(0.5, 1.0), (0.9, 2.0)], "frail": [(0.5, 10.0), (0.9, 50.0)]}
    sizes = {"robust": 1000, "frail": 1000}
    assert allocate(curves, sizes, 900) == {"robust": 0.9, "frail": 0.0}
    assert allocate(curves, sizes, 1000) == {"robust": 0.9, "frail": 0.1}
    assert allocate(curves, sizes, 1000, low=0.3, high=0.8) == {"robust": 0.7, "frail": 0.3}


def test_a_bump_is_passed_by() -> None:
    """What a mix of two sparsities does better than the one between counts as that mix."""
    curves = {"bump": [(0.5, 9.0), (1.0, 10.0)], "line": [(0.5, 6.0), (1.0, 12.0)]}
    assert allocate(curves, {"bump": 10, "line": 10}, 10) == {"bump": 1.0, "line": 0.0}


@pytest.mark.parametrize(
    ("curve", "budget", "said"),
    [
        ([(0.5, 1.0), (0.9, 2.0)], 95, "95 weights cannot be removed: .* remove 0 to 90"),
        ([(0.5, 1.0), (0.9, 2.0)], -1, "-1 weights cannot be removed"),
        ([(0.0, 1.0)], 10, "The losses of a must stand at two or more different sparsities"),
        ([(0.5, 1.0), (0.5, 2.0)], 10, "The losses of a must stand at two or more"),
        ([(0.5, 1.0), (1.5, 2.0)], 10, "between 0 and 1, not at"),
    ],
)
def test_what_cannot_be(curve: list[tuple[float, float]], budget: int, said: str) -> None:
    with pytest.raises(BadRecipe, match=said):
        allocate({"a": curve}, {"a": 100}, budget)
