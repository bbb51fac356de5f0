"""`llmcomp evaluate`: one JSON object or a table, and the right model to compare with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from tiny import tiny
from typer.testing import CliRunner

from llmcomp.cli.evaluate import evaluate
from llmcomp.errors import BadData
from llmcomp.report.schema import Report

app = typer.Typer()
app.command()(evaluate)
QUICK = ["--no-cost", "--windows", "3", "--sequence-length", "24"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "held-out.txt"
    path.write_text(
        "\n\n".join(f"Paragraph {n} says that {n} and {n + 1} are neighbours." for n in range(80))
    )
    return path


def test_json_is_one_report(tmp_path: Path, text: Path) -> None:
    one = tiny("llama", tmp_path / "one", tokenizer=True)
    other = tiny("llama", tmp_path / "other", seed=1, tokenizer=True)
    command = [str(other), "--against", str(one), "--eval-data", str(text), "--json", *QUICK]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    report = Report.from_json(result.stdout)
    assert report.command == "evaluate" and report.output == str(other)
    assert report.divergence is not None and report.divergence.kl_mean.value > 0
    assert report.after is not None and report.after.quality is not None and report.after.quality.samples == 3


def test_the_original_is_taken_from_the_models_own_report(tmp_path: Path, text: Path) -> None:
    one = tiny("bert", tmp_path / "one", tokenizer=True)
    other = tiny("bert", tmp_path / "other", tokenizer=True)
    (other / "llmcomp_report.json").write_text(json.dumps({"model": "one", "source": str(one)}))
    result = CliRunner().invoke(app, [str(other), "--eval-data", str(text), *QUICK], catch_exceptions=False)
    assert result.exit_code == 0
    assert "top-1 agreement" in result.stdout and "100" in result.stdout
    assert "perplexity" in result.stdout


def test_labels_by_column(tmp_path: Path) -> None:
    model = tiny("distilbert-classifier", tmp_path / "model", tokenizer=True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"words": f"row {n} " * (n % 4 + 1), "area": n % 3}) + "\n" for n in range(12))
    )
    command = [
        str(model),
        "--eval-data",
        str(rows),
        "--text-column",
        "words",
        "--label-column",
        "area",
        "--json",
    ]
    result = CliRunner().invoke(app, [*command, "--no-cost", "--rows", "9"], catch_exceptions=False)
    quality = json.loads(result.stdout)["after"]["quality"]
    assert set(quality["metrics"]) == {"accuracy", "f1"} and quality["samples"] == 9


def test_wrong_labels_are_a_users_mistake(tmp_path: Path) -> None:
    model = tiny("distilbert-classifier", tmp_path / "model", tokenizer=True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {n}", "label": n}) + "\n" for n in range(5)))
    result = CliRunner().invoke(app, [str(model), "--eval-data", str(rows), "--no-cost"])
    assert isinstance(result.exception, BadData)
    assert "label 3 is none of the model's 3 classes" in str(result.exception)
