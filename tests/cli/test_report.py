"""`llmcomp report`: the table on stdout, the page where it was asked for, JSON alone with --json."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from llmcomp.cli.report import report as verb
from llmcomp.errors import BadCheckpoint, UserError
from llmcomp.report.schema import FILE_NAME, Report

app = typer.Typer()
app.command()(verb)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    example = Path(__file__).parent.parent / "report" / "conftest.py"
    folder = tmp_path / "tinyllama-gptq-w4"
    folder.mkdir()
    (folder / FILE_NAME).write_text(runpy.run_path(str(example))["make_report"]().to_json(), encoding="utf-8")
    return folder


def test_prints_the_table_and_writes_the_page(directory: Path) -> None:
    result = CliRunner().invoke(app, [str(directory)])
    assert result.exit_code == 0
    assert "2.89× smaller" in result.stdout
    assert "\x1b" not in result.stdout
    page = directory / "llmcomp_report.html"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert str(page) in result.stdout.replace("\n", "").replace(" ", "")


def test_page_goes_where_it_is_asked_for(directory: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(directory), "--html", str(tmp_path / "page.html")])
    assert result.exit_code == 0
    assert "tinyllama" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not (directory / "llmcomp_report.html").exists()


def test_json_is_the_report_and_nothing_else(directory: Path) -> None:
    result = CliRunner().invoke(app, [str(directory), "--json"])
    assert Report.from_json(result.stdout) == Report.read(directory)
    assert result.stderr == ""
    assert not (directory / "llmcomp_report.html").exists()


def test_a_page_that_is_up_to_date_is_kept(directory: Path) -> None:
    CliRunner().invoke(app, [str(directory)])
    page = directory / "llmcomp_report.html"
    written = page.stat().st_mtime_ns
    CliRunner().invoke(app, [str(directory)])
    assert page.stat().st_mtime_ns == written
    page.write_text("old", encoding="utf-8")
    CliRunner().invoke(app, [str(directory)])
    assert page.read_text(encoding="utf-8") != "old"


def test_no_report_is_a_users_mistake(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert isinstance(result.exception, BadCheckpoint)
    assert FILE_NAME in str(result.exception)


def test_a_place_that_cannot_be_written_is_named(directory: Path, tmp_path: Path) -> None:
    place = tmp_path / "missing" / "page.html"
    result = CliRunner().invoke(app, [str(directory), "--html", str(place)])
    assert isinstance(result.exception, UserError)
    assert str(place) in str(result.exception)
    assert "--html" in str(result.exception)
