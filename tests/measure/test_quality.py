"""Perplexity, KL divergence and agreement against slow float64 references, padding and chunks included."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BOS, EOS, MASK, PAD, VOCABULARY, build

from llmcomp.calibration.data import Batch
from llmcomp.errors import BadCheckpoint, BadData, NumericalError
from llmcomp.losses import kl_divergence
from llmcomp.measure import quality
from llmcomp.measure.positions import Masking, Subject, masked

MASKING = Masking(MASK, frozenset({PAD, BOS, EOS, MASK}), seed=3)


def _batches() -> list[Batch]:
    """Four windows of 9, 12, 12 and 5 tokens; the last two padded together."""
    generator = torch.Generator().manual_seed(2)
    first = torch.randint(5, VOCABULARY, (1, 9), generator=generator)
    ids = torch.randint(5, VOCABULARY, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    ids[2, 5:], mask[2, 5:] = PAD, 0
    return [Batch(first), Batch(ids, mask)]


def _subject(task: str, at_once: int | None = None) -> Subject:
    masking = MASKING if task == "masked-lm" else None
    return Subject(task, "test", masking=masking, positions_at_once=at_once)


def _pair(name: str, share: float = 0.2) -> tuple[Any, Any]:
    original, compressed = build(name), build(name)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in compressed.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05 * share)
    return original, compressed


def _reference(models: tuple[Any, ...], task: str) -> list[list[tuple[int, int, list[torch.Tensor]]]]:
    """Per window: (position, target, each model's float64 log-probabilities), by whole forwards."""
    windows: list[list[tuple[int, int, list[torch.Tensor]]]] = []
    for batch in _batches():
        for row in range(len(batch.input_ids)):
            length = int(batch.attention_mask[row].sum()) if batch.attention_mask is not None else 9
            ids = batch.input_ids[row, :length]
            if task == "causal-lm":
                asked, places = ids, [(t, int(ids[t + 1])) for t in range(length - 1)]
            else:
                chosen = masked(Batch(ids[None]), MASKING, len(windows))
                asked = chosen.input_ids[0]
                places = [(int(c), int(t)) for c, t in zip(chosen.columns, chosen.targets, strict=True)]
            with torch.inference_mode():
                logs = [model.double()(input_ids=asked[None]).logits[0].log_softmax(-1) for model in models]
            windows.append([(t, target, [log[t] for log in logs]) for t, target in places])
    for model in models:
        model.float()
    return windows


@pytest.mark.parametrize(
    ("name", "task"),
    [("llama", "causal-lm"), ("gpt2", "causal-lm"), ("opt", "causal-lm"), ("bert", "masked-lm"),
     ("roberta", "masked-lm"), ("modernbert", "masked-lm")],
)  # fmt: skip
def test_compare_is_the_float64_reference(name: str, task: str) -> None:
    original, compressed = _pair(name)
    windows = _reference((original, compressed), task)
    every = [position for window in windows for position in window]
    found = quality.compare(original, compressed, _batches(), _subject(task))
    for side, measured in enumerate((found.before, found.after)):
        assert measured is not None
        nll = sum(-float(logs[side][target]) for _, target, logs in every)
        assert measured.metrics["perplexity"].value == pytest.approx(math.exp(nll / len(every)), rel=1e-4)
        assert (measured.samples, measured.tokens) == (4, len(every))
    kl = np.array([float((p.exp() * (p - q)).sum()) for _, _, (p, q) in every])
    same = np.array([int(p.argmax()) == int(q.argmax()) for _, _, (p, q) in every])
    assert found.divergence is not None
    assert found.divergence.kl_mean.value == pytest.approx(kl.mean(), rel=1e-3)
    assert found.divergence.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert found.divergence.top1_agreement.value == pytest.approx(same.mean())
    assert found.divergence.positions == len(every)
    assert kl.mean() > 1e-4, "the two models must differ for this test to mean anything"


def test_window_nll_counts_each_window() -> None:
    model = build("llama")
    nll, tokens = quality.window_nll(model, _batches(), _subject("causal-lm"))
    expected = [
        sum(-float(logs[0][target]) for _, target, logs in window)
        for window in _reference((model,), "causal-lm")
    ]
    np.testing.assert_allclose(nll, expected, rtol=1e-4)
    assert tokens.tolist() == [8, 11, 11, 4]


@pytest.mark.parametrize(("name", "task"), [("llama", "causal-lm"), ("bert", "masked-lm")])
def test_chunk_size_does_not_matter(name: str, task: str) -> None:
    original, compressed = _pair(name)
    whole = quality.compare(original, compressed, _batches(), _subject(task))
    for at_once in (1, 5):
        parts = quality.compare(original, compressed, _batches(), _subject(task, at_once))
        assert parts.divergence is not None and whole.divergence is not None
        assert parts.after is not None and whole.after is not None
        assert parts.divergence.kl_mean.value == pytest.approx(whole.divergence.kl_mean.value, rel=1e-3)
        assert parts.after.metrics["perplexity"].value == pytest.approx(
            whole.after.metrics["perplexity"].value, rel=1e-5
        )


@pytest.mark.parametrize(("name", "task"), [("llama", "causal-lm"), ("distilbert", "masked-lm")])
def test_a_model_does_not_differ_from_itself(name: str, task: str) -> None:
    found = quality.compare(build(name), build(name), _batches(), _subject(task))
    assert found.before == found.after
    assert found.divergence is not None
    assert found.divergence.kl_mean.value == found.divergence.kl_p99 == 0.0
    assert found.divergence.top1_agreement.value == found.divergence.top1_agreement.low == 1.0


def test_masking_is_the_same_however_windows_are_batched() -> None:
    together = _batches()[1]
    alone = [
        Batch(together.input_ids[row : row + 1], together.attention_mask[row : row + 1]) for row in range(3)
    ]
    chosen = masked(together, MASKING, 1)
    singly = torch.cat([masked(batch, MASKING, 1 + row).input_ids for row, batch in enumerate(alone)])
    assert torch.equal(chosen.input_ids, singly)
    assert int((chosen.input_ids == MASK).sum()) == len(chosen.targets) == 2 + 2 + 1
    assert not torch.isin(chosen.targets, torch.tensor([PAD, BOS, EOS, MASK])).any()


def test_refusals() -> None:
    model = build("llama")
    with pytest.raises(BadData, match="nothing to evaluate on"):
        quality.assess(model, [], _subject("causal-lm"))
    with pytest.raises(BadData, match="fewer than two tokens"):
        quality.assess(model, [Batch(torch.tensor([[7]]))], _subject("causal-lm"))
    with pytest.raises(BadData, match="mask token"):
        quality.assess(build("bert"), _batches(), Subject("masked-lm"))
    with pytest.raises(BadCheckpoint, match="512 and 640 tokens"):
        quality.compare(model, build("llama", vocab_size=640), _batches(), _subject("causal-lm"))
    broken = build("llama")
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(NumericalError, match="the compressed model gave 34 values that are not finite"):
        quality.compare(model, broken, _batches(), _subject("causal-lm"))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.floats(-30, 30, width=32), min_size=7, max_size=7), min_size=2, max_size=2))
def test_kl_is_never_negative_and_the_float64_sum(rows: list[list[float]]) -> None:
    p, q = torch.tensor(rows).log_softmax(-1)
    found = float(kl_divergence(p, q))
    exact_p, exact_q = (torch.tensor(row, dtype=torch.float64).log_softmax(-1) for row in rows)
    exact = float((exact_p.exp() * (exact_p - exact_q)).sum())
    assert found >= 0.0
    assert found == pytest.approx(exact, rel=1e-3, abs=1e-9)
    assert float(kl_divergence(p, p)) == 0.0


def test_kl_of_distributions_that_hardly_differ() -> None:
    """Where Σ p (log p - log q) in fp32 is rounding error only."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 1000, generator=generator, dtype=torch.float64)
    near = logits + 1e-4 * torch.randn(50, 1000, generator=generator, dtype=torch.float64)
    p, q = logits.log_softmax(-1), near.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    found = kl_divergence(logits.float().log_softmax(-1), near.float().log_softmax(-1))
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0)


def test_kl_passes_over_what_the_original_excludes() -> None:
    p = torch.tensor([0.0, 0.0, -torch.inf]).log_softmax(-1)
    q = torch.tensor([0.0, 0.0, -torch.inf]).log_softmax(-1)
    assert float(kl_divergence(p, q)) == 0.0
    assert float(kl_divergence(torch.zeros(3).log_softmax(-1), q)) == math.inf
