"""README.md does what it says: its commands parse, those marked `<!-- run -->` run, its folders are there."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from command_line import commands, parse, verbs
from pages import REPOSITORY, blocks, run

from llmcomp import session
from llmcomp.formats.verify import check
from llmcomp.measure import cost
from llmcomp.measure.resident import resident_peak
from llmcomp.methods import METHODS

TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks(TEXT)


def test_the_first_two_commands_are_one_line_each() -> None:
    first, second = [block.text for block in BLOCKS if block.language == "bash"][:2]
    for command in (first, second):
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt ")
    assert first.rstrip().endswith(".venv/bin/llmcomp quantize sample:lm --bits 4")
    assert second.rstrip().endswith("-e '.[test]' && .venv/bin/python -m pytest")


def test_the_first_command_is_followed_by_its_output() -> None:
    shown = next(block.text for block in BLOCKS if block.language == "text")
    for part in ("sample:lm  →  sample-lm-gptq-w4", "perplexity", "KL mean (nats)", "Verified", "peak memory"):
        assert part in shown


def test_every_command_parses() -> None:
    found = [line for block in BLOCKS if block.language == "bash" for line in commands(block.text)]
    assert len(found) >= 8
    for line in found:
        parse(line)


def test_every_verb_and_method_is_named() -> None:
    for verb in verbs():
        assert f"llmcomp {verb}" in TEXT
    for method in METHODS:
        assert f"| `{method}`" in TEXT


@pytest.fixture
def few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process verifies and measures memory the first time; later on this one does, which has imported all."""

    def after_the_first(where: ModuleType, name: str, here: Callable[..., Any]) -> None:
        ways = itertools.chain([getattr(where, name)], itertools.repeat(here))
        monkeypatch.setattr(where, name, lambda *given, **settings: next(ways)(*given, **settings))

    after_the_first(session, "verify", check)
    after_the_first(cost, "peak_memory", lambda *given, **settings: resident_peak())


@pytest.mark.usefixtures("few_processes")
def test_marked_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one directory, as a reader would; the later ones use what the former made."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")  # a reader stands in the clone
    assert sum(block.run for block in BLOCKS) >= 4
    run(TEXT, "README.md", tmp_path)
    weights = [tmp_path / name / "model-00001-of-00004.safetensors" for name in ("small", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()  # a recipe repeats the run to the bit
    assert (tmp_path / "page.html").is_file()


def test_the_tree_is_the_repository() -> None:
    tree = next(block.text for block in reversed(BLOCKS) if block.language == "text")
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    assert all((REPOSITORY / folder).is_dir() for folder in listed)
    packages = {str(path.parent.relative_to(REPOSITORY)) for path in REPOSITORY.glob("llmcomp/*/__init__.py")}
    assert packages <= listed
    hidden = re.compile(r"\.(?!ci$)|build$|dist$|__pycache__$|.*\.egg-info$")
    folders = {path.name for path in REPOSITORY.iterdir() if path.is_dir() and not hidden.match(path.name)}
    outputs = {path.parent.name for path in REPOSITORY.glob("*/llmcomp_recipe.yaml")}  # of README's commands
    assert folders - outputs <= listed


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert link.startswith("https://") or (REPOSITORY / link).is_file(), link
