"""Integers for factors, and factors for what integers lose: against plain rounding, bounds, and chained steps."""

from __future__ import annotations

import pytest
import torch
from reference import low_rank as reference
from reference.layers import gram_of, inputs, stats_of, weights
from torch import Tensor

from llmcomp.errors import BadRecipe
from llmcomp.methods.factors import CorrectionConfig, correct, quantize_factors
from llmcomp.methods.gptq import gptq
from llmcomp.methods.lowrank import svd, svd_llm
from llmcomp.methods.rtn import rtn, rtn_clip
from llmcomp.methods.solution import Solution
from llmcomp.schemes import Scheme
from llmcomp.weights import LowRankWeight, QuantizedWeight

INT4, INT8 = Scheme(4, 32), Scheme(8)


def low_rank(solution: Solution) -> LowRankWeight:
    assert isinstance(solution.weight, LowRankWeight)
    return solution.weight


def loss_of(weight: Tensor, held: LowRankWeight | QuantizedWeight, gram: Tensor) -> float:
    return reference.loss(weight.double() - held.dense().double(), gram)


def rounded(factor: Tensor, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    return rtn(factor.float(), None, scheme, dtype).weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(160, 128), (128, 192)])
def test_factors_on_their_gram_matrices_err_less_than_each_rounded_alone(
    rows: int, width: int, dtype: torch.dtype
) -> None:
    x, weight = inputs(900, width, 1), weights(rows, width, 1, dtype)
    gram = gram_of(x)
    floating = low_rank(svd_llm(weight, stats_of(x), 32, dtype))
    left, right = floating.factors()
    alone = LowRankWeight(rounded(left, INT4, dtype), rounded(right, INT4, dtype))
    by = {}
    for name, quantizer, turn in (("gptq", gptq, True), ("straight", gptq, False), ("clip", rtn_clip, False)):
        solution = quantize_factors(weight, floating, stats_of(x), (INT4, INT4), dtype, quantizer, turn)
        held = low_rank(solution)
        assert isinstance(held.left, QuantizedWeight) and isinstance(held.right, QuantizedWeight)
        assert held.left.scheme == held.right.scheme == INT4
        assert held.dtype == dtype
        by[name] = loss_of(weight, held, gram)
        assert solution.row_error is not None
        assert float(solution.row_error.sum()) == pytest.approx(by[name], rel=5e-3)
    floor = loss_of(weight, floating, gram)
    added = {name: found - floor for name, found in by.items()}
    assert 0 < added["gptq"] < 0.65 * min(added["straight"], added["clip"])
    assert max(added["straight"], added["clip"]) < 0.95 * (loss_of(weight, alone, gram) - floor)


def test_the_left_factor_makes_up_for_the_rounding_of_the_right_one() -> None:
    x, weight = inputs(900, 128, 2), weights(96, 128, 2)
    gram = gram_of(x)
    floating = low_rank(svd_llm(weight, stats_of(x), 32, torch.float32))
    schemes = INT8, Scheme(3, 32)
    held = low_rank(quantize_factors(weight, floating, stats_of(x), schemes, torch.float32, rtn_clip, False))
    wanted = reference.fitted_left(weight, x, x, held.factors()[1])
    best = reference.loss(weight.double() - wanted @ held.factors()[1].double(), gram)
    before = LowRankWeight(floating.left, held.right)
    assert best <= loss_of(weight, held, gram) < 1.01 * best < 0.95 * loss_of(weight, before, gram)


def test_without_statistics_factors_are_rounded_as_they_are() -> None:
    weight = weights(96, 64, 3)
    floating = low_rank(svd(weight, None, 32, torch.float32))
    solution = quantize_factors(weight, floating, None, (INT8, INT8), torch.float32, rtn, turn=False)
    assert solution.row_error is None
    held = low_rank(solution)
    assert torch.equal(held.right.values, rounded(floating.factors()[1], INT8, torch.float32).values)
    assert float((held.dense() - floating.dense()).norm()) < 0.02 * float(weight.norm())


def test_steps_on_one_linear_chain_on_one_gram_matrix() -> None:
    """Three weights with one input: with the first right factor GPTQ uses the Gram matrix up."""
    x = inputs(800, 128, 4)
    stats, gram = stats_of(x), gram_of(x)
    for seed, rows in enumerate((64, 96, 200)):
        weight = weights(rows, 128, seed)
        floating = low_rank(svd_llm(weight, stats, 32, torch.float32))
        held = low_rank(quantize_factors(weight, floating, stats, (INT4, INT4), torch.float32))
        floating = low_rank(svd_llm(weight, stats_of(x), 32, torch.float32))
        apart = low_rank(quantize_factors(weight, floating, stats_of(x), (INT4, INT4), torch.float32))
        assert loss_of(weight, held, gram) == pytest.approx(loss_of(weight, apart, gram), rel=0.02)
    assert stats.gram is None


@pytest.mark.parametrize("tokens", [900, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_correction_takes_what_its_rank_can_and_eight_bits_cost_little(dtype: torch.dtype, tokens: int) -> None:
    x, weight, rank = inputs(tokens, 128, 5), weights(160, 128, 5, dtype), 16
    gram, stats = gram_of(x), stats_of(x)
    base = gptq(weight, stats, Scheme(3, 32), dtype).weight
    before = loss_of(weight, base, gram)
    assert stats.gram is None  # the correction goes on from GPTQ's factor
    solution = correct(weight, base, stats, rank, dtype)
    held = low_rank(solution)
    assert held.base is base
    assert held.rank == rank
    assert isinstance(held.left, QuantizedWeight) and held.left.scheme == INT8
    assert isinstance(held.right, QuantizedWeight) and held.right.scheme == INT8
    least = reference.bound(weight.double() - base.dense().double(), gram, rank)
    after = loss_of(weight, held, gram)
    assert least < after < 0.8 * before
    if dtype == torch.float32:  # rounding the sum to bfloat16 is an error of its own
        assert after < 1.02 * least + 1e-4 * before
    assert held.nbytes == base.nbytes + held.left.nbytes + held.right.nbytes < weight.nbytes
    assert solution.row_error is not None
    assert float(solution.row_error.sum()) == pytest.approx(after, rel=0.01)


def test_more_rank_corrects_more_and_four_bits_less_well() -> None:
    x, weight = inputs(900, 128, 6), weights(128, 128, 6)
    gram, stats = gram_of(x), stats_of(x)
    base = rtn(weight, stats, Scheme(2, 64), torch.float32).weight
    found = [loss_of(weight, low_rank(correct(weight, base, stats, r, torch.float32)), gram) for r in (4, 16, 48)]
    assert found == sorted(found, reverse=True)
    coarse = correct(weight, base, stats, 48, torch.float32, CorrectionConfig(bits=4))
    assert found[2] < loss_of(weight, low_rank(coarse), gram) < loss_of(weight, base, gram)


def test_what_cannot_be_is_one_sentence() -> None:
    x, weight = inputs(100, 64, 7), weights(64, 64, 7, torch.bfloat16)
    stats = stats_of(x)
    low = low_rank(svd_llm(weight, stats, 20, torch.bfloat16))
    with pytest.raises(BadRecipe, match="Groups of 32 do not divide a rank of 20; take a multiple"):
        quantize_factors(weight, low, stats, (INT4, INT4), torch.bfloat16)
    base = gptq(weight, stats, INT4, torch.bfloat16).weight
    with pytest.raises(BadRecipe, match=r"Rank 65 is no rank of a matrix \[64, 64\]; take 1 to 64"):
        correct(weight, base, stats, 65, torch.bfloat16)
    with pytest.raises(BadRecipe, match=r"A correction of rank 60 makes .* of a weight of 8,192; take a smaller rank"):
        correct(weight, base, stats, 60, torch.bfloat16)
