"""Low rank: against the papers' own formulas, the bound that no factors go below, and inputs nobody wishes for."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import low_rank as reference
from reference.layers import gram_of, inputs, stats_of, weights
from torch import Tensor

from llmcomp.errors import BadRecipe
from llmcomp.methods import LOW_RANK
from llmcomp.methods._project import gram_norm, truncate
from llmcomp.methods.gptq import gptq
from llmcomp.methods.lowrank import (
    ASVDConfig,
    SVDLLMConfig,
    asvd,
    refit,
    spectrum,
    svd,
    svd_llm,
)
from llmcomp.methods.solution import Solution
from llmcomp.schemes import Scheme
from llmcomp.weights import LowRankWeight

SHAPES = ((48, 64), (64, 48), (64, 64), (200, 32), (20, 96))


def dense(solution: Solution) -> Tensor:
    assert isinstance(solution.weight, LowRankWeight)
    return solution.weight.dense().double()


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_each_is_what_its_paper_writes(rows: int, width: int) -> None:
    x, weight, rank = inputs(500, width, 1), weights(rows, width, 1), 9
    stats, gram = stats_of(x), gram_of(x)
    sizes = (x.double().square().mean(0)).sqrt()
    wanted = {
        "svd": (svd(weight, stats, rank, torch.float64), reference.asvd(weight, torch.ones(width), rank)),
        "asvd": (asvd(weight, stats, rank, torch.float64), reference.asvd(weight, sizes**0.5, rank)),
        "absmax": (
            asvd(weight, stats, rank, torch.float64, ASVDConfig(0.3, "absmax")),
            reference.asvd(weight, x.abs().amax(0) ** 0.3, rank),
        ),
        "svd_llm": (svd_llm(weight, stats, rank, torch.float64), reference.svd_llm(weight, gram, rank)),
    }
    for name, (solution, paper) in wanted.items():
        assert solution.weight.rank == rank
        assert torch.allclose(dense(solution), paper, atol=2e-4 * float(paper.abs().max())), name


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(1, 9), st.integers(0, 999), st.integers(1, 300), st.floats(0, 2))
def test_no_factors_err_less_than_svd_llms_whatever_the_inputs(
    shape: tuple[int, int], rank: int, seed: int, tokens: int, spread: float
) -> None:
    """Fewer tokens than channels make a singular Gram matrix, and few tokens one of rank below the factors'."""
    x, weight = inputs(tokens, shape[1], seed, spread=spread), weights(*shape, seed)
    stats, gram = stats_of(x), gram_of(x)
    whole = reference.loss(weight, gram)
    losses = {}
    for name in LOW_RANK:
        entry = LOW_RANK[name]
        solution = entry.function(weight, stats, rank, torch.float64, entry.config())
        losses[name] = reference.loss(weight - dense(solution), gram)
    least = reference.bound(weight, gram, rank)
    slack = 1e-5 * whole  # the damping's, and a float32 Gram matrix's rounding
    assert least - 1e-9 * whole <= losses["svd-llm"] <= least + slack
    assert losses["svd-llm"] <= min(losses["svd"], losses["asvd"]) + slack
    wanted = reference.singular_values(weight, gram).square()[: min(shape)]
    assert torch.allclose(spectrum(weight, stats).energies, wanted, atol=1e-5 * whole)


def test_on_real_inputs_the_order_is_the_papers() -> None:
    """Channels of unequal size, which share directions: ASVD sees the first, SVD-LLM both."""
    x, weight = inputs(2000, 128, 3, spread=1.5), weights(96, 128, 3, torch.bfloat16)
    stats, gram = stats_of(x), gram_of(x)
    for rank, gain in ((4, 0.9), (12, 0.75), (24, 0.6), (40, 0.4)):
        plain, scaled, whitened = (
            reference.loss(weight - dense(method(weight, stats, rank, torch.bfloat16)), gram)
            for method in (svd, asvd, svd_llm)
        )
        assert scaled < 0.3 * plain
        assert whitened < gain * scaled


def test_plain_svd_needs_no_inputs_and_is_nearest_to_the_weight() -> None:
    weight = weights(64, 40, 4)
    solution = svd(weight, None, 7, torch.float32)
    assert solution.row_error is None
    values = torch.linalg.svdvals(weight.double()).square()
    assert float((weight - dense(solution)).square().sum()) == pytest.approx(float(values[7:].sum()), rel=1e-5)
    assert torch.allclose(spectrum(weight, None).energies, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(300, 64), (64, 96)])
def test_the_reported_error_is_that_of_what_a_reader_decodes(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = inputs(400, width, 5), weights(rows, width, 5, dtype)
    solution = svd_llm(weight, stats_of(x), 20, dtype)
    held = solution.weight
    assert isinstance(held, LowRankWeight)
    assert held.dtype == held.dense().dtype == dtype
    error = (x.double() @ (weight.double() - held.dense().double()).T).square().sum(0)
    norm = (x.double() @ weight.double().T).square().sum(0)
    assert solution.row_error is not None
    assert solution.row_norm is not None
    measured = ~solution.row_error.isnan()
    assert int(measured.sum()) == (150 if rows == 300 else 64)
    assert torch.allclose(solution.row_error[measured], error[measured], rtol=1e-3)
    assert torch.allclose(solution.row_norm[measured], norm[measured], rtol=1e-4)


def test_a_channel_a_thousandfold_the_others_does_not_drown_them() -> None:
    x, weight = inputs(3000, 96, 6), weights(96, 96, 6)
    x[:, 5] *= 3000
    stats, gram = stats_of(x), gram_of(x)
    solution = svd_llm(weight, stats, 30, torch.float64, SVDLLMConfig(1e-9))
    assert reference.loss(weight - dense(solution), gram) < 1.001 * reference.bound(weight, gram, 30)


# --- inputs that never were, weights that are not of full rank ---


def test_dead_channels_keep_what_the_others_leave_room_for() -> None:
    x, weight = inputs(300, 64, 7), weights(48, 64, 7)
    dead = torch.tensor([0, 17, 63])
    x[:, dead] = 0
    stats, gram = stats_of(x), gram_of(x)
    solution = svd_llm(weight, stats, 20, torch.float64)
    assert solution.dead_columns == 3
    assert reference.loss(weight - dense(solution), gram) < 1.0001 * reference.bound(weight, gram, 20)
    # Projected on the outputs' directions, a dead column is kept in part, where a pseudo-inverse would drop it.
    assert float(dense(solution)[:, dead].abs().max()) > 0.01


def test_inputs_that_never_were_active_leave_plain_svd() -> None:
    weight = weights(40, 64, 8)
    stats = stats_of(torch.zeros(10, 64))
    plain = dense(svd(weight, None, 5, torch.float64))
    for method in (asvd, svd_llm):
        assert torch.allclose(dense(method(weight, stats, 5, torch.float64)), plain, atol=1e-9)


@pytest.mark.parametrize(("rows", "width"), [(100, 40), (40, 100)])
def test_a_weight_of_that_rank_is_kept_as_it_is(rows: int, width: int) -> None:
    x, rank = inputs(300, width, 9), 6
    weight = weights(rows, rank, 9) @ weights(rank, width, 10)
    held = dense(svd_llm(weight, stats_of(x), rank, torch.float64))
    assert torch.allclose(held, weight.double(), atol=1e-6 * float(weight.abs().max()))
    nothing = svd_llm(torch.zeros(rows, width), stats_of(x), rank, torch.float32)
    assert float(dense(nothing).abs().max()) == 0


@pytest.mark.parametrize("shape", [(1, 30), (30, 1)])
def test_one_row_or_column_is_left_dense_and_would_be_exact(shape: tuple[int, int]) -> None:
    x, weight = inputs(50, shape[1], 11), weights(*shape, 11)
    with pytest.raises(BadRecipe, match=r"No factors are smaller than a matrix .* leave it dense"):
        svd_llm(weight, stats_of(x), 1, torch.float32)
    left, right = truncate(weight, gram_norm(stats_of(x).gram), 1)
    assert torch.allclose(left @ right, weight.double(), atol=1e-12)


def test_after_gptq_has_used_up_the_gram_matrix_low_rank_still_goes() -> None:
    x, weight = inputs(600, 96, 12), weights(64, 96, 12)
    stats, gram = stats_of(x), gram_of(x)
    fresh = svd_llm(weight, stats, 12, torch.float64)
    assert stats.gram is not None  # only read
    gptq(weight, stats, Scheme(4, 32), torch.float32)
    assert stats.gram is None
    later = svd_llm(weight, stats, 12, torch.float64)
    wanted = reference.loss(weight - dense(fresh), gram)
    assert reference.loss(weight - dense(later), gram) == pytest.approx(wanted, rel=1e-4)
    assert later.row_error is not None
    assert float(later.row_error.sum()) == pytest.approx(wanted, rel=1e-3)
    assert torch.allclose(spectrum(weight, stats).energies, spectrum(weight, stats_of(x)).energies, rtol=1e-3)


# --- the update ---


def grams(x: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """X''X' and X'X', X the source's inputs."""
    return (now.double().T @ now.double()).float(), (x.double().T @ now.double()).float()


def changed(x: Tensor, seed: int) -> Tensor:
    """What a compressed prefix might make of x: noise of its own, smaller, a little turned."""
    width = x.shape[1]
    turn = torch.linalg.qr(torch.eye(width) + 0.05 * weights(width, width, 3))[0]
    return (0.9 * x + 0.3 * inputs(x.shape[0], width, seed + 77)) @ turn


@pytest.mark.parametrize("fixed", ["left", "right"])
@pytest.mark.parametrize("tokens", [600, 20])
@pytest.mark.parametrize(("rows", "width"), [(64, 48), (48, 64)])
def test_with_equal_inputs_the_update_changes_nothing(rows: int, width: int, tokens: int, fixed: str) -> None:
    """20 tokens: the Gram matrix is singular, and so are the normal equations of the left factor."""
    x, weight = inputs(tokens, width, 13), weights(rows, width, 13)
    stats = stats_of(x)
    solution = svd_llm(weight, stats, 24, torch.float64, SVDLLMConfig(1e-9))
    low = solution.weight
    assert isinstance(low, LowRankWeight)
    again = refit(weight, low, stats.gram, stats.gram, fixed)
    for before, after in zip(low.factors(), again.factors(), strict=True):
        assert torch.allclose(before, after, atol=(1e-5 if tokens == 600 else 1e-3) * float(before.abs().max()))
    moved = reference.loss(low.dense() - again.dense(), stats.gram)
    assert moved < 1e-10 * reference.loss(weight, stats.gram)
    assert again.left is low.left if fixed == "left" else again.right is low.right


@pytest.mark.parametrize(("rows", "width"), [(64, 48), (48, 64)])
def test_the_update_is_the_least_squares_fit_to_the_new_inputs(rows: int, width: int) -> None:
    x, weight = inputs(900, width, 14), weights(rows, width, 14)
    now = changed(x, 14)
    gram, cross = grams(x, now)
    held = svd_llm(weight, stats_of(x), 12, torch.float64).weight
    assert isinstance(held, LowRankWeight)
    left, right = held.factors()
    by_left, by_right = (refit(weight, held, gram, cross, fixed, damping=1e-6) for fixed in ("right", "left"))
    assert torch.allclose(by_left.factors()[0], reference.fitted_left(weight, x, now, right), atol=2e-3)
    wide = gram.double()
    refit(weight, held, wide, cross, "left")
    assert torch.equal(wide, gram.double())  # only read
    wanted = reference.fitted_right(weight, x, now, left)
    assert torch.allclose(by_right.factors()[1], wanted, atol=2e-3 * float(wanted.abs().max()))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(2, 400), st.sampled_from(("left", "right")), st.sampled_from(SHAPES[:3]))
def test_the_update_never_makes_it_worse_and_helps_where_inputs_differ(
    seed: int, tokens: int, fixed: str, shape: tuple[int, int]
) -> None:
    x, weight = inputs(tokens, shape[1], seed), weights(*shape, seed)
    now = changed(x, seed)
    gram, cross = grams(x, now)
    held = svd_llm(weight, stats_of(x), 10, torch.float64).weight
    assert isinstance(held, LowRankWeight)
    outputs = x.double() @ weight.double().T

    def error(low: LowRankWeight) -> float:
        return float((outputs - now.double() @ low.dense().double().T).square().sum())

    before, after = error(held), error(refit(weight, held, gram, cross, fixed))
    assert after <= before * (1 + 1e-6)
    assert after < 0.9 * before


def test_the_update_keeps_dtype_and_base() -> None:
    x, weight = inputs(400, 64, 15), weights(48, 64, 15, torch.bfloat16)
    now = changed(x, 15)
    gram, cross = grams(x, now)
    base = gptq(weight, stats_of(x), Scheme(2, 32), torch.bfloat16).weight
    rest = svd_llm(weight.float() - base.dense().float(), stats_of(x), 8, torch.bfloat16).weight
    assert isinstance(rest, LowRankWeight)
    held = LowRankWeight(rest.left, rest.right, base)
    again = refit(weight, held, gram, cross)
    assert again.base is base
    assert again.dtype == torch.bfloat16
    outputs = x.double() @ weight.double().T
    before, after = (
        float((outputs - now.double() @ low.dense().double().T).square().sum()) for low in (held, again)
    )
    assert after < 0.95 * before


# --- the table, and what cannot be ---


@pytest.mark.parametrize("name", list(LOW_RANK))
def test_a_method_brings_its_config_its_source_and_its_summary(name: str) -> None:
    entry = LOW_RANK[name]
    path = Path(inspect.getsourcefile(entry.function) or "")
    assert inspect.getsourcefile(entry.config) == str(path)
    assert dataclasses.is_dataclass(entry.config)
    assert entry.config() == entry.config()
    assert list(inspect.signature(entry.function).parameters) == ["weight", "stats", "rank", "dtype", "config"]
    assert inspect.getdoc(entry.function)
    assert inspect.getdoc(entry.config)
    assert entry.summary
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        (lambda: ASVDConfig(alpha=2), r"alpha must lie in \[0, 1\], got 2"),
        (lambda: ASVDConfig(size="mean"), "'rms' or 'absmax', not 'mean'"),
        (lambda: SVDLLMConfig(0), r"damping must lie in \(0, 1\], got 0"),
        (lambda: svd(torch.ones(8, 8), None, 4, torch.float32), r"Rank 4 saves nothing on .* \[8, 8\]; take 1 to 3"),
        (lambda: svd(torch.ones(8, 8), None, 9, torch.float32), r"Rank 9 is above the width .* take 1 to 3"),
        (lambda: svd(torch.ones(8, 8), None, 0, torch.float32), "Rank 0 saves nothing"),
    ],
)
def test_what_cannot_be_is_one_sentence(ask: object, why: str) -> None:
    with pytest.raises(BadRecipe, match=why):
        ask()  # type: ignore[operator]
