"""Pruning and quantizing in one sweep, against a slow joint reference, and against one after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import sparse as reference
from reference.gptq import StaticGrid
from reference.layers import gram_of, inputs, stats_of, weights
from torch import Tensor

from llmcomp.errors import BadRecipe
from llmcomp.methods._grid import SEARCH, search_grid
from llmcomp.methods._solve import falling_order
from llmcomp.methods.gptq import GPTQConfig, gptq
from llmcomp.methods.rtn import rtn_clip
from llmcomp.methods.solution import Solution
from llmcomp.methods.sparsegpt import sparsegpt
from llmcomp.methods.wanda import wanda
from llmcomp.patterns import Pattern, holds
from llmcomp.schemes import Scheme

HALF = Pattern(2, 4)
schemes = st.builds(Scheme, st.sampled_from((2, 3, 4, 8)), st.sampled_from((None, 32)), st.booleans())


def error(weight: Tensor, solution: Solution, x: Tensor) -> float:
    return float(reference.loss(weight, solution.weight.dense(), gram_of(x)).sum())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("scheme", "pattern", "dtype"),
    [
        (Scheme(4, 32), HALF, torch.float32),
        (Scheme(4, None, False), HALF, torch.bfloat16),
        (Scheme(4, 32, False), Pattern(4, 8), torch.float32),
        (Scheme(8, 32), Pattern(3, 5), torch.float32),
    ],
)
def test_masks_and_integers_are_those_of_a_slow_joint_sweep(
    scheme: Scheme, pattern: Pattern, dtype: torch.dtype, act_order: bool
) -> None:
    x, weight = inputs(400, 160, 1, spread=0.4), weights(16, 160, 1, dtype)
    assert pattern.group is not None
    order = falling_order(stats_of(x).diagonal, pattern.group) if act_order else torch.arange(160)
    solution = gptq(weight, stats_of(x), scheme, dtype, GPTQConfig(act_order=act_order), pattern)
    grid = StaticGrid(solution.weight.scale, solution.weight.zero_point, scheme)

    def on_the_grid(row: int, column: int, target: float) -> tuple[float, float]:
        _, decoded, margin = grid.round(target, row, column, 160)
        return decoded, margin

    wanted, mask, margin = reference.sparsegpt(weight.float(), gram_of(x), pattern, order, rounding=on_the_grid)
    clear = margin > 1e-4  # elsewhere float32 may break a tie the other way
    assert int(clear.sum()) >= 11
    assert torch.equal(solution.weight.mask[clear], mask[clear])
    assert torch.equal(solution.weight.dense()[clear].double(), wanted[clear])
    exact = reference.loss(weight, solution.weight.dense(), gram_of(x))
    assert torch.allclose(solution.row_error, exact, rtol=2e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_those_of_the_kept_weights_after_pruning(symmetric: bool) -> None:
    """What is removed has no say, however large it was."""
    x, weight, scheme = inputs(400, 64, 2), weights(8, 64, 2), Scheme(4, 32, symmetric)
    mask = torch.tensor([True, False, False, True]).repeat(8, 16)
    weight[~mask] *= 30
    x[:, ~mask[0]] *= 1e-3  # so that nothing need be made up for
    stats = stats_of(x)
    solution = gptq(weight, stats, scheme, torch.float32, pattern=HALF, mask=mask)
    importance = torch.empty(64)
    importance[stats.factor.order] = stats.factor.pivots
    searched = search_grid(weight * mask, scheme, torch.float32, importance, *SEARCH[4])
    assert float((solution.weight.scale / searched.scale - 1).abs().median()) < 0.05
    assert float(solution.weight.scale.abs().max()) < 3 * float(searched.scale.abs().max())


@settings(max_examples=25, deadline=None)
@given(schemes, st.sampled_from([HALF, Pattern(1, 4), Pattern(removed=0.6)]), st.integers(0, 99), st.booleans())
def test_removed_weights_are_exactly_zero_and_masks_exact(
    scheme: Scheme, pattern: Pattern, seed: int, half: bool
) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    x, weight = inputs(200, 64, seed), weights(7, 64, seed, dtype)
    held = gptq(weight, stats_of(x), scheme, dtype, pattern=pattern).weight
    assert held.mask is not None
    assert holds(pattern, held.mask)
    assert int((~held.mask).sum()) == (pattern.removes(7 * 64))
    assert held.dense().dtype == dtype
    assert not bool(held.dense()[~held.mask].any())
    zero = 0 if held.zero_point is None else held.zero_point.repeat_interleave(64 // held.scale.shape[1], 1)[~held.mask]
    assert bool((held.values[~held.mask] == zero).all())
    assert int(held.values.min()) >= scheme.qmin
    assert int(held.values.max()) <= scheme.qmax


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4), Scheme(3, 32), Scheme(4, 64, False)])
def test_one_sweep_errs_less_than_two_tools_one_after_the_other(scheme: Scheme) -> None:
    """SparseGPT's weights handed to GPTQ, which holds their mask but knows nothing of what they were."""
    joint = after = rounded = 0.0
    for seed in range(3):
        x, weight = inputs(500, 128, seed, spread=0.5), weights(48, 128, seed)
        joint += error(weight, gptq(weight, stats_of(x), scheme, torch.float32, pattern=HALF), x)
        first = sparsegpt(weight, stats_of(x), HALF, torch.float32).weight
        second = gptq(first.dense(), stats_of(x), scheme, torch.float32, pattern=HALF, mask=first.mask)
        after += error(weight, second, x)
        rounded += error(weight, rtn_clip(first.dense(), stats_of(x), scheme, torch.float32), x)
    assert joint < after < rounded


def test_without_statistics_that_factor_it_falls_back_and_keeps_the_pattern() -> None:
    weight, x = weights(6, 64, 3), torch.zeros(20, 64)
    solution = gptq(weight, stats_of(x), Scheme(4, 32), torch.float32, pattern=HALF)
    assert solution.fallback is not None
    assert solution.fallback.endswith("under Wanda's mask")
    assert torch.equal(solution.weight.mask, wanda(weight, stats_of(x), HALF, torch.float32).weight.mask)
    assert not bool(solution.weight.dense()[~solution.weight.mask].any())


def test_a_mask_wants_its_pattern() -> None:
    weight, x = weights(6, 64, 3), inputs(90, 64, 3)
    with pytest.raises(BadRecipe, match="GPTQ under a mask wants the mask's pattern with it"):
        gptq(weight, stats_of(x), Scheme(4), torch.float32, mask=weight > 0)
