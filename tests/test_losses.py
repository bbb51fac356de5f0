"""Losses against slow loops in float64, and what has to hold of them whatever the numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcomp.losses import IGNORED, hard_targets, jensen_shannon, reverse_targets, scores, soft_targets

shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 6))


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def softmax64(row: torch.Tensor, temperature: float) -> list[float]:
    powers = [math.exp(float(value) / temperature) for value in row]
    return [power / math.fsum(powers) for power in powers]


def hard64(logits: torch.Tensor, labels: torch.Tensor) -> float:
    pairs = zip(logits.flatten(0, -2), labels.flatten(), strict=True)
    terms = [-math.log(softmax64(row, 1.0)[int(label)]) for row, label in pairs if label != IGNORED]
    return math.fsum(terms) / max(1, len(terms))


def soft64(logits: torch.Tensor, targets: torch.Tensor, scored: torch.Tensor, temperature: float) -> float:
    terms = []
    rows = zip(logits.flatten(0, -2), targets.flatten(0, -2), scored.flatten(), strict=True)
    for student, teacher, counts in rows:
        if counts:
            p, q = softmax64(teacher, temperature), softmax64(student, temperature)
            terms.append(math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))
    return temperature**2 * math.fsum(terms) / max(1, len(terms))


def jensen64(logits: torch.Tensor, targets: torch.Tensor, scored: torch.Tensor, temperature: float) -> float:
    terms = []
    rows = zip(logits.flatten(0, -2), targets.flatten(0, -2), scored.flatten(), strict=True)
    for student, teacher, counts in rows:
        if counts:
            p, q = softmax64(teacher, temperature), softmax64(student, temperature)
            terms.append(math.fsum((a * math.log(2 * a / (a + b)) + b * math.log(2 * b / (a + b))) / 2
                                   for a, b in zip(p, q, strict=True)))  # fmt: skip
    return temperature**2 * math.fsum(terms) / max(1, len(terms))


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 1000), st.floats(0.5, 5))
def test_other_divergences_are_their_equations(
    shape: tuple[int, int, int], seed: int, temperature: float
) -> None:
    logits, targets = drawn(shape, seed), drawn(shape, seed + 1)
    scored = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(seed)) < 0.7
    found = float(reverse_targets(logits, targets, scored, temperature))
    assert found == pytest.approx(soft64(targets, logits, scored, temperature), rel=1e-3, abs=1e-5)
    both = float(jensen_shannon(logits, targets, scored, temperature))
    assert both == pytest.approx(jensen64(logits, targets, scored, temperature), rel=1e-3, abs=1e-5)
    assert both == pytest.approx(float(jensen_shannon(targets, logits, scored, temperature)), rel=1e-4, abs=1e-5)
    assert -1e-5 <= both <= temperature**2 * math.log(2) + 1e-5
    n = scored.sum() + 3
    assert float(reverse_targets(logits, targets, scored, temperature, n)) == pytest.approx(
        found * int(scored.sum()) / int(n), rel=1e-3, abs=1e-5
    )


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 1000), st.floats(0.5, 5))
def test_they_are_their_equations(shape: tuple[int, int, int], seed: int, temperature: float) -> None:
    logits, targets = drawn(shape, seed), drawn(shape, seed + 1)
    labels = torch.randint(-1, shape[-1], shape[:-1], generator=torch.Generator().manual_seed(seed))
    labels[labels < 0] = IGNORED
    scored = labels != IGNORED
    assert float(hard_targets(logits, labels)) == pytest.approx(hard64(logits, labels), rel=1e-4, abs=1e-5)
    found = float(soft_targets(logits, targets, scored, temperature))
    assert found == pytest.approx(soft64(logits, targets, scored, temperature), rel=1e-3, abs=1e-5)
    assert float(soft_targets(targets, targets, scored, temperature)) == pytest.approx(0, abs=1e-5)


def test_parts_of_a_step_add_up_to_it() -> None:
    """With the count of the whole, and with unequal numbers of labels in the parts."""
    logits, targets = drawn((4, 5, 7), 0), drawn((4, 5, 7), 1)
    labels = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(2))
    labels[0, 1:] = IGNORED
    scored, count = labels != IGNORED, (labels != IGNORED).sum()
    halves = (slice(0, 1), slice(1, 4))
    assert float(sum(hard_targets(logits[h], labels[h], count) for h in halves)) == pytest.approx(
        float(hard_targets(logits, labels)), rel=1e-5
    )
    assert float(sum(soft_targets(logits[h], targets[h], scored[h], 2.0, count) for h in halves)) == pytest.approx(
        float(soft_targets(logits, targets, scored, 2.0)), rel=1e-5
    )


def test_gradients_of_soft_targets_keep_their_size() -> None:
    """dL/dz = T (softmax(z/T) - softmax(t/T)) / n, which T² has brought back to the size that it has at T = 1."""
    for temperature in (1.0, 4.0):
        logits, targets = drawn((3, 6), 3).requires_grad_(), drawn((3, 6), 4).requires_grad_()
        soft_targets(logits, targets, torch.ones(3, dtype=torch.bool), temperature).backward()
        q, p = (one.detach().double().div(temperature).softmax(-1) for one in (logits, targets))
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad.double(), temperature * (q - p) / 3, rtol=1e-4, atol=1e-6)
        assert targets.grad is None


def test_a_padded_vocabulary_counts_as_far_as_both_go() -> None:
    logits, targets, scored = drawn((2, 5), 5), drawn((2, 8), 6), torch.tensor([True, True])
    assert torch.equal(soft_targets(logits, targets, scored), soft_targets(logits, targets[:, :5], scored))


def test_scores_are_squared_errors_where_they_are_known() -> None:
    logits, labels = torch.tensor([[1.0], [5.0], [2.0]]), torch.tensor([0.0, float("nan"), 4.0])
    assert float(scores(logits, labels)) == pytest.approx((1 + 4) / 2)


def test_nothing_to_learn_from_is_zero() -> None:
    logits = drawn((2, 3), 0)
    assert float(hard_targets(logits, torch.full((2,), IGNORED))) == 0
    assert float(soft_targets(logits, logits, torch.zeros(2, dtype=torch.bool))) == 0
    assert float(scores(logits[:, :1], torch.full((2,), float("nan")))) == 0
