"""The table of two methods of pruning in training: pairs, the cache, and what is printed. No model is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from evals import pruned_training
from llmcomp.training.pruning_plan import PruningPlan


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[PruningPlan]:
    """The plans that would have been trained; movement is right on every third sentence, gradual on every fourth."""
    done: list[PruningPlan] = []

    def prune(plan: PruningPlan) -> Any:
        plan.check()
        done.append(plan)
        return SimpleNamespace(report=SimpleNamespace(pruning=SimpleNamespace(removed=plan.sparsity)))

    def correct(directory: Path, rows: Path) -> np.ndarray:
        if directory.name != "pruned":
            return np.ones(12, dtype=bool)
        return np.arange(12) % (3 if done[-1].method == "movement" else 4) == 0

    monkeypatch.setenv("LLMCOMP_EVAL_CACHE", str(tmp_path))
    monkeypatch.setattr(pruned_training, "prune_in_training", prune)
    monkeypatch.setattr(pruned_training, "correct", correct)
    return done


def test_the_table_says_both_and_their_difference(
    trainings: list[PruningPlan], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--seeds", "0", "1", "--kept", "0.15", "--steps", "5"]
    assert pruned_training.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "a dense model of 100.00%" in printed and "| 15%" in printed
    assert "25.00%" in printed and "33.33%" in printed and "+8.33 [" in printed
    assert len(trainings) == 4
    for one, other in zip(trainings[:2], trainings[2:], strict=True):
        assert (one.method, other.method, one.seed) == ("gradual", "movement", other.seed)
        assert replace(one, method="", output="") == replace(other, method="", output="")
        assert one.sparsity == pytest.approx(0.85) and one.steps == 5


def test_a_second_run_trains_only_what_is_missing(trainings: list[PruningPlan]) -> None:
    assert pruned_training.main(["--seeds", "0", "--kept", "0.1"]) == 0
    assert pruned_training.main(["--seeds", "0", "1", "--kept", "0.1"]) == 0
    assert [plan.seed for plan in trainings] == [0, 0, 1, 1]
    assert pruned_training.main(["--seeds", "0", "--kept", "0.1", "--steps", "7"]) == 0
    assert len(trainings) == 6  # other settings are other trainings
