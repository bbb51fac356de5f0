"""Rounding to nearest, plain and with searched clipping, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.layers import gram_of, inputs, stats_of, weights
from torch import Tensor

from llmcomp.methods.rtn import rtn, rtn_clip
from llmcomp.schemes import BITS, Scheme
from llmcomp.weights import QuantizedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
schemes = st.builds(Scheme, st.sampled_from(BITS), st.sampled_from((None, 32, 64)), st.booleans())


def exact(held: QuantizedWeight) -> Tensor:
    """(values - zero_point) * scale in float64, before a reader's dtype rounds it."""
    rows, columns = held.values.shape
    grouped = held.values.double().reshape(rows, held.scale.shape[1], -1)
    if held.zero_point is not None:
        grouped = grouped - held.zero_point.double().unsqueeze(-1)
    return (grouped * held.scale.double().unsqueeze(-1)).reshape(rows, columns)


@settings(max_examples=40, deadline=None)
@given(schemes, st.sampled_from(DTYPES), st.integers(0, 999))
def test_no_other_integer_is_nearer(scheme: Scheme, dtype: torch.dtype, seed: int) -> None:
    weight = weights(5, 64, seed, dtype)
    held = rtn(weight, None, scheme, dtype).weight
    assert held.scale.dtype == dtype
    error = (weight.double() - exact(held)).abs()
    for step in (-1, 1):
        moved = (held.values.int() + step).clamp(scheme.qmin, scheme.qmax).to(torch.int8)
        other = QuantizedWeight(moved, held.scale, held.zero_point, scheme)
        assert bool((error <= (weight.double() - exact(other)).abs() + 1e-7).all())


@settings(max_examples=40, deadline=None)
@given(schemes, st.sampled_from(DTYPES), st.integers(0, 999))
def test_searched_clipping_has_the_smaller_weighted_error(
    scheme: Scheme, dtype: torch.dtype, seed: int
) -> None:
    x, weight = inputs(100, 64, seed), weights(8, 64, seed, dtype)
    diagonal = x.double().square().sum(0)

    def weighted(held: QuantizedWeight) -> Tensor:
        return ((weight.double() - exact(held)).square() * diagonal).sum(1)

    clipped = weighted(rtn_clip(weight, stats_of(x), scheme, dtype).weight)
    full = weighted(rtn(weight, stats_of(x), scheme, dtype).weight)
    assert bool((clipped <= full * (1 + 1e-5)).all())


@pytest.mark.parametrize("method", [rtn, rtn_clip])
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_measured_with_the_gram_matrix_on_decoded_weights(method, dtype: torch.dtype) -> None:
    x, weight = inputs(200, 64, 1), weights(1030, 64, 1, dtype)  # more rows than are measured at a time
    solution = method(weight, stats_of(x), Scheme(4, 32), dtype)
    H, error = gram_of(x), weight.double() - solution.weight.dense().double()
    assert torch.allclose(solution.row_error, ((error @ H) * error).sum(1), rtol=1e-4)
    assert torch.allclose(solution.row_norm, ((weight.double() @ H) * weight.double()).sum(1), rtol=1e-4)
    assert solution.damping is None
    assert solution.fallback is None


def test_rounding_needs_no_statistics_and_does_not_depend_on_them() -> None:
    weight = weights(6, 64, 2)
    without = rtn(weight, None, Scheme(3, 32, False), torch.float32)
    with_stats = rtn(weight, stats_of(inputs(50, 64, 2)), Scheme(3, 32, False), torch.float32)
    assert without.row_error is None
    assert without.row_norm is None
    assert torch.equal(without.weight.values, with_stats.weight.values)
    assert torch.equal(without.weight.scale, with_stats.weight.scale)


def test_dead_columns_are_counted_and_rounded() -> None:
    x, weight = inputs(50, 64, 3), weights(6, 64, 3)
    x[:, [3, 40]] = 0
    for method in (rtn, rtn_clip):
        solution = method(weight, stats_of(x), Scheme(4, 32), torch.float32)
        assert solution.dead_columns == 2
        assert float(solution.weight.dense()[:, [3, 40]].abs().min(1).values.max()) > 0


def test_errors_fall_with_the_bits() -> None:
    weight = weights(32, 64, 4)
    for symmetric in (True, False):
        errors = [
            float((weight - rtn(weight, None, Scheme(b, 32, symmetric), torch.float32).weight.dense()).norm())
            for b in BITS
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 50 * errors[-1]


def test_the_weight_is_left_as_it_was() -> None:
    weight, x = weights(6, 64, 5), inputs(50, 64, 5)
    before, stats = weight.clone(), stats_of(x)
    rtn(weight, stats, Scheme(2, 32), torch.float32)
    rtn_clip(weight, stats, Scheme(2, 32), torch.float32)
    assert torch.equal(weight, before)
    assert stats.gram is not None
    assert torch.equal(stats.gram, stats_of(x).gram)
