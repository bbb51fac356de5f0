"""One process: what it times, in which order, and what it says of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

from llmcomp.errors import BadCheckpoint, BadData
from llmcomp.measure import bench_process
from llmcomp.measure.bench_process import Job, Sample, job_from_json, serve, time_engine
from llmcomp.measure.engines import open_transformers
from llmcomp.measure.holding import Holding


class Clockwork:
    """An engine on a clock of its own: a prompt takes a second for each token."""

    load_seconds = ready_seconds = 0.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(bench_process.time, "perf_counter", lambda: self.now)

    def prompt(self, batch: int, tokens: int) -> tuple[int, int]:
        self.now += 1000.0  # making one is not timed
        return batch, tokens

    def read(self, prompt: tuple[int, int]) -> None:
        self.calls.append(prompt)
        self.now += prompt[1]

    def holding(self) -> Holding | None:
        return None


class WritingClockwork(Clockwork):
    """A new token takes ten."""

    def step(self) -> None:
        self.calls.append("step")
        self.now += 10.0


def test_prompts_then_new_tokens_of_each_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = WritingClockwork(monkeypatch)
    uncounted, timings = time_engine(engine, Job("m", 1, ((1, 8), (1, 16), (4, 8)), 3, 2))
    assert [asdict(one) for one in timings] == [
        {"measure": "prefill", "batch": 1, "tokens": 8, "seconds": (8.0, 8.0)},
        {"measure": "prefill", "batch": 1, "tokens": 16, "seconds": (16.0, 16.0)},
        {"measure": "prefill", "batch": 4, "tokens": 8, "seconds": (8.0, 8.0)},
        {"measure": "decode", "batch": 1, "tokens": 3, "seconds": (30.0, 30.0)},
        {"measure": "decode", "batch": 4, "tokens": 3, "seconds": (30.0, 30.0)},
    ]
    assert uncounted == 8 + 16 + 8 + 10 + 10
    decode = [(1, 8), "step", *2 * [(1, 8), "step", "step", "step"]]
    assert engine.calls[9 : 9 + len(decode)] == decode


def test_forwards_have_no_new_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = WritingClockwork(monkeypatch)  # as a runtime whose models all could
    uncounted, timings = time_engine(engine, Job("m", 1, ((1, 8), (32, 8)), 0, 3))
    assert [(one.measure, one.batch, one.seconds) for one in timings] == [
        ("forward", 1, (8.0,) * 3), ("forward", 32, (8.0,) * 3),
    ]  # fmt: skip
    assert "step" not in engine.calls and uncounted == 16
    assert time_engine(Clockwork(monkeypatch), Job("m", 1, ((1, 8), (32, 8)), 0, 3)) == (uncounted, timings)


def test_new_tokens_are_not_asked_of_what_writes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadData, match=r"^m writes no tokens, and 2 were asked for; ask for none\.$"):
        time_engine(Clockwork(monkeypatch), Job("m", 1, ((1, 8),), 2, 1))


def test_what_it_says_can_be_read_back(tmp_path: Path) -> None:
    job = Job(str(tiny("llama", tmp_path)), torch.get_num_threads(), ((1, 8),), 2, 2, bandwidth=False)
    assert job_from_json(json.dumps(asdict(job))) == job
    said, status = serve(json.dumps(asdict(job)), open_transformers, lambda job: None)
    assert status == 0
    found = Sample.from_json(json.loads(said))
    assert json.loads(said) == json.loads(json.dumps(asdict(found)))
    assert [(one.measure, len(one.seconds)) for one in found.timings] == [("prefill", 2), ("decode", 2)]
    assert all(second > 0 for one in found.timings for second in one.seconds)
    assert 0 < found.load_seconds < found.ready_seconds
    assert found.holding is not None and 0 < found.holding.blocks < found.holding.tensors
    assert found.bandwidth is None and found.compile_seconds is None
    assert found.machine.threads == torch.get_num_threads() and "torch" in found.machine.versions


def test_an_error_of_ours_is_its_sentence_and_status() -> None:
    def fails(job: Job) -> Any:
        raise BadCheckpoint("There is nothing.")

    assert serve(json.dumps(asdict(Job("m", 1, ((1, 8),), 2, 1))), fails, lambda job: None) == ("There is nothing.", 2)
