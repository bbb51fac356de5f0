"""Distillation from end to end: an ordinary smaller checkpoint, a report of teacher, student and the student without a
teacher, runs that resume to the same bits, the scripts, and one sentence for what cannot be."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_runs import broken_run, quickly, run
from e2e_runs import LENGTH, hashes, tensors
from tiny import tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from llmcomp import distill, hub
from llmcomp.cli.main import main
from llmcomp.errors import NumericalError
from llmcomp.formats.save import partial_of
from llmcomp.measure import run as measuring
from llmcomp.report.card import relation, tags
from llmcomp.report.html import render
from llmcomp.report.schema import Origin, Report
from llmcomp.report.summary import DISTILL_NAME, reproduce
from llmcomp.report.trained import trained_lines
from llmcomp.training.distill_plan import read_distill_plan
from llmcomp.training.distilling import METHODS, PROJECTIONS, Distillation

SLOW = pytest.mark.slow
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
NARROW = {"student": "layers=1,hidden=64,heads=4,mlp=96", "method": "tinybert"}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quickly():
        yield


# --- what comes out ---


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_smaller_checkpoint(method: str, tmp_path: Path) -> None:
    """Which plain transformers opens, verified, with a loss that falls."""
    output = tmp_path / "out"
    report = run(output, method=method, steps=12)
    model, info = AutoModelForSequenceClassification.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()) and model.config.num_hidden_layers == 1
    assert not [name for name in tensors(output) if PROJECTIONS in name]
    found, verification = report.distillation, report.verification
    assert found is not None and verification is not None and verification.passed
    losses = [entry["loss"] for entry in found.history]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
    assert found.losses == {name: value for name, value in vars(METHODS[method]).items() if value}
    assert found.parameters < found.teacher_parameters and report.size_after is not None
    assert report.size_before is not None and report.size_after.bytes_on_disk < report.size_before.bytes_on_disk


@pytest.mark.parametrize(
    ("teacher", "settings"),
    [
        ("llama", {"method": "tinybert", "layer_map": "0:1"}),
        ("gpt2", {"method": "minilm", "divergence": "reverse"}),
        ("bert", {"method": "distilbert"}),
        pytest.param("mistral", {**NARROW, "method": "minilm", "divergence": "jsd"}, marks=SLOW),
        pytest.param("modernbert", {"method": "tinybert", "student": "blocks=0+2"}, marks=SLOW),
        pytest.param("roberta", {**NARROW}, marks=SLOW),
        pytest.param("mixtral", {"method": "distilbert"}, marks=SLOW),
    ],
)
def test_language_models(teacher: str, settings: dict[str, Any], text: Path, tmp_path: Path) -> None:
    source = tiny(teacher, tmp_path / "source", tokenizer=True)
    report = run(
        tmp_path / "out", teacher=str(source), data=str(text), **{"sequence_length": LENGTH, **settings}
    )
    assert report.verification is not None and report.verification.passed and report.distillation is not None
    if report.task == "causal-lm":
        made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert made.config.num_hidden_layers == 1


def test_the_report_says_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_peaks", lambda paths, *given: [1] * len(paths))  # of fresh processes
    rows = [json.dumps({"text": f"Row {number} tells of {number % 8} things.", "label": number % 8})
            for number in range(48)]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(rows))
    given = {"data": str(data), "label_column": "label", "method": "distilbert", "steps": 12}
    output = tmp_path / "out"
    report = run(output, baseline=True, evaluate=True, eval_data=str(data), **given)
    assert Report.read(output) == report and report.command == "distill"
    found = report.distillation
    assert found is not None and found.baseline is not None and found.baseline.quality is not None
    assert report.before is not None and report.after is not None and report.divergence is not None
    for side in (report.before, report.after, found.baseline):
        assert side.quality is not None and "accuracy" in side.quality.metrics
    assert found.baseline_divergence is not None
    assert [len(found.history), len(found.baseline_history)] == [12, 12]
    lines = " ".join(trained_lines(report))
    assert "it started from block 0 of the teacher, all weights copied" in lines
    assert "The same student without a teacher: accuracy" in lines
    assert reproduce(report).endswith(f"--config {DISTILL_NAME}") and "The same student" in render(report)
    again = read_distill_plan(output / DISTILL_NAME, [f"output={tmp_path / 'again'}", "device=cpu", "evaluate=false"])
    assert distill(again).report.distillation is not None
    assert hashes(tmp_path / "again") == hashes(output)
    run(tmp_path / "alone", **given)
    assert hashes(tmp_path / "alone") == hashes(output)  # a baseline changes nothing of the student


def test_equal_models_learn_nothing(tmp_path: Path) -> None:
    """A student with all of the teacher's blocks, without dropout, is where every loss but the labels' is zero."""
    source = tiny("llama", tmp_path / "source", tokenizer=True)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    for method in ("tinybert", "minilm"):
        report = run(
            tmp_path / method, teacher=str(source), student="layers=2", method=method, hard_weight=0.0,
            cosine_weight=1.0, data=str(tmp_path / "text.txt"), steps=1,
        )  # fmt: skip
        assert report.distillation is not None
        assert report.distillation.history[0]["loss"] == pytest.approx(0, abs=1e-5)


def test_a_teacher_is_any_function(tmp_path: Path) -> None:
    """An ensemble of a teacher with itself is that teacher; a checkpoint of its own is a student, too."""
    run(tmp_path / "one", steps=2)
    run(tmp_path / "two", steps=2, ensemble=("sample:classifier",))
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(torch.allclose(value, two[name], atol=1e-4) for name, value in one.items())
    report = run(tmp_path / "again", student=str(tmp_path / "one"), steps=2)
    assert report.distillation is not None and report.distillation.student.startswith("the checkpoint ")
    assert not torch.equal(tensors(tmp_path / "again")["classifier.weight"], one["classifier.weight"])


def test_a_student_of_a_config(tmp_path: Path) -> None:
    config = json.loads((hub.resolve("sample:classifier").path / "config.json").read_text())
    (tmp_path / "small.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "intermediate_size": 64}))
    report = run(tmp_path / "out", student=str(tmp_path / "small.json"), method="distilbert", steps=2)
    assert report.distillation is not None and report.distillation.student.startswith("a config of its own")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 64


def test_a_student_has_its_teachers_licence_unless_it_came_with_one(tmp_path: Path) -> None:
    """What was cut from a teacher is a derivative of it; a checkpoint of its own is one of that."""
    made = {}
    for name, licence in (("teacher", "apache-2.0"), ("student", "cc-by-nd-4.0")):
        made[name] = tmp_path / f"models--org--{name}" / "snapshots" / (str(len(made)) * 40)
        shutil.copytree(hub.resolve("sample:classifier").path, made[name])
        (made[name] / "README.md").write_text(f"---\nlicense: {licence}\nlanguage: en\n---\n")
    cut = run(tmp_path / "cut", teacher=str(made["teacher"]), data="sample", steps=1).origin
    assert cut == Origin("org/teacher", "0" * 40, "apache-2.0", languages=["en"])
    named = run(tmp_path / "named", teacher=str(made["teacher"]), student=str(made["student"]), data="sample", steps=1)
    assert named.origin is not None and (named.origin.repo, named.origin.license) == ("org/student", "cc-by-nd-4.0")
    assert relation(named) == "finetune" and "distilled" in tags(named)


def test_a_larger_student_is_a_warning(tmp_path: Path) -> None:
    run(tmp_path / "small", steps=1)
    report = run(tmp_path / "out", teacher=str(tmp_path / "small"), student="sample:classifier", layer_map="0:0",
                 data="sample", steps=1)  # fmt: skip
    assert any("it is no smaller" in note for note in report.notes)


# --- a run that ends early ---


@pytest.mark.parametrize(
    ("settings", "after", "resumed"),
    [(NARROW, 3, 2), ({"method": "distilbert", "baseline": True}, 9, 2),
     ({"group_by_length": True, "steps": 10}, 9, 8),
     pytest.param({"method": "minilm"}, 5, 4, marks=SLOW)],
)  # fmt: skip
def test_a_broken_run_ends_bit_identical(settings: dict[str, Any], after: int, resumed: int, tmp_path: Path) -> None:
    """Also in the second of two trainings, with projections that the checkpoint does not have, and in an epoch whose
    order is not the first's."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, **settings)
    broken_run(broken, after, **settings)
    assert not broken.exists() and partial_of(broken).exists()
    report = run(broken, **settings)
    assert hashes(broken) == hashes(whole) and not partial_of(broken).exists()
    assert report.distillation is not None and report.distillation.resumed == resumed


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, calls = Distillation.loss, 0

    def broken(self: Any, *given: Any) -> Any:
        nonlocal calls
        calls += 1
        return loss(self, *given) * (float("nan") if calls == 5 else 1)

    monkeypatch.setattr(Distillation, "loss", broken)
    with pytest.raises(NumericalError, match="loss of step 5 is not a finite number; the state of step 4 is kept"):
        run(tmp_path / "out", method="tinybert")
    assert not (tmp_path / "out").exists()


# --- the command ---


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    capfd.readouterr()
    assert main([
        "distill", "sample:lm", "--student", "layers=1", "--data", "default", "--method", "distilbert", "--samples",
        "16", "--sequence-length", "24", "--steps", "12", "--no-evaluate", "-o", str(output), "--json",
    ]) == 0  # fmt: skip
    report = json.loads(capfd.readouterr().out)
    assert report["distillation"]["steps"] == 12 and report["task"] == "causal-lm"
    assert Report.read(output).recipe == {
        "teacher": "sample:lm", "student": "layers=1", "method": "distilbert", "samples": 16, "sequence_length": 24,
        "steps": 12,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "bert"], "--method bert cannot be: choose one of logits, distilbert"),
        (["--student", "layers=9"], "the teacher has 4; take fewer"),
        (["--student", "depth=3"], "depth=3 is none of what it takes"),
        (["--student", "sample:lm"], "is for sequence-classification and sample:lm for causal-lm"),
        (["--student", "nobody/nothing"], "nobody/nothing"),
        (["--layer-map", "0:7", "--method", "tinybert"], "has 0:7, which is out of range"),
        (["--layer-map", "last-one"], "give uniform, last, skip or pairs"),
        (["--student", "hidden=64,heads=4", "--method", "distilbert"], "there is no cosine"),
        (["--student", "hidden=64,heads=2", "--method", "tinybert"], "give --head-map"),
        (["--soft-weight", "0", "--hard-weight", "1"], "nothing is learned from the teacher"),
        (["--temperature", "0"], "--temperature 0.0 cannot be"),
        (["--divergence", "l2"], "choose one of forward, reverse, jsd"),
        (["--hidden-weight", "-1"], "--hidden-weight -1.0 cannot be"),
        (["--data", "TEXT", "--baseline"], "Training without a teacher needs labels"),
        (["--data", "EMPTY"], "EMPTY"),
        (["--data", "nothing-there.txt"], "does not exist"),
        (["--ensemble", "sample:lm"], "is for causal-lm"),
        (["--relation-heads", "7", "--method", "minilm"], "--relation-heads 7 does not divide"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    flags: list[str], said: str, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output, empty = tmp_path / "out", tmp_path / "empty.txt"
    empty.write_text("")
    flags = [str(text) if flag == "TEXT" else str(empty) if flag == "EMPTY" else flag for flag in flags]
    said = said.replace("EMPTY", str(empty))
    given = ["--student", "layers=1", "--data", "default", "--steps", "2", "--samples", "8", *flags]
    capfd.readouterr()
    assert main(["distill", "sample:classifier", *given, "--no-evaluate", "-o", str(output)]) == 2
    sentences = [line for line in capfd.readouterr().err.splitlines() if line.startswith("llmcomp: ")]
    assert len(sentences) == 1 and said in sentences[0], sentences
    assert not output.exists()


def test_labels_that_do_not_match(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = tiny("bert-classifier", tmp_path / "other", tokenizer=True)
    rows = [json.dumps({"text": f"Row {number} of some.", "label": number % 3}) for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    given = ["--data", str(tmp_path / "rows.jsonl"), "--label-column", "label", "--steps", "1", "--no-evaluate"]
    assert main(["distill", "sample:classifier", "--student", str(other), *given]) == 2
    assert "has the labels" in capfd.readouterr().err
    for missing in (["--student", "layers=1"], ["--data", "default"]):
        assert main(["distill", "sample:classifier", *missing]) == 2
        assert "llmcomp distill needs" in capfd.readouterr().err


# --- the scripts ---


def script(name: str, arguments: list[str]) -> int:
    found: int = runpy.run_path(str(SCRIPTS / f"distill_{name}.py"))["main"](arguments)
    return found


@pytest.mark.parametrize(("name", "teacher", "method"), [("bert", "classifier", "distilbert"), ("lm", "lm", "logits")])
def test_a_script_runs_a_file(name: str, teacher: str, method: str, tmp_path: Path) -> None:
    config, output = tmp_path / "plan.yaml", tmp_path / "out"
    config.write_text(f"teacher: sample:{teacher}\nstudent: layers=1\nsamples: 8\nsteps: 9\nsequence_length: 24\n")
    settings = ["steps=2", "evaluate=false", "device=cpu", f"output={output}"]
    assert script(name, ["--config", str(config), *settings]) == 0
    found = Report.read(output).distillation
    assert found is not None and (found.steps, found.method) == (2, method)


def test_two_stages(text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The task's student is the general one under a head of its own; a general stage that is there is not run again."""
    masked = tiny("bert", tmp_path / "masked", tokenizer=True)
    classifier = tiny("bert-classifier", tmp_path / "classifier", tokenizer=True)
    rows = [json.dumps({"text": f"Row {number} of some.", "label": number % 3}) for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    shared = {"steps": 2, "sequence_length": 24, "batch_size": 4, "evaluate": False, "device": "cpu"}
    general = {"teacher": str(masked), "student": NARROW["student"], "data": str(text), "samples": 8, **shared}
    task = {"teacher": str(classifier), "data": str(tmp_path / "rows.jsonl"), "label_column": "label", **shared}
    config = tmp_path / "plan.yaml"
    config.write_text(json.dumps({"general": {**general, "output": str(tmp_path / "general")}, "task": task}))
    for number in range(2):
        assert script("tinybert", ["--config", str(config), f"output={tmp_path / str(number)}"]) == 0
    assert hashes(tmp_path / "0") == hashes(tmp_path / "1")
    found = Report.read(tmp_path / "0").distillation
    assert found is not None and found.student.endswith("under a fresh head") and found.method == "tinybert"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "0")
    assert (model.config.num_labels, model.config.hidden_size) == (3, 64)
    more = {"general": {**general, "output": str(tmp_path / "general")}, "augment": {"copies": 2}, "task": task}
    config.write_text(json.dumps(more))
    assert script("tinybert", ["--config", str(config), f"output={tmp_path / 'more'}"]) == 0
    augmented = Report.read(tmp_path / "more").distillation
    assert augmented is not None and "general-augmented.jsonl, 24 rows" in augmented.data
    config.write_text(json.dumps({**more, "augment": {"copy": 2}}))
    assert script("tinybert", ["--config", str(config), f"output={tmp_path / 'no'}"]) == 2
    assert "copies" in capfd.readouterr().err
    config.write_text(json.dumps({"general": general, "task": task}))
    assert script("tinybert", ["--config", str(config)]) == 2
    assert "names no output of general" in capfd.readouterr().err
    config.write_text(json.dumps(task))
    assert script("tinybert", ["--config", str(config)]) == 2
    assert "it needs the mappings general and task" in capfd.readouterr().err


def test_processes_that_did_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """accelerate starts one on a CPU where it was asked for two; its own flags keep their names in the sentence."""
    for name, value in (("ACCELERATE_MIXED_PRECISION", "no"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = tmp_path / "plan.yaml"
    config.write_text("teacher: sample:lm\nstudent: layers=1\n")
    assert script("lm", ["--config", str(config)]) == 2
    assert "`accelerate launch --multi_gpu --num_processes N" in capfd.readouterr().err
