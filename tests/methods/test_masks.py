"""Masks are exact in every group and in total, ties are broken as promised, and what an earlier step removed stays so:
for the selection itself and for every method that removes weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import sparse as reference
from reference.layers import inputs, stats_of, weights
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.errors import BadRecipe
from llmcomp.methods import SPARSE
from llmcomp.methods._masks import GONE, grouped_mask, lowest, matrix_mask, row_mask, shares
from llmcomp.methods.gptq import gptq
from llmcomp.methods.solution import Solution
from llmcomp.patterns import Pattern, holds
from llmcomp.schemes import Scheme

counted = st.tuples(st.integers(1, 11), st.integers(1, 6)).map(lambda pair: Pattern(pair[0], sum(pair)))
unstructured = st.floats(0.02, 0.98).map(lambda share: Pattern(removed=share))
EVERY = [*SPARSE, "gptq"]


def few_values(rows: int, columns: int, seed: int, levels: int = 4) -> Tensor:
    """Scores of which many are equal."""
    return torch.randint(levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


def solve(method: str, weight: Tensor, stats: InputStats, pattern: Pattern, mask: Tensor | None = None) -> Solution:
    if method == "gptq":
        return gptq(weight, stats, Scheme(4), weight.dtype, pattern=pattern, mask=mask)
    entry = SPARSE[method]
    return entry.function(weight, stats, pattern, weight.dtype, entry.config(), mask)


def mask_of(solution: Solution) -> Tensor:
    mask = solution.weight.mask
    assert mask is not None
    return mask


# --- selection ---


@settings(max_examples=60, deadline=None)
@given(counted, st.integers(1, 9), st.integers(1, 5), st.integers(0, 999), st.integers(1, 5))
def test_groups_keep_their_best_and_of_equals_the_earlier(
    pattern: Pattern, rows: int, groups: int, seed: int, levels: int
) -> None:
    assert pattern.of is not None
    scores = few_values(rows, groups * pattern.of, seed, levels)
    assert torch.equal(grouped_mask(scores, pattern), reference.by_row(scores, pattern))


@settings(max_examples=60, deadline=None)
@given(unstructured, st.integers(1, 9), st.integers(1, 40), st.integers(0, 999), st.sampled_from((1, 3, 10_000)))
def test_the_least_of_a_row_and_of_a_matrix(
    pattern: Pattern, rows: int, columns: int, seed: int, levels: int
) -> None:
    scores = few_values(rows, columns, seed, levels) / 7
    each = torch.full((rows,), pattern.removes(columns))
    assert torch.equal(row_mask(scores, each), reference.by_row(scores, pattern))
    count = pattern.removes(rows * columns)
    mask = matrix_mask(lambda part: scores[part].clone(), rows, columns, pattern, None)
    assert torch.equal(mask, reference.by_matrix(scores, count))
    assert torch.equal(~lowest(scores.t().contiguous(), count).t(), reference.by_matrix(scores, count))


def test_the_least_of_a_matrix_of_more_rows_than_one_chunk() -> None:
    scores, pattern = few_values(33, 1 << 15, 0, 1 << 20), Pattern(removed=0.37)
    mask = matrix_mask(lambda part: scores[part].clone(), *scores.shape, pattern, None)
    assert int((~mask).sum()) == pattern.removes(scores.numel())
    assert float(scores[mask].min()) >= float(scores[~mask].max())


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.data())
def test_shares_are_exact_and_nobody_gives_more_than_it_has(present: list[int], data: Any) -> None:
    count = data.draw(st.integers(0, sum(present)))
    dealt = shares(present, count)
    assert sum(dealt) == count
    assert all(0 <= share <= most for share, most in zip(dealt, present, strict=True))
    total = max(1, sum(present))
    assert all(abs(share - most * count / total) <= 1 for share, most in zip(dealt, present, strict=True))


def test_what_is_gone_comes_before_a_score_of_zero() -> None:
    scores = torch.tensor([0.0, GONE, 3.0, GONE, 0.0])
    assert lowest(scores, 2).tolist() == [False, True, False, True, False]
    assert lowest(scores, 3).tolist() == [False, True, False, True, True]
    assert lowest(scores, 0).tolist() == [False] * 5


# --- every method ---


@pytest.mark.parametrize("method", EVERY)
@settings(max_examples=12, deadline=None)
@given(st.one_of(counted, unstructured), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_every_method_removes_exactly_what_the_pattern_says(
    method: str, pattern: Pattern, rows: int, seed: int, half: bool
) -> None:
    width = 4 * pattern.of if pattern.of is not None else 37
    weight = weights(rows, width, seed, torch.bfloat16 if half else torch.float32)
    before = weight.clone()
    solution = solve(method, weight, stats_of(inputs(60, width, seed)), pattern)
    assert torch.equal(weight, before)
    mask, dense = mask_of(solution), solution.weight.dense()
    assert solution.weight.pattern == pattern
    assert dense.dtype == weight.dtype
    assert not bool(dense[~mask].any())
    if pattern.of is not None:
        assert holds(pattern, mask)
    elif method == "wanda":
        assert (~mask).sum(1).tolist() == [pattern.removes(width)] * rows
    else:
        assert int((~mask).sum()) == pattern.removes(rows * width)


@pytest.mark.parametrize("method", EVERY)
@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["2:4", "unstructured"]), st.integers(1, 9), st.integers(0, 99))
def test_a_complete_mask_is_held_as_it_is(method: str, text: str, rows: int, seed: int) -> None:
    pattern, weight, x = Pattern.parse(text), weights(rows, 64, seed), inputs(90, 64, seed)
    held = mask_of(solve("magnitude", weights(rows, 64, seed + 1), stats_of(x), pattern))
    assert torch.equal(mask_of(solve(method, weight, stats_of(x), pattern, held)), held)


@pytest.mark.parametrize("method", EVERY)
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.integers(0, 99), st.floats(0.1, 0.5), st.floats(0.5, 0.9))
def test_what_an_earlier_step_removed_stays_and_the_rest_is_chosen(
    method: str, rows: int, seed: int, first: float, second: float
) -> None:
    assume(round(first * rows * 64) < round(second * rows * 64))
    weight, x, pattern = weights(rows, 64, seed), inputs(90, 64, seed), Pattern(removed=second)
    held = mask_of(solve("magnitude", weight, stats_of(x), Pattern(removed=first)))
    mask = mask_of(solve(method, weight, stats_of(x), pattern, held))
    assert not bool((mask & ~held).any())
    assert int((~mask).sum()) == pattern.removes(rows * 64)
    grouped, quarter = Pattern(2, 8), mask_of(solve("magnitude", weight, stats_of(x), Pattern(4, 8)))
    mask = mask_of(solve(method, weight, stats_of(x), grouped, quarter))
    assert holds(grouped, mask)
    assert not bool((mask & ~quarter).any())


@pytest.mark.parametrize("method", EVERY)
def test_masks_and_widths_that_cannot_be(method: str) -> None:
    weight, x = weights(6, 64, 0), inputs(90, 64, 0)
    held = mask_of(solve("magnitude", weight, stats_of(x), Pattern(4, 8)))
    with pytest.raises(BadRecipe, match="2:4 keeps 2 of every 4 weights where an earlier step has left fewer in some"):
        solve(method, weight, stats_of(x), Pattern(2, 4), held)
    with pytest.raises(BadRecipe, match="unstructured 20% removes 77 weights where an earlier step has removed 192"):
        solve(method, weight, stats_of(x), Pattern(removed=0.2), held)
    with pytest.raises(BadRecipe, match="3:5 does not fit a weight of 64 inputs"):
        solve(method, weight, stats_of(x), Pattern(3, 5))


@pytest.mark.parametrize("method", list(SPARSE))
def test_the_error_is_told_whoever_has_factorized_the_gram_matrix(method: str) -> None:
    weight, x, pattern = weights(300, 64, 3), inputs(200, 64, 3), Pattern(2, 4)
    used, fresh = stats_of(x), stats_of(x)
    gptq(weight, used, Scheme(4), torch.float32)  # in an order that parts groups
    after, alone = solve(method, weight, used, pattern), solve(method, weight, fresh, pattern)
    assert after.row_error is not None
    assert after.row_norm is not None
    told = after.row_error.nansum() / after.row_norm.nansum()
    measured = ~after.row_error.isnan()
    assert 128 <= int(measured.sum()) < 300
    exact = reference.loss(weight, after.weight.dense(), x.double().T @ x.double())
    assert torch.allclose(after.row_error[measured], exact[measured], rtol=1e-3)
    assert 0 < float(told) < 1
    assert float((mask_of(after) == mask_of(alone)).float().mean()) > 0.995


@pytest.mark.parametrize("method", [name for name, entry in SPARSE.items() if entry.by_row])
def test_rows_stand_for_themselves(method: str) -> None:
    weight, x, pattern = weights(40, 64, 4), inputs(200, 64, 4), Pattern(removed=0.6)
    whole, part = (solve(method, one, stats_of(x), pattern) for one in (weight, weight[7:20]))
    assert torch.equal(mask_of(whole.rows(7, 20)), mask_of(part))


@pytest.mark.parametrize("method", EVERY)
def test_dead_columns_and_no_inputs_at_all(method: str) -> None:
    weight, x, pattern = weights(8, 64, 5), inputs(300, 64, 5), Pattern(2, 4)
    x[:, ::4] = 0
    solution = solve(method, weight, stats_of(x), pattern)
    assert solution.fallback is None
    assert solution.dead_columns == 16
    if method != "magnitude":
        # By the damping a dead column counts as a quiet one, and some that live are quieter.
        left = mask_of(solution)[:, ::4].float().mean()
        assert float(left) < (1e-9 if method == "wanda" else 0.25)  # by chance 0.5
    silent = solve(method, weight, stats_of(torch.zeros(9, 64)), pattern)
    assert holds(pattern, mask_of(silent))
    assert (silent.fallback is None) == (method in ("wanda", "magnitude"))
    assert bool(silent.weight.dense().isfinite().all())
    assert float(silent.weight.dense().abs().sum()) > 0


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(removed=0.5), Pattern(removed=0.7)])
def test_each_method_errs_less_than_the_next(pattern: Pattern) -> None:
    """On average over correlated inputs; alps, sparsegpt, wanda, magnitude."""
    total = dict.fromkeys(["alps", "sparsegpt", "wanda", "magnitude"], 0.0)
    for seed in range(3):
        x, weight = inputs(400, 96, seed, spread=0.5), weights(48, 96, seed)
        H = x.double().T @ x.double()
        for method in total:
            dense = solve(method, weight, stats_of(x), pattern).weight.dense()
            total[method] += float(reference.loss(weight, dense, H).sum())
    found = list(total.values())
    assert found == sorted(found)
    assert found[0] < 0.9 * found[1] < 0.7 * found[2]
