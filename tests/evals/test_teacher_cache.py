"""The table of a teacher on disk: ways, rounds and ratios. No model is trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from evals import teacher_cache
from llmcomp import DistillPlan, distillation


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done: list[DistillPlan] = []
    now = 0.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    def train(plan: DistillPlan) -> None:
        plan.check()
        done.append(plan)
        if plan.teacher_cache is not None:
            (Path(plan.teacher_cache) / "a.safetensors").write_bytes(b"0" * 3_000_000)
            distillation.remembered(7.0)  # type: ignore[call-arg, arg-type]
        spend(100.0)  # whatever else it does
        spent = 2.0 if plan.method == "labels" else 5.0 if plan.teacher_cache is None else 2.5
        distillation.train(spent)  # type: ignore[call-arg, arg-type]

    monkeypatch.setenv("LLMCOMP_ASSETS", str(tmp_path))
    monkeypatch.setattr(teacher_cache, "distill", train)
    monkeypatch.setattr(teacher_cache, "time", SimpleNamespace(process_time=lambda: now))
    for name in ("train", "remembered"):
        monkeypatch.setattr(distillation, name, spend)
    assert teacher_cache.main(["--rounds", "3", "--steps", "10"]) == 0
    printed = capsys.readouterr().out
    assert "0.800 [0.800, 0.800]" in printed and "| 2.00 " in printed and "7.0" in printed and "3.0" in printed
    assert "80.0" in printed and "32.0" in printed and "64.0" in printed
    assert len(done) == 2 * (1 + 3 * 3)
    assert [plan.method for plan in done[1:7]] == ["logits", "logits", "labels", "labels", "logits", "logits"]
    assert len({(plan.seed, plan.steps, plan.samples, plan.batch_size) for plan in done}) == 1
