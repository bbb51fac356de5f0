"""The speed of distillation beside the plain way, on tiny models: both compute the same; the table says how fast."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from evals import distill_speed
from llmcomp import inner_losses

SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = {**SMALL, "vocab_size": 30_000, "num_key_value_heads": 2, "bos_token_id": 1}
    for name, case in distill_speed.CASES.items():
        sizes = grouped if case.causal else SMALL
        narrow = {**sizes, "num_hidden_layers": 2, "hidden_size": 16 if name == "tinybert-4" else 32}
        made = replace(case, student=narrow, teacher={**sizes, "num_hidden_layers": 4})
        monkeypatch.setitem(distill_speed.CASES, name, made)


@pytest.mark.parametrize("name", list(distill_speed.CASES))
def test_the_table(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 1000))
    seconds = {distill_speed.PLAIN: 6.0, distill_speed.FAST: 3.0, distill_speed.OURS: 2.0}

    def timed(step: distill_speed.Step, batches: list[distill_speed.Batch]) -> float:
        next(clock)
        for batch in batches:
            step(batch)
        ours = isinstance(step.way, distill_speed.Ours)
        return seconds[distill_speed.OURS if ours else distill_speed.FAST if step.fast else distill_speed.PLAIN]

    monkeypatch.setattr(distill_speed.Step, "timed", timed)
    threads = torch.get_num_threads()
    asked = ["--only", name, "--rounds", "2", "--steps", "2", "--batch-size", "3", "--tokens", "12"]
    assert distill_speed.main([*asked, "--threads", str(threads)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"| {name} | {distill_speed.CASES[name].method} |" in printed
    assert "| 1.00 | 2.00 | 3.00 | 3.00 [3.00, 3.00] | 1.50 [1.50, 1.50] |" in printed
    assert next(clock) == 6


def test_ways_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    args = SimpleNamespace(batch_size=2, tokens=12, device="cpu", dtype="float32", dropout=None, steps=1, rounds=1)
    states = inner_losses.states
    monkeypatch.setattr(inner_losses, "states", lambda *given: 1.01 * states(*given))
    with pytest.raises(SystemExit, match="The two ways do not compute the same"):
        distill_speed.measured("tinybert-6", args)  # type: ignore[arg-type]
