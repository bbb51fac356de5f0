"""The budget is met exactly, within bounds, and no other allocation on the same curves costs less."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcomp.calibration.stats import GramAccumulator
from llmcomp.errors import BadRecipe
from llmcomp.methods import SPARSE
from llmcomp.methods.allocation import allocate, around, balanced, by_whole_columns, measured
from llmcomp.patterns import Pattern

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


# --- what is measured, and in which units ---


@given(st.floats(0.001, 0.999))
def test_levels_lie_around_the_middle(sparsity: float) -> None:
    found = around(sparsity)
    assert len(found) == 9 and found[4] == pytest.approx(sparsity, abs=1e-6)
    assert all(0 < low <= high < 1 for low, high in itertools.pairwise(found))
    assert found[-1] - found[0] <= 0.4 + 1e-6


@pytest.mark.parametrize("rows", [24, 300])
@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "magnitude"])
def test_losses_are_those_of_the_outputs(name: str, rows: int) -> None:
    """Against the outputs themselves in float64, of the rows that stand for all."""
    generator = torch.Generator().manual_seed(rows)
    weight, inputs = (torch.randn(size, generator=generator) for size in ((rows, 32), (200, 32)))
    method = SPARSE[name]
    gathered = GramAccumulator()
    gathered.add(inputs)
    stats = gathered.finish("a")
    found = measured(
        weight, around(0.5), lambda some, pattern: method.function(some, stats, pattern, some.dtype, method.config())
    )
    some = weight[:: max(1, rows // 128)]
    for share, loss in found:
        gathered.add(inputs)
        pattern = Pattern(removed=share)
        made = method.function(some, gathered.finish("a"), pattern, some.dtype, method.config()).weight.dense()
        apart = inputs.double() @ (some - made).double().T
        assert loss == pytest.approx(float(apart.square().sum()) * rows / len(some), rel=2e-3)
    assert [loss for _, loss in found] == sorted(loss for _, loss in found)


def test_without_statistics_losses_are_those_of_the_weights() -> None:
    weight = torch.linspace(-1, 1, 64).view(4, 16)
    magnitude = SPARSE["magnitude"]
    ((_, loss),) = measured(
        weight, [0.5], lambda some, pattern: magnitude.function(some, None, pattern, some.dtype, magnitude.config())
    )
    assert loss == pytest.approx(float(weight.flatten().square().sort().values[:32].sum()), rel=1e-5)


def test_balanced_curves_meet_in_the_middle() -> None:
    assert balanced([(0.3, 1.0), (0.5, 4.0), (0.7, 8.0)], 100) == [(0.3, 25.0), (0.5, 100.0), (0.7, 200.0)]
    silent = [(0.3, 0.0), (0.5, 0.0), (0.7, 1.0)]
    assert balanced(silent, 100) == silent


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40), st.floats(0.1, 0.9)), min_size=1, max_size=8))
def test_whole_columns_keep_the_budget_to_half_a_column(found: list[tuple[int, int, float]]) -> None:
    sparsities = {str(n): share for n, (*_, share) in enumerate(found)}
    sizes = {str(n): rows * width for n, (rows, width, _) in enumerate(found)}
    widths = {str(n): width for n, (_, width, _) in enumerate(found)}
    whole = by_whole_columns(sparsities, sizes, widths)
    columns = {name: whole[name] * widths[name] for name in whole}
    assert all(abs(one - round(one)) < 1e-9 and 1 <= round(one) < widths[name] for name, one in columns.items())
    if all(1.6 <= sparsities[name] * width <= width - 1.6 for name, width in widths.items()):  # no bound is met
        missing = sum((sparsities[name] - whole[name]) * size for name, size in sizes.items())
        assert abs(missing) <= max(sizes[name] / widths[name] for name in sizes) / 2 + 1e-6
    assert by_whole_columns(sparsities, sizes, {}) == sparsities
