"""What every training can be told: memory that is computed again, trackers, compressed gradients."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from crew import Crew
from e2e_runs import LENGTH, hashes, tensors
from recovery_runs import WIDE, Made, recover
from tiny import tiny
from transformers import modeling_utils
from transformers.integrations import integration_utils

import llmcomp
from llmcomp import DistillPlan
from llmcomp.cli.main import main
from llmcomp.errors import BadRecipe
from llmcomp.report.schema import Report
from llmcomp.training import settings
from llmcomp.training.compression import PowerSgd

pytestmark = pytest.mark.usefixtures("quick")
SLOW = pytest.mark.slow


# --- gradient checkpointing ---


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Blocks that are computed again, as transformers asks for them."""
    calls: list[Any] = []
    again = modeling_utils.checkpoint

    def count(*given: Any, **named: Any) -> Any:
        calls.append(given[0])
        return again(*given, **named)

    monkeypatch.setattr(modeling_utils, "checkpoint", count)
    return calls


@pytest.mark.parametrize(
    ("teacher", "method"), [("llama", "tinybert"), ("bert", "minilm"), pytest.param("gpt2", "fitnets", marks=SLOW)]
)
def test_taps_hear_the_same_of_blocks_that_are_computed_again(
    teacher: str, method: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses of what is inside, dropout included, and the weights that they lead to, to the bit."""
    source = tiny(teacher, tmp_path / "source", tokenizer=True)
    plan = DistillPlan(
        str(source), "layers=2", data=str(text), method=method, samples=16, sequence_length=LENGTH, steps=4,
        batch_size=2, accumulate=2, learning_rate=1e-3, evaluate=False, verify=False, device="cpu",
    )  # fmt: skip
    histories, calls = [], counted(monkeypatch)
    for again in (False, True):
        assert not calls
        made = llmcomp.distill(
            replace(plan, output=str(tmp_path / str(again)), gradient_checkpointing=again)
        ).report.distillation
        assert made is not None
        histories.append(made.history)
    assert calls and histories[0] == histories[1]
    assert hashes(tmp_path / "True") == hashes(tmp_path / "False")


@pytest.mark.parametrize(("name", "method"), [("llama int4", "qat"), ("llama int4", "lora"), ("llama 2:4", "full")])
def test_every_way_of_recovery_can_compute_again(
    name: str, method: str, compressed: Made, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories, calls = [], counted(monkeypatch)
    for again in (False, True):
        report = recover(
            compressed[name], tmp_path / str(again), text, method,
            optimization=replace(WIDE, steps=3, gradient_checkpointing=again),
        )  # fmt: skip
        assert report.recovery is not None
        histories.append(report.recovery.history)
    assert calls and histories[0] == histories[1]


# --- trackers ---


class Writer:
    """In the place of TensorBoard's."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, log_dir: str) -> None:
        self.log_dir, self.scalars = log_dir, dict[str, list[int]]()
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.setdefault(name, []).append(step)

    def add_text(self, *given: Any) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def test_tensorboard_hears_of_losses(
    compressed: Made, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the output, which does not change: not even a run that goes on is another one."""
    pretended = ModuleType("torch.utils.tensorboard")
    pretended.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", pretended)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setattr(settings, "find_spec", lambda name: object())
    monkeypatch.setattr(Writer, "made", [])
    told = replace(WIDE, steps=4, evaluate_every=2)
    recover(compressed["llama 2:4"], tmp_path / "plain", text, "full", optimization=told)
    report = recover(
        compressed["llama 2:4"], tmp_path / "tracked", text, "full", optimization=replace(told, track="tensorboard")
    )
    (writer,) = Writer.made
    assert Path(writer.log_dir) == tmp_path / "runs" / "tracked" / "training"
    assert writer.scalars["train/loss"] == [1, 2, 3, 4] and writer.scalars["eval/loss"] == [2, 4]
    assert hashes(tmp_path / "plain") == hashes(tmp_path / "tracked") and report.recipe["track"] == "tensorboard"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--track", "carrier-pigeon"], "--track carrier-pigeon cannot be: choose one of tensorboard, wandb"),
        (["--track", "wandb"], "--track wandb needs the package wandb"),
        (["--powersgd", "0"], "--powersgd 0 cannot be: it is at least 1"),
        (["--powersgd", "4"], "this is one process; leave it out, or start several"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    flags: list[str], said: str, compressed: Made, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    output, directory = tmp_path / "out", compressed["llama 2:4"]
    capfd.readouterr()
    words = ["recover", str(directory), "--data", str(text), "--sequence-length", "16", "--samples", "8", *flags]
    assert main([*words, "--method", "full", "--no-evaluate", "-o", str(output)]) == 2
    sentences = [line for line in capfd.readouterr().err.splitlines() if line.startswith("llmcomp: ")]
    assert len(sentences) == 1 and said in sentences[0] and not output.exists()


# --- compressed gradients ---


def compressing(words: list[str], broken_at: int | None) -> int:
    """A rank that says on stdout by how much gradients were compressed; one that breaks off after some steps."""
    from llmcomp.errors import RunError
    from llmcomp.training import trainer

    join = PowerSgd.join
    kept: list[PowerSgd] = []

    def noted(self: PowerSgd, trainer_: Any) -> None:
        kept.append(self)
        join(self, trainer_)

    def stop(self: Any, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if state.global_step == broken_at:
            raise RunError("stopped by the test")

    PowerSgd.join = noted  # type: ignore[method-assign]
    trainer.Watch.on_step_end = stop  # type: ignore[method-assign]
    status = main(words)
    print("compressed", kept[0].state.compression_stats()[0], flush=True)
    return status


@SLOW
def test_two_processes_exchange_thin_matrices(compressed: Made, text: Path, tmp_path: Path) -> None:
    """Both train the same weights, near those of whole gradients; killed, they go on to the same bits."""
    shared = [
        "recover", str(compressed["llama 2:4"]), "--data", str(text), "--method", "full", "--sequence-length",
        str(LENGTH), "--steps", "12", "--learning-rate", "1e-3", "--samples", "24", "--no-evaluate", "--no-verify",
        "--batch-size", "2", "--save-every", "6",
    ]  # fmt: skip
    made = {}
    for name, more, broken in (("whole", [], None), ("thin", ["--powersgd", "2"], None),
                               ("broken", ["--powersgd", "2"], 9)):  # fmt: skip
        words = [*shared, *more, "-o", str(tmp_path / name)]
        given = ([words], [words]) if name == "whole" else ([words, broken], [words, broken])
        ended = Crew(tmp_path).run(main if name == "whole" else compressing, *given)
        if broken:
            assert {one.status for one in ended} == {1}, ended
            ended = Crew(tmp_path).run(compressing, [words, None], [words, None])
        assert [one.status for one in ended] == [0, 0], ended
        if name != "whole":
            rates = [float(one.out.rpartition("compressed ")[2]) for one in ended]
            assert rates[0] == rates[1] > 2
        made[name] = tensors(tmp_path / name)
    before = tensors(compressed["llama 2:4"])
    for key, one in made["whole"].items():
        assert torch.equal(made["broken"][key], made["thin"][key])
        moved, apart = float((one - before[key]).norm()), float((made["thin"][key] - one).norm())
        assert apart < 0.7 * moved, key
    assert any(not torch.equal(one, made["thin"][key]) for key, one in made["whole"].items())
    last = [Report.read(tmp_path / name).recovery for name in ("whole", "thin")]
    assert last[0] is not None and last[1] is not None
    assert last[1].history[-1]["loss"] == pytest.approx(last[0].history[-1]["loss"], rel=0.05)


def test_one_process_has_nothing_to_compress() -> None:
    with pytest.raises(BadRecipe, match="--powersgd 4 is for gradients that processes exchange"):
        PowerSgd(4)
