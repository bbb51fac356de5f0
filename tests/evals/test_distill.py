"""The tables of students with and without a teacher: pairs, the cache, and what is printed. No model is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from evals import distill, distill_lm, students
from llmcomp import DistillPlan
from llmcomp.training.distilling import Weights


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[DistillPlan]:
    """The plans that would have been trained. Of twelve sentences a student without a teacher has every fourth right,
    one with a teacher every third; at 1e-3 instead of 1e-4 each has all. A decoder loses 0.2 nats more than its
    teacher, with it 0.15 more."""
    done: list[DistillPlan] = []

    def train(plan: DistillPlan) -> Any:
        plan.check()
        done.append(plan)
        return SimpleNamespace(report=SimpleNamespace(phases={"train": 1.0}))

    def correct(directory: Path, rows: Path) -> np.ndarray:
        if directory.name != "student" or done[-1].learning_rate == 1e-3:
            return np.ones(12, dtype=bool)
        return np.arange(12) % (3 if done[-1].weights.taught else 4) == 0

    def losses(directory: Path) -> dict[str, np.ndarray]:
        more = 0.0 if directory.name != "student" else 0.15 if done[-1].weights.taught else 0.2
        more += 0.3 * (directory.name == "student" and done[-1].learning_rate == 1e-3)
        return {name: np.linspace(3.0, 4.0, 12) + more for name in distill_lm.TEXTS}

    data = tmp_path / "assets" / "data" / "sst2"
    data.mkdir(parents=True)
    rows = [{"sentence": f"row {number}", "label": number % 2} for number in range(50)]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("LLMCOMP_EVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLMCOMP_ASSETS", str(tmp_path / "assets"))
    monkeypatch.setattr(students, "distill", train)
    monkeypatch.setattr(distill, "correct", correct)
    monkeypatch.setattr(distill_lm, "measure", losses)
    return done


def test_the_table_says_both_and_their_difference(
    trainings: list[DistillPlan], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--seeds", "0", "1", "--steps", "5", "--ways", "distilbert"]
    assert distill.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "the teacher has 100.00%" in printed and "| no teacher" in printed and "| distilbert" in printed
    assert "25.00% [" in printed and "33.33% [" in printed and "| +8.33 [" in printed
    assert len(trainings) == 4
    for alone, taught in zip(trainings[:2], trainings[2:], strict=True):
        assert (alone.seed, alone.steps) == (taught.seed, 5) and taught.weights.cosine == 1
        assert alone.weights == Weights(hard=1.0) and not alone.asked and taught.asked
        same = {"method": "", "output": ""}
        assert replace(alone, **same) == replace(taught, **same)
    assert distill.main(arguments) == 0 and len(trainings) == 4  # all of it was kept
    assert distill.main(["--seeds", "0", "1", "2", *arguments[3:]]) == 0 and len(trainings) == 6


def test_of_several_rates_the_first_students_best_is_everybodys(
    trainings: list[DistillPlan], capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ["--learning-rates", "1e-4", "1e-3"]
    ways = ["logits", "logits,learning_rate=1e-4"]
    assert distill.main(["--seeds", "0", "1", "--steps", "5", *rates, "--ways", *ways]) == 0
    assert [(plan.method, plan.learning_rate, plan.seed) for plan in trainings] == [
        ("labels", 1e-4, 0), ("labels", 1e-3, 0), ("labels", 1e-3, 1), ("logits", 1e-3, 0), ("logits", 1e-3, 1),
        ("logits", 1e-4, 0), ("logits", 1e-4, 1),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "learning rate 0.001, best of those tried for 'labels' on validation with seed 0" in printed
    assert printed.count("yes, the whole interval") == 2 and "-66.67 [" in printed


def test_what_is_left_out_of_tinybert(trainings: list[DistillPlan], capsys: pytest.CaptureFixture[str]) -> None:
    assert distill.main(["--table", "ablation", "--seeds", "0", "--steps", "5"]) == 0
    full = Weights(soft=1.0, embedding=1.0, hidden=1.0, attention=1.0)
    left_out = ({}, {"attention": 0.0}, {"hidden": 0.0}, {"embedding": 0.0}, {"soft": 0.0})
    assert [plan.weights for plan in trainings] == [replace(full, **one) for one in left_out]
    printed = capsys.readouterr().out
    assert all(f"| without {name}" in printed for name in ("attention", "hidden", "embedding", "prediction"))
    assert "over tinybert" in printed and printed.count("+0.00 [+0.00, +0.00]") == 4


def test_few_labels_are_those_that_a_seed_drew(trainings: list[DistillPlan]) -> None:
    arguments = ["--table", "few", "--labels", "7", "--seeds", "0", "1", "--steps", "5", "--ways", "logits"]
    assert distill.main(arguments) == 0
    assert [plan.data for plan in trainings[:2]] == [plan.data for plan in trainings[2:]]
    drawn = []
    for plan in trainings[:2]:
        rows = [json.loads(one) for one in Path(plan.data).read_text().splitlines()]
        assert [row["sentence"] for row in rows] == [f"row {number}" for number in range(50)]
        drawn.append({number for number, row in enumerate(rows) if row["label"] is not None})
        assert len(drawn[-1]) == 7 and all(rows[number]["label"] == number % 2 for number in drawn[-1])
    assert drawn[0] != drawn[1]
    assert distill.main(arguments) == 0 and len(trainings) == 4


def test_every_row_may_keep_its_label() -> None:
    rows = [{"label": number} for number in range(20)]
    kept = [[row["label"] is not None for row in distill.some_labels(rows, 5, seed)] for seed in range(60)]
    assert {sum(one) for one in kept} == {5} and all(np.any(kept, axis=0))
    assert distill.some_labels(rows, 20, 0) == rows


def test_a_way_that_cannot_be_is_refused_before_anything_is_trained(
    trainings: list[DistillPlan], capsys: pytest.CaptureFixture[str]
) -> None:
    for main in (distill.main, distill_lm.main):
        with pytest.raises(SystemExit) as caught:
            main(["--ways", "logits", "tinybert,atention_weight=0"])
        assert caught.value.code == 2
        assert "did you mean 'attention_weight'?" in capsys.readouterr().err
    assert not trainings


def test_a_decoder_closes_a_share_of_the_gap(
    trainings: list[DistillPlan], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--seeds", "0", "1", "--steps", "5", "--ways", "logits,divergence=reverse"]
    assert distill_lm.main([*arguments, "--learning-rates", "1e-3", "1e-4"]) == 0
    assert [(plan.method, plan.learning_rate) for plan in trainings] == [
        ("labels", 1e-3), ("labels", 1e-4), ("labels", 1e-4), ("logits", 1e-4), ("logits", 1e-4),
    ]  # fmt: skip
    assert trainings[-1].divergence == "reverse" and trainings[-1].samples == 5 * trainings[-1].batch_size
    printed = capsys.readouterr().out
    assert printed.count("logits,divergence=reverse") == 2 and "best of those tried for 'labels'" in printed
    assert printed.count("-4.88 [-4.88, -4.88]") == 2 and printed.count("| yes") == 2  # e^-0.05 - 1
    assert printed.count("25% [25%, 25%]") == 2
    assert all(f"{np.exp(3.5 + more):.2f}" in printed for more in (0, 0.2, 0.15))


def test_a_training_that_was_cut_off_leaves_nothing(
    trainings: list[DistillPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(file: Any, **arrays: np.ndarray) -> None:
        file.write(b"PK")
        raise KeyboardInterrupt

    arguments = ["--seeds", "0", "--steps", "5", "--ways", "logits"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez", killed)
        distill.main(arguments)
    assert distill.main(arguments) == 0 and len(trainings) == 3
