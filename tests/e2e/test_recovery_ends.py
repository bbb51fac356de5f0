"""How recoveries end: to the same bits after a kill, by a loss that is no number, as a command, and in one sentence
where what was asked cannot be."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from e2e_runs import hashes
from recovery_runs import SLOW, STEPS, WIDE, Made, recover
from stopped import stopped
from tiny import tiny
from torch import Tensor

from llmcomp import Lora, lora, training_run
from llmcomp.cli.main import main
from llmcomp.errors import NumericalError, RunError
from llmcomp.formats.save import partial_of
from llmcomp.report.schema import Report
from llmcomp.report.summary import reproduce
from llmcomp.training import trainer

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(
    ("name", "method", "more"),
    [("bert int8", "lora", {"accumulate": 2}), pytest.param("classifier 2:4", "full", {"steps": 8}, marks=SLOW),
     pytest.param("llama 2:4", "lora", {"evaluate_every": 2, "patience": 2, "save_every": None}, marks=SLOW)],
)  # fmt: skip
def test_a_broken_run_ends_bit_identical(
    name: str, method: str, more: dict[str, Any], compressed: Made, tmp_path: Path, text: Path, rows: Path
) -> None:
    """With dropout, masked tokens drawn on the way, accumulated steps, and weights chosen by what was held out."""
    data, settings = rows if "classifier" in name else text, replace(WIDE, **more)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    recover(compressed[name], whole, data, method, optimization=settings, lora=Lora(4, dropout=0.1))
    with stopped(7):
        recover(compressed[name], broken, data, method, optimization=settings, lora=Lora(4, dropout=0.1))
    assert not broken.exists()
    states = sorted(partial_of(broken).glob("training/checkpoint-*"))
    (states[-1] / "trainer_state.json").write_text('{"torn')  # killed while it was written: an older one is taken
    report = recover(compressed[name], broken, data, method, optimization=settings, lora=Lora(4, dropout=0.1))
    assert report.recovery is not None and 0 < report.recovery.resumed < 7
    assert hashes(broken) == hashes(whole)
    if (whole / lora.FOLDER).is_dir():
        assert hashes(broken / lora.FOLDER) == hashes(whole / lora.FOLDER)
    assert not partial_of(broken).exists()


@SLOW
def test_a_run_that_was_trained_to_its_end_is_not_trained_further(
    compressed: Made, recovered: Made, tmp_path: Path, text: Path
) -> None:
    def fail(*unused: Any) -> None:
        raise RunError("no verification today")

    output = tmp_path / "late"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "verify", fail)
        with pytest.raises(RunError, match="no verification"):
            recover(compressed["llama 2:4"], output, text, "full")
    report = recover(compressed["llama 2:4"], output, text, "full")
    assert report.recovery is not None and report.recovery.resumed == report.recovery.steps == STEPS
    assert hashes(output) == hashes(recovered["llama 2:4", "full"])


def test_a_loss_that_is_no_number_ends_the_run(
    compressed: Made, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = trainer.Objective.loss, 0

    def broken(self: Any, *given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return loss(self, *given) * (float("nan") if calls == 5 else 1)

    monkeypatch.setattr(trainer.Objective, "loss", broken)
    with pytest.raises(NumericalError, match="loss of step 5 is not a finite number; the state of step 3 is kept"):
        recover(compressed["llama 2:4"], tmp_path / "out", text, "full")
    assert not (tmp_path / "out").exists()
    assert (partial_of(tmp_path / "out") / "training" / "checkpoint-3" / trainer.WEIGHTS).is_file()


# --- the command ---


@SLOW
def test_the_command_in_fresh_processes(
    compressed: Made, tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Verified by one of its own, and said so that it can be done again."""
    from llmcomp.formats.verify import verify

    output = tmp_path / "out"
    arguments = [
        "recover", str(compressed["llama int4"]), "--data", str(text), "--steps", "2", "--samples", "8",
        "--sequence-length", "16", "--rank", "2", "--target", "mlp", "--no-evaluate", "-o", str(output),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "verify", verify)
        assert main(arguments) == 0
    printed = capfd.readouterr().out
    assert "What was won back" in printed and "kept beside the packed weights" in printed
    report = Report.read(output)
    assert report.verification is not None and any("adapter" in check for check in report.verification.checks)
    again = reproduce(report)
    assert all(part in again for part in ("--steps 2", "--rank 2", "--target mlp", "--sequence-length 16"))


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("llama 2:4", [], "needs something to train on"),
        ("llama 2:4", ["--data", "nothing-there.txt"], "does not exist"),
        ("llama 2:4", ["--data", "EMPTY"], "is empty"),
        ("llama 2:4", ["--data", "TEXT", "--method", "half"], "--method half cannot be"),
        ("llama 2:4", ["--data", "TEXT", "--rank", "0"], "--rank 0 cannot be"),
        ("llama 2:4", ["--data", "TEXT", "--rank", "129"], "is above the widths of all linears; take 1 to 128"),
        ("llama 2:4", ["--data", "TEXT", "--samples", "0"], "--samples 0 cannot be: it is at least 1"),
        ("llama 2:4", ["--data", "TEXT", "--learning-rate", "3"], "--learning-rate 3.0 cannot be"),
        ("llama 2:4", ["--data", "TEXT", "--patience", "2"], "--evaluate-every"),
        ("llama 2:4", ["--data", "TEXT", "--target", "convolutions"], "matches no compressed linear"),
        ("llama 2:4", ["--data", "TEXT", "--teacher", "TEACHER"], "has another vocabulary"),
        ("llama 2:4", ["--data", "TEXT", "--teacher", "CLASSIFIER"], "is for sequence-classification"),
        ("llama int4", ["--data", "TEXT", "--method", "full"], "take --method qat or lora"),
        ("classifier 2:4", ["--data", "TEXT"], "has no labels for a classifier"),
        ("classifier 2:4", ["--data", "WRONG"], "is none of the model's 3 classes"),
        ("classifier 2:4", ["--data", "ROWS", "--teacher", "LABELS"], "has the labels"),
        ("source", ["--data", "TEXT"], "expected a directory that llmcomp wrote"),
        ("nobody/nothing", ["--data", "TEXT"], "nobody/nothing"),
        ("recovered", ["--data", "TEXT"], "has an adapter already"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(
    name: str, flags: list[str], said: str, compressed: Made, recovered: Made,
    root: Path, text: Path, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "empty.txt").touch()
    (tmp_path / "wrong.jsonl").write_text('{"text": "a b c", "label": 7}')
    source = Report.read(compressed["llama 2:4"]).source
    if "TEACHER" in flags:
        shutil.copytree(source, tmp_path / "teacher")
        from tiny import write_tokenizer

        write_tokenizer(tmp_path / "teacher", encoder=False, text=["one or two"])
    if "LABELS" in flags:
        tiny("bert-classifier", tmp_path / "labels", tokenizer=True, num_labels=2)
    names = {
        "TEXT": str(text), "ROWS": str(rows), "EMPTY": str(tmp_path / "empty.txt"),
        "WRONG": str(tmp_path / "wrong.jsonl"), "TEACHER": str(tmp_path / "teacher"),
        "CLASSIFIER": str(compressed["classifier 2:4"]), "LABELS": str(tmp_path / "labels"),
    }  # fmt: skip
    made = {**compressed, "source": Path(source), "recovered": recovered["llama int4", "lora"]}
    output = tmp_path / "out"
    capfd.readouterr()
    arguments = ["recover", str(made.get(name, name)), *(names.get(flag, flag) for flag in flags), "-o", str(output)]
    assert main([*arguments, "--sequence-length", "16", "--no-evaluate"]) == 2
    sentences = [line for line in capfd.readouterr().err.splitlines() if line.startswith("llmcomp: ")]
    assert len(sentences) == 1 and said in sentences[0], sentences
    assert not output.exists() and not partial_of(output).exists()
