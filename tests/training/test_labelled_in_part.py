"""Rows of which some have a label, from a file to the loss, against a reference in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import build, write_tokenizer
from torch import Tensor

from llmcomp import losses
from llmcomp.calibration.data import read_texts
from llmcomp.training.data import collator, samples_of
from llmcomp.training.distilling import Distillation, Targets, Weights

HARD, SOFT, T = 2.0, 5.0, 2.0


def log_softmax64(row: Tensor, temperature: float) -> list[float]:
    values = [float(value) / temperature for value in row]
    total = math.log(math.fsum(math.exp(value - max(values)) for value in values)) + max(values)
    return [value - total for value in values]


def slow(logits: Tensor, targets: Tensor, labels: list[int | None]) -> float:
    """Labels over the rows that have one, the teacher over all rows."""
    hard = [-log_softmax64(row, 1.0)[label] for row, label in zip(logits, labels, strict=True) if label is not None]
    soft = []
    for row, its in zip(logits, targets, strict=True):
        log_q, log_p = log_softmax64(row, T), log_softmax64(its, T)
        soft.append(math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))
    return HARD * math.fsum(hard) / max(1, len(hard)) + SOFT * T**2 * math.fsum(soft) / len(soft)


def objective(targets: Tensor) -> Distillation:
    return Distillation(temperature=T, guide=lambda inputs: Targets(targets), weights=Weights(hard=HARD, soft=SOFT))


def test_a_file_with_some_labels_is_learned_from(tmp_path: Path) -> None:
    """Null, and a key that is not there, are rows for the teacher alone; each row keeps its own label."""
    labels = [2, None, 0, None, None, 1]
    rows = [{"text": f"Row {number} " + "word " * number, "label": label} for number, label in enumerate(labels)]
    del rows[3]["label"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model, tokenizer = build("bert-classifier"), write_tokenizer(tmp_path, encoder=True)
    texts = read_texts(str(tmp_path / "rows.jsonl"), gaps=True)
    samples = samples_of(texts, tokenizer, model, "sequence-classification", length=32, count=None, seed=0, taught=True)
    order = [4, 2, 5, 1, 0, 3]
    batch = collator("sequence-classification", tokenizer)([samples[number] for number in order])
    wanted = [labels[number] for number in order]
    assert batch["labels"].tolist() == [losses.IGNORED if label is None else label for label in wanted]
    assert batch["input_ids"].shape[1] == max(len(samples[number]["input_ids"]) for number in order)
    generator = torch.Generator().manual_seed(0)
    logits, targets = (torch.randn(6, 3, generator=generator) for _ in range(2))
    found = objective(targets)
    assert float(found.loss(logits, batch)) == pytest.approx(slow(logits, targets, wanted), rel=1e-5)
    assert found.counts([batch]).tolist()[:2] == [3, 6]
    alone = samples.labelled()
    assert [int(alone[number]["labels"]) for number in range(len(alone))] == [2, 0, 1]


@given(labels=st.lists(st.none() | st.integers(0, 2), min_size=1, max_size=8), cut=st.integers(0, 8))
def test_parts_of_a_step_add_up_whoever_has_the_labels(labels: list[int | None], cut: int) -> None:
    """As accumulated forwards and processes do: a part may have no label at all, or all of them."""
    generator = torch.Generator().manual_seed(len(labels))
    logits, targets = (torch.randn(len(labels), 3, generator=generator) for _ in range(2))
    known = torch.tensor([losses.IGNORED if label is None else label for label in labels])
    batch = {"input_ids": torch.ones(len(labels), 2, dtype=torch.int64), "labels": known,
             "scored": torch.ones(len(labels), dtype=torch.bool)}  # fmt: skip
    parts = [part for part in (slice(0, cut), slice(cut, None)) if len(known[part])]
    made = [{name: value[part] for name, value in batch.items()} for part in parts]
    counts = objective(targets).counts(made)
    total = sum(float(objective(targets[part]).loss(logits[part], one, counts))
                for part, one in zip(parts, made, strict=True))  # fmt: skip
    assert total == pytest.approx(slow(logits, targets, labels), rel=1e-4, abs=1e-5)
