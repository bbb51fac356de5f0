"""A training that removed weights, in the table, on the page, and as a command that does it again."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from llmcomp.report.curves import curves
from llmcomp.report.html import render
from llmcomp.report.schema import Distillation, Pruning, Report
from llmcomp.report.summary import reproduce
from llmcomp.report.table import table
from llmcomp.report.trained import pruning_lines

PRUNING = Pruning(
    "movement", 0.85, "1,200 rows of <train>.jsonl", "./teacher", 22_000_000, 3600, 0, 3,
    [{"step": 1, "loss": 0.9, "round": 0}, {"step": 2, "eval_loss": 0.8}, {"step": 9, "loss": 0.4, "round": 2}],
)  # fmt: skip


@pytest.fixture
def pruned(report: Report) -> Report:
    return replace(report, command="prune-in-training", pruning=PRUNING)


def test_lines_say_how_much_and_how(pruned: Report, report: Report) -> None:
    first, second, third = pruning_lines(pruned)
    assert first.startswith("85.0% of 969 M weights removed by movement, 22.0 M numbers trained for 3,600 steps")
    assert first.endswith("in 3 rounds, with ./teacher as teacher.")
    assert second == "Trained on 1,200 rows of <train>.jsonl."
    assert third == "Loss 0.9000 at the start, 0.4000 at the end."
    assert pruning_lines(report) == []


def test_views_show_it(pruned: Report, report: Report) -> None:
    assert Report.from_json(pruned.to_json()) == pruned
    drawn = io.StringIO()
    Console(width=120, file=drawn).print(table(pruned))
    assert all(part in drawn.getvalue() for part in ("How it was trained", "in 3 rounds", "to train and save"))
    page = render(pruned)
    assert "How it was trained" in page and "&lt;train&gt;.jsonl" in page and "prune_in_training.yaml" in page
    assert "How it was trained" not in render(report)
    assert reproduce(pruned) == "accelerate launch scripts/prune_in_training.py --config prune_in_training.yaml"


def test_losses_are_drawn(pruned: Report, report: Report) -> None:
    """A line for each that was noted more than once; rounds one after the other."""
    assert curves(pruned) == {"in training": [(1, 0.9), (9 + 2 * 9, 0.4)]} and curves(report) == {}
    history = [{"step": 1, "loss": 2.0}, {"step": 5, "loss": 1.0, "eval_loss": 1.5}, {"step": 9, "eval_loss": 1.25}]
    found = Distillation("logits", {"soft": 1.0}, "all", ["t"], "rows", 1, 2, 9, 0, history, baseline_history=history)
    distilled = replace(report, command="distill", distillation=found)
    assert list(curves(distilled)) == ["in training", "held out", "without a teacher", "of that, held out"]
    page = render(distilled)
    assert "Loss by step" in page and "in training 2.000 to 1.000; held out 1.500 to 1.250" in page
    assert page.count("<svg") == render(report).count("<svg") + 1 and "Loss by step" not in render(report)
