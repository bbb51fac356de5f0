"""`llmcomp quantize` and `evaluate` on directories of sentence-transformers, made without that package."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e_command import Command, edit_json
from e2e_runs import LENGTH, SAMPLES, Run, quantize, recipe_of, reload
from rich.console import Console
from tiny_sentences import sentence_encoder, write_json, write_pairs

from llmcomp.cli.main import main
from llmcomp.report.schema import Report
from llmcomp.report.table import table

METRICS = {"spearman", "similarity_spearman", "embedding_cosine", "overlap_at_10"}
MODULES = (
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
)


@dataclass(frozen=True)
class Made:
    """A run of `llmcomp quantize` with everything on, what it was given and what it printed."""

    source: Path
    output: Path
    columns: list[str]
    printed: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Made:
    root = tmp_path_factory.mktemp("sentences")
    source, output = sentence_encoder(root / "encoder", after=("Dense", "Normalize")), root / "encoder-w4"
    columns = ["--eval-data", str(write_pairs(root / "pairs.jsonl")), "--text-column", "first,second"]
    columns += ["--label-column", "score"]
    calibration = ["--calibration", str(text), "--samples", str(SAMPLES), "--sequence-length", str(LENGTH)]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "100")
        patch.setattr(
            "llmcomp.measure.cost.peak_memory", lambda *_, **__: 1_000_000
        )  # a process for each model
        assert main(["quantize", str(source), *calibration, *columns, "-o", str(output)]) == 0
    return Made(source, output, columns, printed.getvalue())


def test_modules_are_kept_to_the_byte(made: Made) -> None:
    for name in MODULES:
        assert (made.output / name).read_bytes() == (made.source / name).read_bytes(), name
    assert (made.output / "3_Normalize").is_dir()
    config = json.loads((made.output / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["architectures"] == ["BertModel"]


def test_the_report_has_the_figures(made: Made) -> None:
    report = Report.read(made.output)
    assert report.task == "encoder" and report.verification is not None and report.verification.passed
    assert report.before is not None and report.before.quality is not None
    assert report.after is not None and report.after.quality is not None and report.divergence is None
    assert set(report.before.quality.metrics) == {"spearman"}
    assert set(report.after.quality.metrics) == METRICS
    assert 0.9 < report.after.quality.metrics["embedding_cosine"].value < 1
    assert report.after.quality.samples == 30
    assert not [note for note in report.notes if "Not evaluated" in note]


def test_the_table_and_the_page_show_them(made: Made) -> None:
    page = (made.output / "llmcomp_report.html").read_text(encoding="utf-8")
    for title in ("Spearman", "similarity Spearman", "embedding cosine", "overlap at 10"):
        assert f" {title} " in made.printed and title in page
    overlap = Report.read(made.output).after.quality.metrics["overlap_at_10"].value  # type: ignore[union-attr]
    assert f"{overlap:.1%}" in made.printed and f"{overlap:.1%}" in page
    assert "as pairs: 30 rows." in " ".join(made.printed.split())
    assert '<div class="title">overlap at 10</div>' in page


def test_evaluate_gives_the_same_figures(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    command = [
        "evaluate",
        str(made.output),
        "--against",
        str(made.source),
        *made.columns,
        "--no-cost",
        "--json",
    ]
    assert main(command) == 0
    found, report = Report.from_json(capfd.readouterr().out), Report.read(made.output)
    assert found.after is not None and report.after is not None
    assert found.after.quality == report.after.quality
    assert found.before is not None and report.before is not None
    assert found.before.quality == report.before.quality


def test_evaluate_without_pairs_takes_running_text(
    made: Made, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The original is found by the checkpoint's own report."""
    assert main(["evaluate", str(made.output), "--eval-data", str(text), "--no-cost", "--json"]) == 0
    found = Report.from_json(capfd.readouterr().out)
    assert found.after is not None and found.after.quality is not None
    assert set(found.after.quality.metrics) == METRICS - {"spearman"}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(found))
    headline = console.export_text().split("What it cost")[0]
    assert f"overlap at 10 {found.after.quality.metrics['overlap_at_10'].value:.1%} " in headline


def test_a_column_that_is_not_there(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    columns = [*made.columns[:3], "first,third", *made.columns[4:]]
    assert main(["evaluate", str(made.output), *columns, "--no-cost"]) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.endswith("pairs.jsonl has no column 'third'; it has first, second, score.")


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Run:
    """As all-mpnet-base-v2: config.json names a class whose head is not stored."""
    root = tmp_path_factory.mktemp("headless")
    source = sentence_encoder(root / "mpnet", "mpnet")
    edit_json(source / "config.json", lambda config: config.update(architectures=["MPNetForMaskedLM"]))
    return quantize(source, root / "mpnet-w4", recipe_of(text))


def test_a_head_that_is_not_stored_is_not_asked_for(headless: Run) -> None:
    assert headless.report.architecture == "MPNetModel" and headless.report.task == "encoder"
    assert json.loads((headless.output / "config.json").read_text())["architectures"] == ["MPNetModel"]
    # the source as sentence-transformers loads it, for the fresh process to compare with
    plain = shutil.copytree(headless.source, headless.source.with_name("plain"))
    edit_json(plain / "config.json", lambda config: config.update(architectures=["MPNetModel"]))
    found = reload({"it": Run(plain, headless.output, headless.witness, headless.report)})["it"]
    assert found["class"] == "MPNetModel" and found["account"] == {} and found["from_witness"] < 1e-4
    assert found["verification"]["passed"], found["verification"]["checks"]
    assert 1e-5 < found["from_original"] < 0.5


def test_what_cannot_be_measured_does_not_cost_the_checkpoint(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcomp.measure.cost.peak_memory", lambda *_, **__: 1_000_000)
    source = sentence_encoder(tmp_path / "odd")
    write_json(source / "1_Pooling/config.json", {"pooling_mode": "median"})
    run = quantize(source, tmp_path / "odd-w4", recipe_of(text, method="rtn"), evaluate=True)
    assert (run.output / "1_Pooling/config.json").is_file()
    assert [
        note
        for note in run.report.notes
        if note.startswith("Not evaluated: ") and "pools by 'median'" in note
    ]


def test_a_pickled_dense_module_is_refused(command: Command, tmp_path: Path) -> None:
    source = sentence_encoder(tmp_path / "pickled", after=("Dense",))
    (source / "2_Dense/model.safetensors").rename(source / "2_Dense/pytorch_model.bin")
    said = command.refused(2, source)
    assert "2_Dense/pytorch_model.bin is a pickled module" in said and "save_pretrained" in said
