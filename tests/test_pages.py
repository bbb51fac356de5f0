"""The documentation site: every block of code runs or says why not, every page can be found, every link leads somewhere."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from pages import CODE, REPOSITORY, SHOWN, blocks, run
from transformers.utils import logging

import llmcomp
from llmcomp import samples, session, training_run
from llmcomp.formats.verify import check
from llmcomp.measure import cost
from llmcomp.measure.resident import resident_peak

DOCS = REPOSITORY / "docs"
RESULTS = REPOSITORY / "evals" / "RESULTS.md"
PAGES = {str(path.relative_to(DOCS)): path for path in sorted(DOCS.rglob("*.md"))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
RUNNING = [name for name, text in TEXTS.items() if any(block.run for block in blocks(text))]
# Characters and rows of the shipped text that a page's commands read: a dozen windows to calibrate on, four to measure.
CHARACTERS = {"calibration_text": 16_000, "validation_text": 6_000}
ROWS = {"classifier_calibration": 48, "classifier_validation": 24}


# --- blocks of code ---


@pytest.mark.parametrize("name", PAGES)
def test_every_block_is_run_or_says_why_not(name: str) -> None:
    for block in blocks(TEXTS[name]):
        place = f"{name}:{block.line}"
        assert block.language in (*CODE, *SHOWN), f"{place}: {block.language or 'no'} language"
        if block.language in SHOWN:
            assert not block.run and block.reason is None, f"{place}: what is shown has no mark"
        else:
            assert block.run != bool(block.reason), f"{place}: needs '<!-- run -->' or '*Not run by the tests: ….*'"


def test_most_blocks_run() -> None:
    found = [block for text in TEXTS.values() for block in blocks(text) if block.language in CODE]
    assert sum(block.run for block in found) > 2 * sum(not block.run for block in found)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The beginnings of the texts that ship."""
    folder, found = tmp_path_factory.mktemp("short"), {}
    for name, count in CHARACTERS.items():
        found[name] = folder / f"{name}.txt"
        found[name].write_text(getattr(samples, name)().read_text(encoding="utf-8")[:count], encoding="utf-8")
    for name, count in ROWS.items():
        found[name] = folder / f"{name}.jsonl"
        rows = getattr(samples, name)().read_text(encoding="utf-8").splitlines(keepends=True)[:count]
        found[name].write_text("".join(rows), encoding="utf-8")
    return found


@pytest.fixture
def quick(short: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of a reader who stands in the clone, has little text, and stays in one process."""
    for name, path in short.items():
        monkeypatch.setattr(samples, name, lambda path=path: path)
    for where in (session, training_run):
        monkeypatch.setattr(where, "verify", check)
        monkeypatch.setattr(where, "render", lambda report: "<!doctype html>")  # tests/report draws them
    monkeypatch.setattr(cost, "peak_memory", lambda *given, **settings: resident_peak())
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    logging.set_verbosity_warning()


@pytest.mark.parametrize("name", RUNNING)
def test_marked_blocks_run(name: str, quick: Path) -> None:
    run(TEXTS[name], name, quick)
