"""Grids: stored scales, both sides of a symmetric grid, search that never does worse, nothing divided by zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.layers import weights
from torch import Tensor

from llmcomp.methods._grid import SEARCH, Grid, round_to, search_grid
from llmcomp.schemes import BITS, Scheme
from llmcomp.weights import QuantizedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
schemes = st.builds(Scheme, st.sampled_from(BITS), st.sampled_from((None, 32, 64)), st.booleans())
importances = st.booleans()


def points(values: Tensor, grid: Grid) -> Tensor:
    """Exact grid points of the stored scale, float64: (values - zero_point) * scale."""
    rows, columns = values.shape
    grouped = values.double().reshape(rows, grid.scale.shape[1], -1)
    if grid.zero_point is not None:
        grouped = grouped - grid.zero_point.double().unsqueeze(-1)
    return (grouped * grid.scale.double().unsqueeze(-1)).reshape(rows, columns)


def weighted_loss(weight: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    """[rows, groups], float64."""
    error = (weight.double() - points(round_to(weight, grid), grid)).square() * importance.double()
    return error.reshape(weight.shape[0], grid.scale.shape[1], -1).sum(-1)


def cost(columns: int, seed: int) -> Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(seed)).mul(1.5).exp()


@settings(max_examples=60, deadline=None)
@given(schemes, st.sampled_from(DTYPES), st.integers(0, 999), st.booleans())
def test_every_weight_goes_to_the_nearest_point_of_the_stored_grid(
    scheme: Scheme, dtype: torch.dtype, seed: int, searched: bool
) -> None:
    weight = weights(5, 128, seed)
    grid = search_grid(
        weight, scheme, dtype, cost(128, seed), *(SEARCH[scheme.bits] if searched else ((1.0,), 0))
    )
    assert grid.scale.dtype == dtype
    assert grid.scale.shape == (5, scheme.groups(128))
    values = round_to(weight, grid)
    assert values.dtype == torch.int8
    assert int(values.min()) >= scheme.qmin
    assert int(values.max()) <= scheme.qmax
    chosen = (weight.double() - points(values, grid)).abs()
    for integer in range(scheme.qmin, scheme.qmax + 1, max(1, 2**scheme.bits // 16)):
        other = (weight.double() - points(torch.full_like(values, integer), grid)).abs()
        assert bool((chosen <= other + 1e-6 * weight.abs().max()).all())


@settings(max_examples=40, deadline=None)
@given(schemes, st.sampled_from(DTYPES), st.integers(0, 999))
def test_the_full_range_covers_every_weight(scheme: Scheme, dtype: torch.dtype, seed: int) -> None:
    """Up to half a step, and what rounding the scale to few bits takes from the ends."""
    weight = weights(4, 64, seed)
    grid = search_grid(weight, scheme, dtype)
    error = (weight.double() - points(round_to(weight, grid), grid)).abs()
    step = grid.scale.double().abs().repeat_interleave(64 // grid.scale.shape[1], 1)
    slack = step * 2**scheme.bits * float(torch.finfo(dtype).eps)
    assert bool((error <= 0.5 * step + slack + 1e-9).all())


@settings(max_examples=60, deadline=None)
@given(schemes, st.sampled_from(DTYPES), st.integers(0, 999))
def test_a_searched_grid_never_does_worse_than_the_full_range(
    scheme: Scheme, dtype: torch.dtype, seed: int
) -> None:
    weight, importance = weights(6, 128, seed), cost(128, seed)
    searched = search_grid(weight, scheme, dtype, importance, *SEARCH[scheme.bits])
    full = search_grid(weight, scheme, dtype)
    found, floor = (weighted_loss(weight, grid, importance) for grid in (searched, full))
    assert bool((found <= floor * (1 + 1e-5)).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_is_worth_its_time_at_few_bits(symmetric: bool) -> None:
    weight, importance = weights(64, 256, 0), cost(256, 0)
    for bits, gain in ((2, 0.75), (3, 0.85), (4, 0.97)):
        scheme = Scheme(bits, 64, symmetric)
        searched = search_grid(weight, scheme, torch.float32, importance, *SEARCH[bits])
        full = search_grid(weight, scheme, torch.float32)
        found, floor = (float(weighted_loss(weight, grid, importance).sum()) for grid in (searched, full))
        assert found < gain * floor


def test_what_weighs_more_is_served_better() -> None:
    weight = weights(16, 64, 3)
    heavy = torch.ones(64)
    heavy[:8] = 1e4
    even, uneven = (search_grid(weight, Scheme(2, None), torch.float32, c, *SEARCH[2]) for c in (None, heavy))
    errors = [(weight - points(round_to(weight, g), g))[:, :8].square().sum() for g in (even, uneven)]
    assert float(errors[1]) < 0.7 * float(errors[0])


@pytest.mark.parametrize("bits", BITS)
def test_a_negative_scale_gives_the_extra_point_to_the_side_that_needs_it(bits: int) -> None:
    """The lowest integer has no positive twin; the sign of the scale puts it where the largest weight lies."""
    scheme, steps = Scheme(bits, None), float(1 << (bits - 1))
    weight = torch.linspace(-(steps - 1), steps - 1, int(2 * steps - 1)).repeat(2, 1)
    weight = torch.cat([weight, torch.tensor([[steps], [-steps]])], 1)
    grid = search_grid(weight, scheme, torch.float32)
    assert grid.scale.flatten().tolist() == [-1.0, 1.0]
    assert torch.equal(points(round_to(weight, grid), grid).float(), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_zeros_decode_to_zero(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    scheme = Scheme(bits, 32, symmetric)
    weight = weights(4, 64, 0)
    weight[1] = 0  # a row
    weight[2, :32] = 0  # a group
    weight[3] = weight[3].abs() + 0.1  # and zero is a point also where all lie on one side of it
    weight[3, 5] = 0
    for searched in (SEARCH[bits], ((1.0,), 0)):
        grid = search_grid(weight, scheme, dtype, cost(64, 0), *searched)
        assert bool((grid.scale != 0).all())
        assert bool(grid.scale.isfinite().all())
        decoded = QuantizedWeight(round_to(weight, grid), grid.scale, grid.zero_point, scheme).dense()
        assert float(decoded[weight == 0].abs().max()) == 0
    everything = search_grid(torch.zeros(2, 64), scheme, dtype, torch.zeros(64), *SEARCH[bits])
    values = round_to(torch.zeros(2, 64), everything)
    assert (
        float(QuantizedWeight(values, everything.scale, everything.zero_point, scheme).dense().abs().max())
        == 0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_smallest_weights_do_not_make_a_scale_of_zero(symmetric: bool, dtype: torch.dtype) -> None:
    tiny = float(torch.finfo(dtype).tiny)
    weight = torch.tensor([[tiny, -tiny, tiny / 2, 0.0] * 8])
    grid = search_grid(weight, Scheme(8, None, symmetric), dtype, None, *SEARCH[8])
    assert bool((grid.scale.abs() >= tiny).all())
    assert bool(points(round_to(weight, grid), grid).isfinite().all())


@pytest.mark.parametrize("scheme", [Scheme(4, 128), Scheme(3, None, False)])
def test_rows_do_not_depend_on_how_many_are_searched_at_once(scheme: Scheme) -> None:
    weight, importance = weights(3000, 128, 1), cost(128, 1)
    whole = search_grid(weight, scheme, torch.bfloat16, importance, *SEARCH[scheme.bits])
    values = round_to(weight, whole)
    for part in (slice(0, 1), slice(1023, 1026), slice(2999, 3000)):
        alone = search_grid(weight[part], scheme, torch.bfloat16, importance, *SEARCH[scheme.bits])
        assert torch.equal(alone.scale, whole.rows(part).scale)
        assert torch.equal(round_to(weight[part], alone), values[part])
        if alone.zero_point is not None and whole.zero_point is not None:
            assert torch.equal(alone.zero_point, whole.zero_point[part])
