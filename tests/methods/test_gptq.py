"""GPTQ as a whole: against the textbook on its own grid, against rounding, on broken and empty inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gptq as reference
from reference.gptq import StaticGrid
from reference.layers import gram_of, inputs, stats_of, weights
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.errors import BadRecipe
from llmcomp.methods._grid import SEARCH, Grid, round_to, search_grid
from llmcomp.methods.gptq import GPTQConfig, gptq
from llmcomp.methods.rtn import rtn, rtn_clip
from llmcomp.methods.solution import Solution
from llmcomp.schemes import BITS, Scheme
from llmcomp.weights import QuantizedWeight, dequantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
schemes = st.builds(Scheme, st.sampled_from(BITS), st.sampled_from((None, 32, 64)), st.booleans())


def loss(weight: Tensor, solution: Solution, x: Tensor) -> Tensor:
    """||X (w - q)'||² of each row as a reader decodes q, float64."""
    return (x.double() @ (weight.double() - solution.weight.dense().double()).T).square().sum(0)


def rounded_on_the_grid_of(solution: Solution, weight: Tensor) -> Solution:
    held = solution.weight
    values = round_to(weight, Grid(held.scale, held.zero_point, held.scheme))
    return Solution(QuantizedWeight(values, held.scale, held.zero_point, held.scheme))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (Scheme(4, 32), torch.float32),
        (Scheme(4, None, False), torch.bfloat16),
        (Scheme(4, 64, False), torch.float16),
        (Scheme(8, 32), torch.bfloat16),
        (Scheme(8, None), torch.float32),
    ],
)
def test_the_integers_are_the_textbooks_on_the_same_static_grid(
    scheme: Scheme, dtype: torch.dtype, act_order: bool
) -> None:
    x, weight = inputs(400, 128, 1, spread=0.4), weights(16, 128, 1, dtype)
    H, stats = gram_of(x), stats_of(x)
    order = stats.diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(128)
    solution = gptq(weight, stats, scheme, dtype, GPTQConfig(act_order=act_order))
    grid = StaticGrid(solution.weight.scale, solution.weight.zero_point, scheme)
    textbook = reference.gptq(weight.float(), H, grid, order, 0.01)
    clear = textbook.margin > 1e-4  # elsewhere float32 may break a tie the other way
    assert int(clear.sum()) >= 12
    assert torch.equal(solution.weight.values[clear].long(), textbook.values[clear])
    assert torch.equal(solution.weight.dense()[clear].double(), textbook.dense[clear])
    wanted = reference.row_loss(weight, textbook.dense, H)
    assert float(loss(weight, solution, x).sum()) == pytest.approx(float(wanted.sum()), rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_at_few_bits_fitted_scales_err_less_than_the_textbook_on_the_searched_ones(
    bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    x, weight, scheme = inputs(400, 64, 0), weights(16, 64, 0, dtype), Scheme(bits, 32, symmetric)
    H, stats = gram_of(x), stats_of(x)
    order = stats.diagonal.argsort(descending=True, stable=True)
    solution = gptq(weight, stats, scheme, dtype)
    importance = stats.factor.pivots[order.argsort()]
    searched = search_grid(weight, scheme, dtype, importance, *SEARCH[bits])
    grid = StaticGrid(searched.scale, searched.zero_point, scheme)
    textbook = reference.gptq(weight.float(), H, grid, order, 0.01)
    wanted = reference.row_loss(weight, textbook.dense, H)
    assert float(loss(weight, solution, x).sum()) < 0.99 * float(wanted.sum())


@settings(max_examples=30, deadline=None)
@given(schemes, st.sampled_from(DTYPES), st.integers(0, 999), st.integers(2, 600))
def test_compensation_beats_rounding_on_the_same_grid(
    scheme: Scheme, dtype: torch.dtype, seed: int, tokens: int
) -> None:
    x, weight = inputs(tokens, 128, seed), weights(48, 128, seed, dtype)
    solution = gptq(weight, stats_of(x), scheme, dtype)
    rounded = rounded_on_the_grid_of(solution, weight)
    assert float(loss(weight, solution, x).sum()) <= float(loss(weight, rounded, x).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 64])
def test_it_beats_searched_clipping_which_beats_rounding_and_more_bits_err_less(
    group_size: int | None, symmetric: bool
) -> None:
    x, weight = inputs(700, 128, 2), weights(96, 128, 2)
    errors: dict[str, list[float]] = {"gptq": [], "rtn-clip": [], "rtn": []}
    for bits in BITS:
        scheme = Scheme(bits, group_size, symmetric)
        for name, method in (("gptq", gptq), ("rtn-clip", rtn_clip), ("rtn", rtn)):
            solution = method(weight, stats_of(x), scheme, torch.float32)
            errors[name].append(float(loss(weight, solution, x).sum()))
    for found in errors.values():
        assert found == sorted(found, reverse=True)
        assert found[0] > 500 * found[-1]
    for position in range(len(BITS)):
        assert errors["gptq"][position] < 0.8 * errors["rtn-clip"][position]
        assert errors["rtn-clip"][position] < 1.02 * errors["rtn"][position]
    assert errors["rtn-clip"][0] < 0.8 * errors["rtn"][0]


@settings(max_examples=30, deadline=None)
@given(schemes, st.sampled_from(DTYPES), st.integers(0, 999), st.booleans())
def test_the_reported_error_is_that_of_the_weight_a_reader_decodes(
    scheme: Scheme, dtype: torch.dtype, seed: int, act_order: bool
) -> None:
    """At 8 bits a bfloat16 product's rounding is as large as the grid's: it must be part of the account."""
    x, weight = inputs(300, 96 if scheme.group_size != 64 else 128, seed), None
    weight = weights(9, x.shape[1], seed, dtype)
    solution = gptq(weight, stats_of(x), scheme, dtype, GPTQConfig(act_order=act_order))
    held = solution.weight
    assert held.scale.dtype == held.dense().dtype == dtype
    assert torch.equal(held.dense(), dequantize(held.values, held.scale, held.zero_point))
    assert solution.row_error is not None
    assert solution.row_norm is not None
    wanted, norm = loss(weight, solution, x), (x.double() @ weight.double().T).square().sum(0)
    # The damped loss is computed and the damping taken off again: allowed is float32's share of the former.
    damped = (
        0.01
        * stats_of(x).diagonal.double().mean()
        * (weight.double() - held.dense().double()).square().sum(1)
    )
    assert bool(((solution.row_error - wanted).abs() <= 2e-4 * wanted + 2e-5 * damped).all())
    assert torch.allclose(solution.row_norm, norm, rtol=1e-4)


def test_at_eight_bits_the_sweep_compensates_the_rounding_of_the_readers_dtype() -> None:
    x, weight = inputs(700, 128, 3), weights(64, 128, 3, torch.bfloat16)
    solution = gptq(weight, stats_of(x), Scheme(8, None), torch.bfloat16)
    rounded = rounded_on_the_grid_of(solution, weight)
    assert float(loss(weight, solution, x).sum()) < 0.8 * float(loss(weight, rounded, x).sum())


# --- columns and rows ---


@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_columns_are_rounded_not_zeroed(symmetric: bool) -> None:
    x, weight = inputs(300, 128, 4), weights(8, 128, 4)
    dead = torch.tensor([0, 17, 64, 127])
    x[:, dead] = 0
    solution = gptq(weight, stats_of(x), Scheme(4, 32, symmetric), torch.float32)
    assert solution.dead_columns == 4
    values = rounded_on_the_grid_of(solution, weight).weight.values
    assert torch.equal(solution.weight.values[:, dead], values[:, dead])
    error = (weight - solution.weight.dense())[:, dead].abs()
    assert float((solution.weight.dense()[:, dead] != 0).float().mean()) > 0.5
    assert float(error.mean()) < 0.5 * float(weight[:, dead].abs().mean())


def test_weights_of_zero_stay_zero() -> None:
    x, weight = inputs(300, 64, 5), weights(6, 64, 5)
    weight[2] = 0
    solution = gptq(weight, stats_of(x), Scheme(4, 32), torch.float32)
    assert float(solution.weight.dense()[2].abs().max()) == 0
    nothing = gptq(torch.zeros(3, 64), stats_of(x), Scheme(2, None, False), torch.bfloat16)
    assert float(nothing.weight.dense().abs().max()) == 0
    assert nothing.row_error is not None
    assert nothing.row_error.tolist() == [0, 0, 0]


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(3, None, False)])
def test_rows_are_solved_independently(scheme: Scheme) -> None:
    """q, k and v are stacked and solved at once; each must come out as if it had been alone."""
    x = inputs(400, 128, 6)
    parts = [weights(rows, 128, rows, torch.bfloat16) for rows in (40, 16, 17)]
    stacked = gptq(torch.cat(parts), stats_of(x), scheme, torch.bfloat16)
    start = 0
    for part in parts:
        alone, own = gptq(part, stats_of(x), scheme, torch.bfloat16), stacked.rows(start, start + len(part))
        assert torch.equal(alone.weight.scale, own.weight.scale)
        # Products of other shapes are summed in another order; a tie may then break the other way.
        same = (alone.weight.values == own.weight.values).all(1)
        assert float(same.float().mean()) >= 0.9
        assert alone.row_error is not None
        assert own.row_error is not None
        assert torch.allclose(alone.row_error[same], own.row_error[same], rtol=1e-3)
        assert float(own.row_error.sum()) == pytest.approx(float(alone.row_error.sum()), rel=0.03)
        start += len(part)


def test_a_weight_of_more_rows_than_one_chunk() -> None:
    x, rows = inputs(200, 128, 7), 33_000  # 128 x 33,000 is more than the sweep takes at a time
    weight = weights(rows, 128, 7)
    whole = gptq(weight, stats_of(x), Scheme(4, None), torch.float32)
    ends = torch.cat([weight[:100], weight[-300:]])
    alone = gptq(ends, stats_of(x), Scheme(4, None), torch.float32)
    values = torch.cat([whole.weight.values[:100], whole.weight.values[-300:]])
    assert float((values == alone.weight.values).all(1).float().mean()) > 0.95
    assert whole.row_error is not None
    exact, measured = loss(weight, whole, x), ~whole.row_error.isnan()  # of many rows some are measured
    assert 200 <= int(measured.sum()) < rows
    assert torch.allclose(whole.row_error[measured], exact[measured], rtol=1e-3)
    assert float(whole.row_error.nanmean()) == pytest.approx(float(exact.mean()), rel=0.1)


# --- statistics are shared, used up, or no good ---


def test_the_factor_is_made_once_and_serves_the_next_weight() -> None:
    x, first, second = inputs(300, 64, 8), weights(12, 64, 8), weights(20, 64, 9)
    shared = stats_of(x)
    gptq(first, shared, Scheme(4, 32), torch.float32)
    assert shared.gram is None
    factor = shared.factor
    after = gptq(second, shared, Scheme(8, None, False), torch.float32)
    assert shared.factor is factor
    fresh = gptq(second, stats_of(x), Scheme(8, None, False), torch.float32)
    assert torch.equal(after.weight.values, fresh.weight.values)
    clipped = rtn_clip(
        second, shared, Scheme(4, 32), torch.float32
    )  # reads the diagonal, which is still there
    assert torch.equal(
        clipped.weight.values, rtn_clip(second, stats_of(x), Scheme(4, 32), torch.float32).weight.values
    )


def test_a_gram_matrix_that_does_not_factor_falls_back_and_says_so() -> None:
    gram = torch.eye(64)
    gram[0, 1] = gram[1, 0] = 5.0
    stats = InputStats(gram, torch.ones(64), gram.diagonal().clone(), 10)
    weight = weights(12, 64, 10)
    for _ in range(2):  # also the second weight of the same input
        solution = gptq(weight, stats, Scheme(4, 32), torch.float32)
        assert solution.fallback is not None
        assert "does not factor" in solution.fallback
        assert solution.damping is None
        clipped = rtn_clip(weight, stats, Scheme(4, 32), torch.float32)
        assert torch.equal(solution.weight.values, clipped.weight.values)
        assert torch.equal(solution.weight.scale, clipped.weight.scale)


def test_inputs_that_were_all_zero_fall_back_too() -> None:
    stats = stats_of(torch.zeros(50, 32))
    solution = gptq(weights(4, 32, 0), stats, Scheme(4, 32), torch.float32)
    assert solution.fallback is not None
    assert solution.dead_columns == 32
    assert float(solution.weight.dense().abs().sum()) > 0


@pytest.mark.parametrize("tokens", [1, 5, 63])
def test_fewer_tokens_than_columns_are_enough(tokens: int) -> None:
    x, weight = inputs(tokens, 64, 11), weights(24, 64, 11)
    solution = gptq(weight, stats_of(x), Scheme(4, 32), torch.float32)
    assert solution.fallback is None
    assert solution.damping == 0.01
    rounded = rounded_on_the_grid_of(solution, weight)
    assert float(loss(weight, solution, x).sum()) < 0.5 * float(loss(weight, rounded, x).sum())


def test_damping_reported_is_what_was_needed() -> None:
    x = inputs(6, 64, 12)
    solution = gptq(weights(4, 64, 0), stats_of(x), Scheme(4, 32), torch.float32, GPTQConfig(damping=1e-10))
    assert solution.damping is not None
    assert 1e-10 < solution.damping < 1e-2


@pytest.mark.parametrize("damping", [0.0, -0.1, 1.5, float("nan")])
def test_damping_that_cannot_be(damping: float) -> None:
    with pytest.raises(BadRecipe, match=r"GPTQ's damping must lie in \(0, 1\]"):
        GPTQConfig(damping=damping)
