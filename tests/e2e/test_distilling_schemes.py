"""Who teaches, from end to end: a cache, the student's own past, a second student, assistants, nobody."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_runs import broken_run, quickly, run
from e2e_runs import hashes, tensors
from tiny import tiny
from transformers import AutoModelForSequenceClassification

from llmcomp import distillation, hub
from llmcomp.cli.main import main
from llmcomp.errors import BadCheckpoint, BadData
from llmcomp.report.schema import Report
from llmcomp.training import past, peers, teachers

LM = {"teacher": "sample:lm", "student": "layers=1"}
MUTUAL = {"student": "layers=2", "peer": "layers=1,hidden=64,heads=4,mlp=96"}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quickly():
        yield


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Rows with labels, for the sample classifier."""
    found = [json.dumps({"text": f"Row {number} tells of {number % 8} things.", "label": number % 8})
             for number in range(24)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(found))
    return str(tmp_path / "rows.jsonl")


def differ(one: Path, two: Path) -> float:
    """The largest relative difference of two checkpoints' tensors."""
    a, b = tensors(one), tensors(two)
    return max(float((b[name] - value).norm() / value.norm().clamp_min(1e-6)) for name, value in a.items())


# --- a cache ---


@pytest.mark.parametrize("settings", [{}, LM], ids=["classifier", "lm"])
def test_a_cached_teacher_is_that_teacher(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to what rounding and the classes beyond the kept ones say; the second run does not run it."""
    shared = {**settings, "steps": 3, "learning_rate": 1e-4}
    live = run(tmp_path / "live", **shared)
    cached = {**shared, "teacher_cache": str(tmp_path / "cache"), "cached_classes": 1500}
    report = run(tmp_path / "one", **cached)
    assert report.distillation is not None and live.distillation is not None
    for one, two in zip(report.distillation.history, live.distillation.history, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=0.02)
    assert differ(tmp_path / "live", tmp_path / "one") < 1e-2
    assert "ask the teacher" in report.phases

    def never(model: Any, taps: Any) -> Any:
        def teach(inputs: Any) -> Any:
            raise AssertionError("the teacher was asked")

        return teach

    monkeypatch.setattr(teachers, "watched", never)
    run(tmp_path / "two", **cached)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert {file.suffix for file in (tmp_path / "cache").rglob("*") if file.is_file()} == {".json", ".safetensors"}


def test_a_cache_of_a_masked_language_model(text: Path, tmp_path: Path) -> None:
    """Each sample is masked in one way for good; a killed run ends with the same bits."""
    source = tiny("bert", tmp_path / "bert", tokenizer=True)
    given = {"teacher": str(source), "data": str(text), "teacher_cache": str(tmp_path / "cache"), "cached_bits": 8}
    run(tmp_path / "whole", **given)
    broken_run(tmp_path / "broken", 3, **given)
    report = run(tmp_path / "broken", **given)
    assert report.distillation is not None and report.distillation.resumed == 2
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "broken")


# --- the past ---


def test_the_past_is_a_running_mean() -> None:
    """With decay 0 it is the student itself; else, at first, the plain mean of what came after each step."""
    from types import SimpleNamespace

    def teach(decay: float, steps: int) -> tuple[torch.nn.Module, list[torch.Tensor], torch.Tensor]:
        student = torch.nn.Linear(3, 2)
        held, callback = [], past.Past(student, decay)
        for step in range(1, steps + 1):
            with torch.no_grad():
                student.weight.add_(torch.randn(2, 3))
            held.append(student.weight.detach().clone())
            callback.on_step_end(None, SimpleNamespace(global_step=step), SimpleNamespace(should_save=False))
        return student, held, callback.model.weight

    student, _, mean = teach(0.0, 4)
    assert torch.equal(mean, student.weight)
    torch.manual_seed(0)
    start = torch.nn.Linear(3, 2).weight.detach()
    torch.manual_seed(0)
    _, held, mean = teach(0.999, 5)
    assert torch.allclose(mean, torch.stack([start, *held]).double().mean(0).float(), atol=1e-5)
    assert not mean.requires_grad
    torch.manual_seed(0)
    _, held, mean = teach(0.6, 4)  # 1 - 1/(step + 1) is above 0.6 from the second step on
    wanted = (start + held[0]) / 2
    for value in held[1:]:
        wanted = 0.6 * wanted + 0.4 * value
    assert torch.allclose(mean, wanted, atol=1e-5)


@pytest.mark.parametrize("method", ["logits", pytest.param("tinybert", marks=pytest.mark.slow)])
def test_a_broken_run_with_a_past_ends_bit_identical(method: str, rows: str, tmp_path: Path) -> None:
    given = {"past": 0.9, "method": method, "data": rows, "label_column": "label", "hard_weight": 1.0}
    report = run(tmp_path / "whole", **given)
    broken_run(tmp_path / "broken", 3, **given)
    again = run(tmp_path / "broken", **given)
    assert again.distillation is not None and again.distillation.resumed == 2
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "broken")
    assert report.distillation is not None and report.distillation.teachers == ["the student's own past (0.9)"]
    assert [one["loss"] for one in again.distillation.history] == [one["loss"] for one in report.distillation.history]


# --- a second student ---


def test_two_students_teach_each_other(rows: str, tmp_path: Path) -> None:
    """In one run, which resumes to the same bits; the second one leaves no trace, and made a difference."""
    given = {**MUTUAL, "data": rows, "label_column": "label"}
    report = run(tmp_path / "whole", **given)
    broken_run(tmp_path / "broken", 3, **given)
    run(tmp_path / "broken", **given)
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "broken")
    assert not [name for name in tensors(tmp_path / "whole") if peers.PEER in name]
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").config.num_hidden_layers == 2
    assert report.distillation is not None and report.distillation.teachers == [f"a second student ({MUTUAL['peer']})"]
    run(tmp_path / "other", **{**given, "peer": "layers=1"})
    assert hashes(tmp_path / "other") != hashes(tmp_path / "whole")


# --- assistants ---


def test_assistants_are_a_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a checkpoint beside the output, which is not trained twice; the student is held against the first."""
    sides: list[Path] = []

    def evaluate(self: Any, checkpoint: Path, against: Path, texts: Any, cost: bool) -> Any:
        sides.append(against)
        raise BadData("not in this test")

    monkeypatch.setattr(distillation.Distilling, "_evaluate", evaluate)
    given = {"student": "layers=1", "assistants": ("layers=3", "layers=2"), "steps": 2, "evaluate": True}
    output = tmp_path / "out"
    report = run(output, **given)
    weights = [tmp_path / f"out-assistant-{number}" / "model.safetensors" for number in (1, 2)]
    found, second = report.distillation, Report.read(weights[1].parent).distillation
    assert found is not None and second is not None and sides == [hub.resolve("sample:classifier").path]
    assert second.student.startswith("blocks 0, 2 of the teacher")  # which had three
    assert found.teachers == [str(weights[1].parent)] and second.teachers == [str(weights[0].parent)]
    assert report.model == "sample:classifier" and report.recipe["assistants"] == ["layers=3", "layers=2"]
    assert found.teacher_parameters == 2 * second.teacher_parameters - second.parameters
    before, made = [path.stat().st_mtime_ns for path in weights], hashes(output)
    shutil.rmtree(output)
    run(output, **given)
    assert [path.stat().st_mtime_ns for path in weights] == before and hashes(output) == made
    run(tmp_path / "same", student="layers=1", teacher=str(weights[1].parent), data="sample:classifier", steps=2)
    assert hashes(tmp_path / "same") == made


# --- other tokens ---


def test_a_teacher_of_another_tokenizer(text: Path, tmp_path: Path) -> None:
    """A decoder learns over the tokens that both have, from a cache, too, to the same bits whoever asked."""
    student = tiny("llama", tmp_path / "student", tokenizer=True)
    given = {"teacher": "sample:lm", "student": str(student), "data": str(text), "vocabulary": "shared",
             "hard_weight": 0.0, "soft_weight": 1.0}  # fmt: skip
    report = run(tmp_path / "live", **given)
    assert report.distillation is not None
    assert any("tokens that both vocabularies have, of 512" in note for note in report.notes)
    cached = {**given, "teacher_cache": str(tmp_path / "cache"), "cached_classes": 512}
    again = run(tmp_path / "one", **cached)
    assert again.distillation is not None
    for one, two in zip(report.distillation.history, again.distillation.history, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=0.02)
    run(tmp_path / "two", **cached)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_a_classifiers_teacher_reads_its_own_tokens(rows: str, tmp_path: Path) -> None:
    """Beside one with the student's, in an ensemble; what is measured is each on its own."""
    student = tiny("bert-classifier", tmp_path / "student", tokenizer=True, num_labels=8)
    names = AutoModelForSequenceClassification.from_pretrained(hub.resolve("sample:classifier").path).config.id2label
    config = json.loads((student / "config.json").read_text())
    labels = {name: int(number) for number, name in names.items()}
    (student / "config.json").write_text(json.dumps({**config, "id2label": names, "label2id": labels}))
    given = {"student": str(student), "data": rows, "label_column": "label", "steps": 2}
    report = run(tmp_path / "out", vocabulary="shared", ensemble=(str(student),), **given)
    assert report.distillation is not None and len(report.distillation.teachers) == 2
    with pytest.raises(BadCheckpoint, match="or --vocabulary shared"):
        run(tmp_path / "other", **given)


# --- some labels ---


def test_rows_without_a_label_are_the_teachers(tmp_path: Path) -> None:
    """They change a student that has a teacher, and not one that has none, which leaves them out."""
    rows = [{"text": f"Row {number} tells of {number % 8} things.", "label": number % 8} for number in range(12)]
    more = [{"text": f"Line {number} has no label.", "label": None} for number in range(12)]
    for name, lines in (("few", rows), ("all", [*rows, *more])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = {}
    for name in ("few", "all"):
        for method in ("labels", "logits"):
            output = tmp_path / f"{name}-{method}"
            run(output, data=str(tmp_path / f"{name}.jsonl"), label_column="label", method=method, steps=3)
            made[name, method] = hashes(output)
    assert made["few", "labels"] == made["all", "labels"]
    assert made["few", "logits"] != made["all", "logits"]


# --- nobody ---


def test_labels_alone_are_the_baseline(rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as the student that --baseline trains, and the teacher does not run."""
    given = {"data": rows, "label_column": "label", "evaluate": False}
    held: list[dict[str, torch.Tensor]] = []
    state = distillation.held_state

    def note(model: Any) -> dict[str, torch.Tensor]:
        held.append(state(model))
        return held[-1]

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "held_state", note)
        run(tmp_path / "beside", baseline=True, **given)
    monkeypatch.setattr(teachers, "watched", None)
    report = run(tmp_path / "alone", method="labels", **given)
    alone = tensors(tmp_path / "alone")
    assert all(torch.equal(value, held[1][name].to(value.dtype)) for name, value in alone.items() if name in held[1])
    assert report.distillation is not None and report.distillation.teachers == []
    assert report.distillation.losses == {"hard": 1.0}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--past", "1"], "--past 1.0 cannot be"),
        (["--past", "0.9", "--peer", "layers=1"], "give one of them"),
        (["--peer", "layers=1", "--method", "distilbert"], "these weights want cosine"),
        (["--peer", "depth=1"], "depth=1 is none of what it takes"),
        (["--assistants", "layers=2", "--past", "0.9"], "leave --past and --peer out"),
        (["--assistants", "layers=2"], "give it a name with --output"),
        (["--teacher-cache", "CACHE", "--method", "tinybert"], "keeps logits alone, and these weights want embedding"),
        (["--teacher-cache", "CACHE", "--past", "0.9"], "teachers that stay as they are"),
        (["--teacher-cache", "CACHE", "--cached-bits", "4"], "choose one of 16, 8"),
        (["--teacher-cache", "CACHE", "--cached-classes", "0"], "--cached-classes 0 cannot be"),
        (["--method", "labels", "--baseline"], "has no teacher, so --baseline is for another method"),
        (["--method", "labels", "--data", "TEXT"], "Training without a teacher needs labels"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    flags: list[str], said: str, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [{"TEXT": str(text), "CACHE": str(tmp_path / "cache")}.get(flag, flag) for flag in flags]
    output = [] if "--output" in said else ["-o", str(tmp_path / "out")]
    given = ["--student", "layers=1", "--data", "default", "--steps", "2", "--samples", "8", "--no-evaluate"]
    assert main(["distill", "sample:classifier", *given, *output, *flags]) == 2
    sentences = [line for line in capfd.readouterr().err.splitlines() if line.startswith("llmcomp: ")]
    assert len(sentences) == 1 and said in sentences[0], sentences
    assert not (tmp_path / "out").exists()
