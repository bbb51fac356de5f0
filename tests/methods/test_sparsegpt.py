"""SparseGPT against its paper's code in float64, with the inverse of the Hessian, column by column."""

from __future__ import annotations

import pytest
import torch
from reference import sparse as reference
from reference.layers import gram_of, inputs, stats_of, weights
from torch import Tensor

from llmcomp.errors import BadRecipe
from llmcomp.methods._solve import falling_order, restore_gram, shared_factor
from llmcomp.methods.gptq import gptq
from llmcomp.methods.solution import Solution
from llmcomp.methods.sparsegpt import SparseGPTConfig, sparsegpt
from llmcomp.methods.wanda import magnitude, wanda
from llmcomp.patterns import Pattern
from llmcomp.schemes import Scheme

TEXTS = ["2:4", "4:8", "1:2", "3:5", "8:16", "20:40", "5:10"]


def order_of(x: Tensor, act_order: bool, group: int) -> Tensor:
    return falling_order(stats_of(x).diagonal, group) if act_order else torch.arange(x.shape[1])


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_masks_and_weights_are_the_papers(text: str, act_order: bool) -> None:
    x, weight, pattern = inputs(400, 160, 1, spread=0.4), weights(16, 160, 1), Pattern.parse(text)
    assert pattern.group is not None
    solution = sparsegpt(weight, stats_of(x), pattern, torch.float32, SparseGPTConfig(act_order=act_order))
    order = order_of(x, act_order, pattern.group)
    wanted, mask, margin = reference.sparsegpt(weight, gram_of(x), pattern, order)
    clear = margin > 1e-4  # elsewhere float32 may break a tie the other way
    assert int(clear.sum()) >= 12
    assert torch.equal(solution.weight.mask[clear], mask[clear])
    assert torch.allclose(solution.weight.dense()[clear].double(), wanted[clear], atol=2e-5, rtol=1e-4)
    assert solution.damping == 0.01
    exact = reference.loss(weight, solution.weight.dense(), gram_of(x))
    assert torch.allclose(solution.row_error, exact, rtol=1e-3)
    assert torch.allclose(solution.row_norm, reference.loss(weight, torch.zeros(16, 160), gram_of(x)), rtol=1e-4)


@pytest.mark.parametrize(
    ("sparsity", "block", "width"), [(0.5, 128, 300), (0.7, 32, 100), (0.33, 7, 31), (0.5, 500, 90)]
)
def test_an_unstructured_mask_is_the_papers_block_by_block(sparsity: float, block: int, width: int) -> None:
    x, weight, pattern = inputs(3 * width, width, 2, spread=0.4), weights(8, width, 2), Pattern(removed=sparsity)
    solution = sparsegpt(weight, stats_of(x), pattern, torch.float32, SparseGPTConfig(mask_block=block))
    wanted, mask, _ = reference.sparsegpt(weight, gram_of(x), pattern, torch.arange(width), block=block)
    same = solution.weight.mask == mask
    assert float(same.float().mean()) > 0.995  # rows compete, so one tie broken otherwise can reach others
    if bool(same.all()):
        assert torch.allclose(solution.weight.dense().double(), wanted, atol=2e-5, rtol=1e-4)
    theirs = reference.loss(weight, wanted, gram_of(x)).sum()
    ours = reference.loss(weight, solution.weight.dense(), gram_of(x)).sum()
    assert float(ours) == pytest.approx(float(theirs), rel=0.01)


def test_the_score_is_what_removing_a_weight_costs_after_the_best_change_of_those_that_follow() -> None:
    """w² R_kk² = w² / [H_F⁻¹]_kk, F the columns from k on (the paper's equation 3), with no inverse taken."""
    H = gram_of(inputs(200, 40, 3))
    factor = shared_factor(stats_of(inputs(200, 40, 3)), 0.01, False)
    assert factor is not None
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    wanted = torch.stack([1 / torch.linalg.inv(damped[k:, k:])[0, 0] for k in range(40)])
    assert torch.allclose(factor.pivots.double(), wanted, rtol=1e-4)


def error(weight: Tensor, solution: Solution, x: Tensor) -> float:
    return float(reference.loss(weight, solution.weight.dense(), gram_of(x)).sum())


def test_rounding_to_the_stored_dtype_is_made_up_for() -> None:
    x, weight, pattern = inputs(500, 96, 4), weights(32, 96, 4), Pattern(removed=0.003)
    solution = sparsegpt(weight, stats_of(x), pattern, torch.bfloat16)
    assert solution.weight.dense().dtype == torch.bfloat16
    wide = sparsegpt(weight, stats_of(x), pattern, torch.float32, mask=solution.weight.mask)
    rounded = wide.weight.dense().bfloat16()
    assert error(weight, solution, x) < 0.8 * float(reference.loss(weight, rounded, gram_of(x)).sum())


@pytest.mark.parametrize("tokens", [1, 5, 63])
def test_a_singular_gram_matrix_one_row_and_odd_sizes(tokens: int) -> None:
    x, weight = inputs(tokens, 63, 5), weights(1, 63, 5)
    for pattern in (Pattern(1, 3), Pattern(removed=0.5)):
        solution = sparsegpt(weight, stats_of(x), pattern, torch.float32)
        assert solution.fallback is None
        assert bool(solution.weight.dense().isfinite().all())
        assert error(weight, solution, x) < error(weight, magnitude(weight, None, pattern, torch.float32), x)


def test_inputs_that_do_not_factor_fall_back_on_wanda() -> None:
    weight, x = weights(6, 32, 6), torch.zeros(20, 32)
    for _ in range(2):
        solution = sparsegpt(weight, stats_of(x), Pattern(2, 4), torch.float32)
        assert solution.fallback is not None
        assert "masked by Wanda" in solution.fallback
        assert torch.equal(solution.weight.mask, wanda(weight, stats_of(x), Pattern(2, 4), torch.float32).weight.mask)


def test_a_weight_of_more_rows_than_one_chunk() -> None:
    x, rows = inputs(200, 128, 7), 33_000  # 128 x 33,000 is more than the sweep takes at a time
    weight = weights(rows, 128, 7)
    whole = sparsegpt(weight, stats_of(x), Pattern(2, 4), torch.float32)
    ends = sparsegpt(torch.cat([weight[:50], weight[-50:]]), stats_of(x), Pattern(2, 4), torch.float32)
    own = torch.cat([whole.weight.mask[:50], whole.weight.mask[-50:]])
    assert float((own == ends.weight.mask).all(1).float().mean()) > 0.95
    loose = sparsegpt(weight, stats_of(x), Pattern(removed=0.3), torch.float32)
    assert int((~loose.weight.mask).sum()) == round(0.3 * rows * 128)


def test_groups_by_falling_activation_err_less_and_columns_of_one_size_would_err_more() -> None:
    total = dict.fromkeys(["groups", "as they stand", "unstructured", "by activation"], 0.0)
    for seed in range(3):
        x, weight = inputs(700, 256, seed, spread=0.5), weights(48, 256, seed)
        for name, act_order in (("groups", True), ("as they stand", False)):
            solution = sparsegpt(weight, stats_of(x), Pattern(2, 4), weight.dtype, SparseGPTConfig(act_order=act_order))
            total[name] += error(weight, solution, x)
        half = Pattern(removed=0.5)
        total["unstructured"] += error(weight, sparsegpt(weight, stats_of(x), half, weight.dtype), x)
        sorted_ = stats_of(x)
        shared_factor(sorted_, 0.01, True)  # a factor that is there is taken in its order
        total["by activation"] += error(weight, sparsegpt(weight, sorted_, half, weight.dtype), x)
    assert total["groups"] < 0.97 * total["as they stand"]
    assert total["unstructured"] < 0.9 * total["by activation"]


@pytest.mark.parametrize("size", [40, 700])
def test_the_gram_matrix_comes_back_from_its_factor(size: int) -> None:
    stats = stats_of(inputs(2 * size, size, 8, spread=0.4))
    assert stats.gram is not None
    before = stats.gram.clone()
    factor = shared_factor(stats, 0.01, True)
    assert factor is not None
    sizes = before.diagonal().sqrt()
    after = restore_gram(factor)
    assert torch.equal(after, after.T)
    assert float(((after - before) / torch.outer(sizes, sizes)).abs().max()) < 1e-5


def test_steps_chain_on_one_gram_matrix_whatever_order_the_first_wanted() -> None:
    x, weight, pattern = inputs(400, 128, 9), weights(24, 128, 9), Pattern(2, 4)
    stats = stats_of(x)
    gptq(weight, stats, Scheme(4), torch.float32)
    first = stats.factor
    solution = sparsegpt(weight, stats, pattern, torch.float32)
    assert stats.factor is not first  # its order parts groups
    alone = sparsegpt(weight, stats_of(x), pattern, torch.float32)
    assert float((solution.weight.mask == alone.weight.mask).all(1).float().mean()) > 0.8
    assert error(weight, solution, x) == pytest.approx(error(weight, alone, x), rel=0.02)
    second = stats.factor
    held = gptq(weight, stats, Scheme(4), torch.float32, pattern=pattern, mask=solution.weight.mask)
    assert stats.factor is second  # nothing is chosen, so any order will do
    assert torch.equal(held.weight.mask, solution.weight.mask)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"damping": 0.0}, r"damping must lie in \(0, 1\]"), ({"mask_block": 0}, "mask_block must be 1 column or more")],
)
def test_settings_that_cannot_be(options: dict[str, float], said: str) -> None:
    with pytest.raises(BadRecipe, match=said):
        SparseGPTConfig(**options)
