"""Classifiers, taggers, extractors, scorers and encoders: labels stay with their rows, padding stays out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score
from tiny import PAD, VOCABULARY, build
from torch import nn

from llmcomp.calibration.data import Batch, Texts, batches
from llmcomp.errors import BadCheckpoint, BadData
from llmcomp.measure import quality
from llmcomp.measure.inputs import make_inputs
from llmcomp.measure.positions import Subject
from llmcomp.measure.run import Settings

LENGTHS = (9, 4, 12, 7, 4, 10)


def _windows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def _batches() -> list[Batch]:
    return batches(_windows(), tokens_per_batch=24, pad_id=PAD)


def _order() -> list[int]:
    return sorted(range(len(LENGTHS)), key=lambda row: LENGTHS[row])


def _noisy(model: Any, share: float = 0.5) -> Any:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05 * share)
    return model


def _bert(kind: str, **settings: Any) -> Any:
    config = build("bert-classifier").config
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return getattr(transformers, f"Bert{kind}")(config).eval()


@torch.inference_mode()
def _alone(model: nn.Module, read: Any) -> list[Any]:
    """Each window by itself, without padding, in the order of the batches."""
    windows = _windows()
    return [read(model(input_ids=windows[row][None])) for row in _order()]


def test_classifier_against_rows_one_by_one() -> None:
    original, compressed = build("bert-classifier"), _noisy(build("bert-classifier"), 1.0)
    labels = np.array([0, 2, 1, 1, 0, 2])
    found = quality.compare(
        original, compressed, _batches(), Subject("sequence-classification", "x", labels[_order()])
    )
    p, q = (
        torch.stack(_alone(m, lambda o: o.logits[0].double())).log_softmax(-1) for m in (original, compressed)
    )
    for log, side in ((p, found.before), (q, found.after)):
        assert side is not None and side.samples == 6
        chosen = log.argmax(-1).numpy()
        assert side.metrics["accuracy"].value == pytest.approx(accuracy_score(labels[_order()], chosen))
        assert side.metrics["f1"].value == pytest.approx(f1_score(labels[_order()], chosen, average="macro"))
    assert found.divergence is not None
    assert found.divergence.kl_mean.value == pytest.approx(
        float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3
    )
    assert found.divergence.top1_agreement.value == pytest.approx(
        float((p.argmax(-1) == q.argmax(-1)).double().mean())
    )
    unlabelled = quality.compare(original, compressed, _batches(), Subject("sequence-classification"))
    assert unlabelled.before is None and unlabelled.after is None
    assert unlabelled.divergence == found.divergence
    assert quality.assess(original, _batches(), Subject("sequence-classification")) is None


def test_regression_correlates_with_labels_or_with_the_original() -> None:
    original = _bert("ForSequenceClassification", num_labels=1)
    compressed = _noisy(_bert("ForSequenceClassification", num_labels=1))
    labels = np.array([0.1, 2.0, 1.5, 0.7, 3.0, 2.2])
    found = quality.compare(original, compressed, _batches(), Subject("sequence-classification", "x", labels))
    scores = [np.array(_alone(model, lambda o: float(o.logits))) for model in (original, compressed)]
    assert found.divergence is None and found.before is not None and found.after is not None
    assert found.before.metrics["pearson"].value == pytest.approx(
        stats.pearsonr(scores[0], labels)[0], abs=1e-4
    )
    assert found.after.metrics["spearman"].value == pytest.approx(
        stats.spearmanr(scores[1], labels)[0], abs=1e-4
    )
    bare = quality.compare(original, compressed, _batches(), Subject("sequence-classification", "x"))
    assert bare.before is None and bare.after is not None and "against the original" in bare.after.data
    assert bare.after.metrics["pearson"].value == pytest.approx(stats.pearsonr(*scores)[0], abs=1e-4)


def test_several_labels_a_row() -> None:
    kind = {"num_labels": 3, "problem_type": "multi_label_classification"}
    original, compressed = (
        _bert("ForSequenceClassification", **kind),
        _noisy(_bert("ForSequenceClassification", **kind)),
    )
    found = quality.compare(original, compressed, _batches(), Subject("sequence-classification")).divergence
    p, q = (torch.stack(_alone(m, lambda o: o.logits[0].double())).sigmoid() for m in (original, compressed))
    kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1)
    assert found is not None
    assert found.kl_mean.value == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.top1_agreement.value == float((((p > 0.5) == (q > 0.5)).all(-1)).double().mean())


def test_taggers_score_real_tokens_only() -> None:
    original, compressed = (_bert("ForTokenClassification") for _ in range(2))
    _noisy(compressed)
    found = quality.compare(original, compressed, _batches(), Subject("token-classification")).divergence
    p, q = (
        torch.cat(_alone(m, lambda o: o.logits[0].double())).log_softmax(-1) for m in (original, compressed)
    )
    assert found is not None and found.positions == sum(LENGTHS)
    assert found.kl_mean.value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_extractors_score_start_and_end_over_real_tokens() -> None:
    original, compressed = (_bert("ForQuestionAnswering", num_labels=2) for _ in range(2))
    _noisy(compressed)
    found = quality.compare(original, compressed, _batches(), Subject("question-answering")).divergence
    spans = [
        _alone(m, lambda o: (o.start_logits[0].double(), o.end_logits[0].double()))
        for m in (original, compressed)
    ]
    kl = []
    for one, two in zip(*spans, strict=True):
        for p, q in zip(one, two, strict=True):
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            kl.append(float((p.exp() * (p - q)).sum()))
    assert found is not None and found.positions == 2 * len(LENGTHS)
    assert found.kl_mean.value == pytest.approx(np.mean(kl), rel=1e-3)


def test_encoders_by_cosine() -> None:
    original, compressed = _bert("Model"), _noisy(_bert("Model"))
    found = quality.compare(original, compressed, _batches(), Subject("encoder"))
    a, b = (torch.cat(_alone(m, lambda o: o.last_hidden_state[0].double())) for m in (original, compressed))
    assert found.before is None and found.divergence is None and found.after is not None
    cosine = found.after.metrics["cosine"]
    assert cosine.value == pytest.approx(float(torch.cosine_similarity(a, b, dim=-1).mean()), abs=1e-5)
    assert cosine.low <= cosine.value <= cosine.high < 1.0
    itself = quality.compare(original, original, _batches(), Subject("encoder")).after
    assert itself is not None and itself.metrics["cosine"].value == pytest.approx(1.0)


def test_models_of_different_classes_are_refused() -> None:
    other = _bert("ForSequenceClassification", num_labels=5)
    with pytest.raises(BadCheckpoint, match="3 and 5 outputs"):
        quality.compare(build("bert-classifier"), other, _batches(), Subject("sequence-classification"))
    with pytest.raises(BadData, match="no task 'pretraining'"):
        quality.assess(other, _batches(), Subject("pretraining"))


class _Letters:
    """A tokenizer of one token a letter, as much of one as rows need."""

    pad_token_id, model_max_length, all_special_ids, mask_token_id = PAD, 64, (), None

    def __call__(self, text: Any, **kwargs: Any) -> dict[str, Any]:
        encode = lambda row: [5 + ord(letter) % 100 for letter in row]  # noqa: E731
        return {"input_ids": encode(text) if isinstance(text, str) else [encode(row) for row in text]}


@pytest.mark.parametrize("labels", [[0, 2, 1], ["zero", "two", "one"], ["0", "2", "1"], [0.0, 2.0, 1.0]])
def test_labels_follow_rows_through_sorting(labels: list[Any]) -> None:
    """Row 0 is the longest and an empty row is in the way: order of batches is by length."""
    texts = Texts(["ccccc", "a", "  ", "bbb"], [labels[0], labels[1], "dropped", labels[2]], "rows")
    config = build("bert-classifier").config
    config.label2id = {"zero": 0, "one": 1, "two": 2}
    model = SimpleNamespace(config=config, named_modules=lambda: iter(()))
    made = make_inputs(texts, _Letters(), model, "sequence-classification", Settings(tokens_per_batch=4))
    assert [len(batch.input_ids[0]) for batch in made.batches] == [1, 3, 5]
    assert made.subject.labels is not None and made.subject.labels.tolist() == [2, 1, 0]


def test_labels_that_the_model_does_not_know() -> None:
    texts = Texts(["a", "b"], ["positive", "7"], "reviews.jsonl")
    model = SimpleNamespace(config=build("bert-classifier").config, named_modules=lambda: iter(()))
    with pytest.raises(BadData, match=r"reviews.jsonl: label 'positive' is none of the model's 3 classes"):
        make_inputs(texts, _Letters(), model, "sequence-classification", Settings())
