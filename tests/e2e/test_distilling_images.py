"""Training on images from end to end: students of an image classifier, recovery and pruning of one, and one sentence
for what cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_runs import broken_run, quickly, run
from e2e_runs import hashes, quantize, tensors
from recovery_runs import WIDE
from tiny import tiny
from tiny_media import picture, write_data
from transformers import AutoImageProcessor, AutoModelForImageClassification

import llmcomp
from llmcomp import Lora, PruningPlan, Teaching
from llmcomp.cli.main import main
from llmcomp.formats.save import partial_of
from llmcomp.measure import run as measuring
from llmcomp.recipe import Calibration, FactorizeStep, QuantizeStep, Recipe, SparsifyStep, Step
from llmcomp.report.schema import Report
from llmcomp.report.trained import trained_lines
from llmcomp.training.distilling import METHODS, PROJECTIONS

SLOW = pytest.mark.slow
NARROW = {"student": "layers=1,hidden=64,heads=4,mlp=96", "method": "tinybert"}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quickly():
        yield


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("vit-classifier", tmp_path_factory.mktemp("vit") / "model", tokenizer=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data("vit-classifier", tmp_path_factory.mktemp("images") / "data", 12)


def settings(vit: Path, images: Path, **more: Any) -> dict[str, Any]:
    return {"teacher": str(vit), "data": str(images), "samples": None, "sequence_length": 128, **more}


# --- what comes out ---


@pytest.mark.parametrize(
    "chosen",
    [pytest.param({"method": method}, id=method, marks=() if method in ("distilbert", "labels") else SLOW)
     for method in METHODS if method != "tinybert"]
    + [pytest.param(NARROW, id="tinybert"),
       pytest.param({"student": "blocks=1", "method": "tinybert", "layer_map": "0:1"}, id="blocks", marks=SLOW),
       pytest.param({**NARROW, "method": "minilm", "accumulate": 2, "batch_size": 2}, id="narrow", marks=SLOW)],
)  # fmt: skip
def test_a_student_of_an_image_classifier(chosen: dict[str, Any], vit: Path, images: Path, tmp_path: Path) -> None:
    """Which plain transformers opens, its processor beside it, verified, with a loss that falls."""
    output = tmp_path / "out"
    report = run(output, **settings(vit, images, steps=12, **chosen))
    model, info = AutoModelForImageClassification.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()) and model.config.num_hidden_layers == 1
    assert model.config.hidden_size == (64 if "hidden=64" in chosen.get("student", "") else 128)
    assert not [name for name in tensors(output) if PROJECTIONS in name]
    assert (output / "preprocessor_config.json").read_text() == (vit / "preprocessor_config.json").read_text()
    pixels = AutoImageProcessor.from_pretrained(output)(images=[picture(0)], return_tensors="pt")["pixel_values"]
    assert model(pixel_values=pixels).logits.isfinite().all()
    found, verification = report.distillation, report.verification
    assert found is not None and verification is not None and verification.passed
    assert found.losses == {name: value for name, value in vars(METHODS[chosen["method"]]).items() if value}
    losses = [entry["loss"] for entry in found.history]
    assert len(losses) == 12 and sum(losses[-4:]) < sum(losses[:4])
    assert f"{images}, 12 files of images: 12 samples" in found.data


def test_the_report_has_teacher_student_and_baseline(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a table some of whose rows have no label; a baseline changes nothing of the student."""
    monkeypatch.setattr(measuring, "_peaks", lambda paths, *given: [1] * len(paths))  # of fresh processes
    rows = [{"image": str(file), "label": "" if number < 4 else f"LABEL_{number % 3}"}
            for number, file in enumerate(sorted(images.rglob("*.png")))]  # fmt: skip
    table = tmp_path / "rows.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    given = settings(vit, table, method="distilbert", label_column="label")
    report = run(tmp_path / "out", baseline=True, evaluate=True, eval_data=str(images), **given)
    assert Report.read(tmp_path / "out") == report
    found = report.distillation
    assert found is not None and found.baseline is not None and found.baseline_divergence is not None
    assert report.before is not None and report.after is not None and report.divergence is not None
    for side in (report.before, report.after, found.baseline):
        assert side.quality is not None and "accuracy" in side.quality.metrics
    assert "The same student without a teacher: accuracy" in " ".join(trained_lines(report))
    run(tmp_path / "alone", **given)
    assert hashes(tmp_path / "alone") == hashes(tmp_path / "out")


@pytest.mark.parametrize(
    ("chosen", "after", "resumed"),
    [(NARROW, 5, 4), pytest.param({"method": "distilbert", "baseline": True, "steps": 8}, 11, 2, marks=SLOW)],
)
def test_a_broken_run_ends_bit_identical(
    chosen: dict[str, Any], after: int, resumed: int, vit: Path, images: Path, tmp_path: Path
) -> None:
    """With the same images; with one more it is another run."""
    data = tmp_path / "data"
    shutil.copytree(images, data)
    given = settings(vit, data, **chosen)
    run(tmp_path / "whole", **given)
    broken_run(tmp_path / "broken", after, **given)
    assert not (tmp_path / "broken").exists()
    shutil.copytree(partial_of(tmp_path / "broken"), partial_of(tmp_path / "other"))
    report = run(tmp_path / "broken", **given)
    assert hashes(tmp_path / "broken") == hashes(tmp_path / "whole")
    assert report.distillation is not None and report.distillation.resumed == resumed
    picture(500).save(data / "LABEL_1" / "more.png")
    changed = run(tmp_path / "other", **given)
    assert changed.distillation is not None and changed.distillation.resumed == 0
    assert any("was discarded" in note for note in changed.notes)


def test_equal_models_learn_nothing(vit: Path, images: Path, tmp_path: Path) -> None:
    given = settings(vit, images, student="layers=2", hard_weight=0.0, cosine_weight=1.0, steps=1)
    for method in ("tinybert", "minilm"):
        report = run(tmp_path / method, method=method, **given)
        assert report.distillation is not None
        assert report.distillation.history[0]["loss"] == pytest.approx(0, abs=1e-5)


def test_bf16_ends_with_the_training(vit: Path, images: Path, tmp_path: Path) -> None:
    """What is verified, of a float32 checkpoint to 1e-4, is not computed under the training's autocast any more."""
    report = run(tmp_path / "out", bf16=True, steps=2, baseline=True, **settings(vit, images))
    assert report.verification is not None and report.verification.passed
    assert "(allowed 1e-04)" in report.verification.checks[-1]


# --- who teaches ---


def test_a_cache_gives_the_same_student(vit: Path, images: Path, tmp_path: Path) -> None:
    given = settings(vit, images)
    run(tmp_path / "plain", **given)
    run(tmp_path / "one", teacher_cache=str(tmp_path / "cache"), **given)
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 1
    times = [file.stat().st_mtime_ns for file in files]
    run(tmp_path / "two", teacher_cache=str(tmp_path / "cache"), **given)
    assert [file.stat().st_mtime_ns for file in files] == times and hashes(tmp_path / "one") == hashes(tmp_path / "two")
    plain, cached = tensors(tmp_path / "plain"), tensors(tmp_path / "one")
    assert all(torch.allclose(plain[name], cached[name], atol=1e-3) for name in plain)


@pytest.mark.parametrize(
    "chosen",
    [{"peer": "layers=2", "ensemble": True}, pytest.param({"past": 0.9, "method": "distilbert"}, marks=SLOW),
     pytest.param({"assistants": ("layers=2",), "method": "tinybert"}, marks=SLOW)],
)  # fmt: skip
def test_other_teachers(chosen: dict[str, Any], vit: Path, images: Path, tmp_path: Path) -> None:
    chosen = {**chosen, "ensemble": (str(vit),)} if "ensemble" in chosen else chosen
    report = run(tmp_path / "out", **settings(vit, images, **chosen))
    assert report.verification is not None and report.verification.passed


# --- what cannot be ---


def spoiled(root: Path, vit: Path, images: Path) -> dict[str, Path]:
    """Data and models with which something is wrong, by name."""
    found = {name: root / name for name in ("flat", "torn", "others", "mean", "size", "bare")}
    found["flat"].mkdir()
    for number in range(4):
        picture(number).save(found["flat"] / f"{number}.png")
    for name, source in (("torn", images), ("others", images), ("mean", vit), ("size", vit), ("bare", vit)):
        shutil.copytree(source, found[name])
    torn = found["torn"] / "LABEL_1" / "1.png"
    torn.write_bytes(torn.read_bytes()[:-80])
    (found["others"] / "LABEL_2").rename(found["others"] / "dog")
    for name, change in (("mean", {"image_mean": [0.1] * 3}), ("size", {"size": {"height": 48, "width": 48}})):
        file = found[name] / "preprocessor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    (found["bare"] / "preprocessor_config.json").unlink()
    found["patches"] = root / "patches.json"
    found["patches"].write_text(json.dumps({**json.loads((vit / "config.json").read_text()), "patch_size": 16}))
    found["rows"], found["pictures"] = root / "rows.jsonl", root / "pictures.jsonl"
    found["rows"].write_text(json.dumps({"text": "Some.", "label": 0}))
    found["pictures"].write_text(json.dumps({"image": str(next(images.rglob("*.png"))), "label": 0}))
    return {**found, "vit": vit, "images": images}


REFUSED: list[tuple[str, str, list[str], str]] = [
    ("vit", "flat", ["--method", "labels"], "needs labels; put images into subfolders named by their labels"),
    ("vit", "flat", ["--baseline"], "needs labels; put images into subfolders"),
    ("vit", "torn", [], "1.png is no readable image"),
    ("vit", "others", [], "label 'dog' is none of the model's 3 classes"),
    ("vit", "rows", [], "has no column of images (columns: text, label)"),
    ("vit", "default", [], "of which none come with llmcomp"),
    ("vit", "./nothing", [], "./nothing does not exist; give a folder of images"),
    ("vit", "some/images:all:test", [], "never reads a held-out split ('test'"),
    ("bert", "images", [], "is a directory, and text is read from one file"),
    ("bert", "pictures", [], "has images and no text (columns: image, label), and the model reads text"),
    ("bare", "images", [], "has no processor that makes the model's inputs of images"),
    ("size", "images", [], "48 × 48 pixels, which ViTForImageClassification does not take"),
    ("vit", "images", ["--ensemble", "mean"], "reads images otherwise than"),
    ("vit", "images", ["--student", "bert"], "is for image-classification and"),
    ("vit", "images", ["--student", "patches", "--method", "tinybert"], "patches of 16 pixels and its teacher of 8"),
    ("vit", "images", ["--group-by-length"], "--group-by-length is about text, and the model reads images"),
    ("vit", "images", ["--sequence-length", "64"], "--sequence-length is about text"),
    ("vit", "images", ["--vocabulary", "shared"], "--vocabulary is about text"),
    ("vit", "images", ["--text-column", "caption"], "--text-column is about text"),
    ("whisper", "images", [], "Models for speech-seq2seq cannot be trained here"),
]  # fmt: skip


def test_what_cannot_be_is_one_sentence(
    vit: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And nothing is left behind."""
    known = spoiled(tmp_path, vit, images)
    known |= {"bert": tiny("bert-classifier", tmp_path / "bert", tokenizer=True),
              "whisper": tiny("whisper", tmp_path / "whisper", tokenizer=True)}  # fmt: skip
    output = tmp_path / "out"
    for model, data, flags, said in REFUSED:
        given = [str(known.get(flag, flag)) for flag in ["--data", data, *flags]]
        given += [] if "--student" in flags else ["--student", "layers=1"]
        capfd.readouterr()
        assert main(["distill", str(known[model]), *given, "--steps", "1", "--no-evaluate", "-o", str(output)]) == 2
        sentences = [line for line in capfd.readouterr().err.splitlines() if line.startswith("llmcomp: ")]
        assert len(sentences) == 1 and said in sentences[0] and sentences[0].endswith("."), (said, sentences)
        assert not output.exists() and not partial_of(output).exists(), said


# --- other trainings ---


MADE: dict[str, tuple[Step, str]] = {
    "2:4": (SparsifyStep("magnitude"), "dense"),
    "int4": (QuantizeStep("rtn", group_size=64, symmetric=False), "compressed-tensors"),
    "ranks": (FactorizeStep("svd", ratio=0.5), "llmcomp"),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [("2:4", "full"), ("int4", "qat"), ("int4", "lora"),
     *(pytest.param(*one, marks=SLOW) for one in (("2:4", "lora"), ("ranks", "full"), ("ranks", "lora")))],
)  # fmt: skip
def test_recovery_of_an_image_classifier(name: str, method: str, vit: Path, images: Path, tmp_path: Path) -> None:
    step, format = MADE[name]
    source = quantize(vit, tmp_path / "made", Recipe((step,), Calibration(str(images), 8, 32), format=format)).output
    report = llmcomp.recover(
        source, str(images), method=method, lora=Lora(4), teaching=Teaching(str(vit)), evaluate=False,
        optimization=replace(WIDE, learning_rate=1e-3, steps=12, batch_size=12), output=tmp_path / "out",
    ).report  # fmt: skip
    assert report.verification is not None and report.verification.passed and report.recovery is not None
    losses = [entry["loss"] for entry in report.recovery.history]
    assert losses[-1] < losses[0]
    assert method != "lora" or name != "int4" or "(allowed 1e-04)" in report.verification.checks[-1]
    before, after = tensors(source), tensors(tmp_path / "out")
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}
    if name == "2:4":
        matrix = "vit.layers.0.attention.q_proj.weight"
        assert torch.equal(before[matrix] == 0, after[matrix] == 0) and not torch.equal(before[matrix], after[matrix])


@pytest.mark.parametrize("method", ["gradual", pytest.param("lottery", marks=SLOW)])
def test_pruning_in_training_of_an_image_classifier(method: str, vit: Path, images: Path, tmp_path: Path) -> None:
    rounds = {"rounds": 2} if method == "lottery" else {}
    plan = PruningPlan(
        str(vit), str(tmp_path / "out"), str(images), method=method, pattern="2:4", teacher=str(vit), steps=6,
        batch_size=4, evaluate=False, **rounds,
    )  # fmt: skip
    report = llmcomp.prune_in_training(plan).report
    assert report.verification is not None and report.verification.passed
    assert report.pruning is not None and report.pruning.removed == 0.5
