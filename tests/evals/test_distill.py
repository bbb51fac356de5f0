"""The table of students with and without a teacher: pairs, the cache, and what is printed. No model is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evals import distill
from llmcomp import DistillPlan
from llmcomp.training.distilling import Weights


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[DistillPlan]:
    """The plans that would have been trained; a student with a teacher is right on every third sentence, one without on
    every fourth."""
    done: list[DistillPlan] = []

    def train(plan: DistillPlan) -> None:
        plan.check()
        done.append(plan)

    def correct(directory: Path, rows: Path) -> np.ndarray:
        if directory.name != "student":
            return np.ones(12, dtype=bool)
        return np.arange(12) % (3 if done[-1].method == "distilbert" else 4) == 0

    monkeypatch.setenv("LLMCOMP_EVAL_CACHE", str(tmp_path))
    monkeypatch.setattr(distill, "distill", train)
    monkeypatch.setattr(distill, "correct", correct)
    return done


def test_the_table_says_both_and_their_difference(
    trainings: list[DistillPlan], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--seeds", "0", "1", "--steps", "5"]
    assert distill.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "the teacher has 100.00%" in printed and "| no teacher" in printed and "| distilbert" in printed
    assert "25.00%" in printed and "33.33%" in printed and "+8.33 [" in printed
    assert len(trainings) == 4
    for alone, taught in zip(trainings[:2], trainings[2:], strict=True):
        assert (alone.seed, alone.steps) == (taught.seed, 5) and taught.weights.cosine == 1
        assert alone.weights == Weights(hard=1.0) and not alone.asked and taught.asked
        same = {"method": "", "output": ""}
        assert replace(alone, **same) == replace(taught, **same)
    assert distill.main(arguments) == 0 and len(trainings) == 4  # all of it was kept
    assert distill.main(["--seeds", "0", "1", "2", "--steps", "5"]) == 0 and len(trainings) == 6
