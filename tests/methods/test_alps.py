"""ALPS: its weights are the best on their support, by normal equations in float64; its mask errs less than others'."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import sparse as reference
from reference.layers import gram_of, inputs, stats_of, weights
from torch import Tensor

from llmcomp.errors import BadRecipe
from llmcomp.methods.alps import ALPSConfig, alps
from llmcomp.methods.gptq import gptq
from llmcomp.methods.sparsegpt import sparsegpt
from llmcomp.methods.wanda import wanda
from llmcomp.patterns import Pattern
from llmcomp.schemes import Scheme

patterns = st.sampled_from([Pattern(2, 4), Pattern(4, 8), Pattern(1, 3), Pattern(removed=0.5), Pattern(removed=0.7)])


def admm(weight: Tensor, hessian: Tensor, pattern: Pattern, rounds: int, rho: float) -> Tensor:
    """Meng et al. 2024 (arXiv:2406.07831), equation 4 as the paper has it: inputs scaled to norm one, an inverse,
    float64, ρ as it starts. The mask after some rounds."""
    H = hessian.double()
    H = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    norm = H.diagonal().sqrt()
    H = H / norm / norm.unsqueeze(1)
    W = weight.double() * norm

    def project(B: Tensor) -> Tensor:
        return B * reference.by_row(B**2, pattern)

    D, V = project(W), torch.zeros_like(W)
    inverse = torch.linalg.inv(H + rho * torch.eye(len(H), dtype=torch.float64))
    for _ in range(rounds):
        B = (W @ H - V + rho * D) @ inverse
        D = project(B + V / rho)
        V = V + rho * (B - D)
    return reference.by_row(B**2, pattern)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 3)])
def test_the_first_rounds_are_the_papers(pattern: Pattern) -> None:
    x, weight = inputs(300, 96, 1, spread=0.4), weights(16, 96, 1)
    for rounds in (1, 2):  # before the price is looked at
        solution = alps(weight, stats_of(x), pattern, torch.float32, ALPSConfig(iterations=rounds))
        wanted = admm(weight, gram_of(x), pattern, rounds, 0.1)
        assert float((solution.weight.mask == wanted).float().mean()) > 0.998


@settings(max_examples=15, deadline=None)
@given(patterns, st.integers(1, 12), st.integers(0, 99), st.integers(40, 400))
def test_weights_are_the_best_on_their_support(pattern: Pattern, rows: int, seed: int, tokens: int) -> None:
    x, weight = inputs(tokens, 48, seed, spread=0.5), weights(rows, 48, seed)
    H, solution = gram_of(x), alps(weight, stats_of(x), pattern, torch.float32)
    best = reference.best_on_support(weight, H, solution.weight.mask, 0.01)
    ours = reference.loss(weight, solution.weight.dense(), H, 0.01).sum()
    theirs = reference.loss(weight, best, H, 0.01).sum()
    assert float(theirs) * (1 - 1e-5) <= float(ours) <= float(theirs) * 1.001 + 1e-9


def test_more_steps_come_as_close_as_one_wishes() -> None:
    x, weight = inputs(300, 64, 2), weights(16, 64, 2)
    H, mask = gram_of(x), wanda(weight, stats_of(x), Pattern(2, 4), torch.float32).weight.mask
    best = reference.best_on_support(weight, H, mask, 0.01)
    least, distances = float(reference.loss(weight, best, H, 0.01).sum()), []
    for steps in (1, 4, 16, 100):
        config = ALPSConfig(refinements=steps)
        dense = alps(weight, stats_of(x), Pattern(2, 4), torch.float32, config, mask).weight.dense()
        distances.append(float(reference.loss(weight, dense, H, 0.01).sum()) / least - 1)
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.01
    assert distances[-1] < 1e-5


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([Pattern(2, 4), Pattern(removed=0.6)]), st.integers(0, 99))
def test_on_the_mask_of_another_method_it_errs_no_more(pattern: Pattern, seed: int) -> None:
    x, weight = inputs(300, 64, seed), weights(12, 64, seed)
    for other in (wanda, sparsegpt):
        first = other(weight, stats_of(x), pattern, torch.float32)
        solution = alps(weight, stats_of(x), pattern, torch.float32, mask=first.weight.mask)
        assert torch.equal(solution.weight.mask, first.weight.mask)
        before, after = (
            float(reference.loss(weight, one.weight.dense(), gram_of(x), 0.01).sum()) for one in (first, solution)
        )
        assert after <= before * 1.0001


def test_the_gram_matrix_is_as_it_was_and_comes_back_from_a_factor() -> None:
    x, weight = inputs(300, 64, 3), weights(12, 64, 3)
    stats = stats_of(x)
    assert stats.gram is not None
    before = stats.gram.clone()
    alone = alps(weight, stats, Pattern(2, 4), torch.float32)
    assert torch.equal(stats.gram, before)
    used = stats_of(x)
    gptq(weight, used, Scheme(4), torch.float32)
    after = alps(weight, used, Pattern(2, 4), torch.float32)
    assert used.gram is not None
    assert float((after.weight.mask == alone.weight.mask).float().mean()) > 0.97
    assert float(after.row_error.sum()) == pytest.approx(float(alone.row_error.sum()), rel=0.02)


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_singular_gram_matrix_one_row_and_bf16(tokens: int) -> None:
    x, weight = inputs(tokens, 45, 4), weights(1, 45, 4, torch.bfloat16)
    for pattern in (Pattern(2, 5), Pattern(removed=0.5)):
        solution = alps(weight, stats_of(x), pattern, torch.bfloat16)
        assert solution.fallback is None
        assert solution.weight.dense().dtype == torch.bfloat16
        assert bool(solution.weight.dense().isfinite().all())
        other = wanda(weight, stats_of(x), pattern, torch.bfloat16)
        ours, theirs = (reference.loss(weight, one.weight.dense(), gram_of(x)) for one in (solution, other))
        assert float(ours) < float(theirs)


def test_inputs_that_do_not_correlate() -> None:
    """The largest are the best from the start, and what stays is not changed."""
    weight, x = weights(6, 32, 5), torch.eye(32).repeat(4, 1)
    solution = alps(weight, stats_of(x), Pattern(2, 4), torch.float32)
    assert torch.allclose(solution.weight.dense(), weight * solution.weight.mask, atol=1e-6)
    best = weight * reference.by_row(weight.abs(), Pattern(2, 4))
    assert float((weight - solution.weight.dense()).square().sum()) < 1.1 * float((weight - best).square().sum())


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"iterations": 0}, {"refinements": 0}])
def test_settings_that_cannot_be(options: dict[str, float]) -> None:
    with pytest.raises(BadRecipe, match="ALPS's "):
        ALPSConfig(**options)
