"""FSDP2 on CPUs: two processes with a half of the model each train as one does, and what is not sharded is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from crew import Crew
from e2e_runs import LENGTH, hashes, tensors
from tiny import tiny

from llmcomp.cli.main import main
from llmcomp.report.schema import Report

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
SLOW = pytest.mark.slow


def sharding(words: list[str], whole: bool = False, broken_at: int | None = None) -> int:
    """A rank of a launch that asks for FSDP2.

    Args:
        whole: torch leaves the model as it is. broken_at: the step after which the run breaks off.
    """
    from llmcomp.errors import RunError
    from llmcomp.training import sharding, trainer

    os.environ.update(FSDP2)
    if whole:
        sharding.fully_shard = lambda module, mesh: module  # type: ignore[assignment]

    def stop(self: trainer.Watch, args: object, state: trainer.TrainerState, control: object, **unused: object) -> None:
        if state.global_step == broken_at:
            raise RunError("stopped by the test")

    trainer.Watch.on_step_end = stop  # type: ignore[method-assign]
    return main(words)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("sharded") / "llama", tokenizer=True)


def words_of(source: Path, text: Path, size: int, output: Path, *more: str) -> list[str]:
    """tinybert's losses, with matrices that are learned and blocks that are listened to."""
    return [
        "distill", str(source), "--student", "layers=1,hidden=64,heads=4,mlp=96", "--data", str(text), "--method",
        "tinybert", "--hard-weight", "0.5", "--sequence-length", str(LENGTH), "--steps", "6", "--learning-rate", "1e-3",
        "--samples", "24", "--no-evaluate", "--no-verify", "--save-every", "2", "--accumulate", "2", "--batch-size",
        str(size), "-o", str(output), *more,
    ]  # fmt: skip


def test_torchrun_shards_a_model_and_trains_as_one_process(source: Path, text: Path, tmp_path: Path) -> None:
    """Losses and weights, but for the order of sums; the checkpoint is whole."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
              "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", "-m", "llmcomp"]  # fmt: skip
    environment = {**os.environ, **FSDP2, "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}  # fmt: skip
    two = words_of(source, text, 1, tmp_path / "two")
    child = subprocess.run([*launch, *two], env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    assert main(words_of(source, text, 2, tmp_path / "one")) == 0
    one, other = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert float((other[name] - tensor).norm()) < 1e-2 * float(tensor.norm()), name
    losses = [
        [entry["loss"] for entry in report.distillation.history]
        for report in map(Report.read, (tmp_path / "one", tmp_path / "two")) if report.distillation is not None
    ]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 6


@SLOW
def test_a_broken_run_goes_on_to_the_same_bits(source: Path, text: Path, tmp_path: Path) -> None:
    """Moments of the optimizer are gathered for a state, and shared out from it again."""
    whole, broken = (words_of(source, text, 1, tmp_path / name) for name in ("whole", "broken"))
    ended = Crew(tmp_path).run(sharding, [whole], [whole])
    assert [one.status for one in ended] == [0, 0], ended
    ended = Crew(tmp_path).run(sharding, [broken, False, 5], [broken, False, 5])
    assert {one.status for one in ended} == {1}, ended
    ended = Crew(tmp_path).run(sharding, [broken], [broken])
    assert [one.status for one in ended] == [0, 0], ended
    report = Report.read(tmp_path / "broken").distillation
    assert report is not None and report.resumed == 4
    assert hashes(tmp_path / "broken") == hashes(tmp_path / "whole")


@SLOW
def test_a_model_that_is_left_whole_is_an_error(source: Path, text: Path, tmp_path: Path) -> None:
    words = words_of(source, text, 1, tmp_path / "out")
    ended = Crew(tmp_path).run(sharding, [words, True], [words, True])
    said = [sentence for one in ended for sentence in one.sentences]
    assert {one.status for one in ended} == {1} and len(said) == 1, ended
    assert "FSDP2 was asked for, and" in said[0] and "is not sharded" in said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (FSDP2, "asks for FSDP2 and became one process"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP 1, which is not done here; set fsdp_version: 2"),
        ({**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "one process alone loads the weights"),
    ],
)
def test_launches_that_cannot_shard_are_one_sentence(
    environment: dict[str, str], said: str, source: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    capfd.readouterr()
    assert main(words_of(source, text, 2, tmp_path / "out")) == 2
    sentences = [line for line in capfd.readouterr().err.splitlines() if line.startswith("llmcomp: ")]
    assert len(sentences) == 1 and said in sentences[0] and not (tmp_path / "out").exists()
