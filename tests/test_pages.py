"""The documentation site: its blocks of code run or say why not, its pages can be found, its links lead somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import commands, parse
from pages import CODE, REPOSITORY, SHOWN, blocks, headings, module_at, run

import llmcomp
from llmcomp import samples, session, training_run
from llmcomp.formats.verify import check
from llmcomp.measure import cost
from llmcomp.measure.resident import resident_peak
from llmcomp.methods import AUTO, LOW_RANK, METHODS, SPARSE

DOCS = REPOSITORY / "docs"
RESULTS = REPOSITORY / "evals" / "RESULTS.md"
PAGES = {str(path.relative_to(DOCS)): path for path in sorted(DOCS.rglob("*.md"))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
RUNNING = [name for name, text in TEXTS.items() if any(block.run for block in blocks(text))]
# Characters and rows of the shipped text that a page's commands read: six windows to calibrate on, three to measure.
CHARACTERS = {"calibration_text": 4_000, "validation_text": 2_500}
WIDEST = 640  # of an equation, in the units of a page, whose column is about that wide
ROWS = {"classifier_calibration": 24, "classifier_validation": 12}


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


@pytest.mark.parametrize("name", PAGES)
def test_every_command_parses(name: str) -> None:
    """Those that are not run, too."""
    for block in blocks(TEXTS[name]):
        for line in commands(block.text) if block.language == "bash" else ():
            parse(line)


def test_what_is_shown_is_what_readme_shows() -> None:
    shown = [block.text for block in blocks(TEXTS["index.md"]) if block.language == "text"]
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert shown and all(text in readme for text in shown)


def test_results_say_that_nobody_runs_them() -> None:
    assert "*Not run by the tests: " in RESULTS.read_text(encoding="utf-8").split("```")[0]


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
    timed = cost.latency
    monkeypatch.setattr(cost, "latency", lambda models, batch, sequence, repeats: timed(models, batch, sequence, 1))
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    known = dict(METHODS)
    yield tmp_path
    METHODS.clear()
    METHODS.update(known)  # a page adds one


@pytest.mark.parametrize("name", RUNNING)
def test_marked_blocks_run(name: str, quick: Path) -> None:
    run(TEXTS[name], name, quick)


# --- what a page of a method holds ---

OF_METHODS = [name for name in TEXTS if name.startswith("methods/") and name != "methods/index.md"]
# Figures with a point or thousands; not those of flags, links, sizes of models or sections of papers.
_FIGURE = re.compile(r"\d[\d,]*\.\d+|\d{1,3}(?:,\d{3})+")
_NO_FIGURE = re.compile(r"`[^`]*`|\[arXiv:[^]]*|\]\([^)]*\)|section \d\.\d|ratio \d\.\d|low rank \d\.\d|1\.1B")


@pytest.mark.parametrize("name", OF_METHODS)
def test_a_page_of_a_method_has_an_equation_a_command_and_a_cost(name: str) -> None:
    text, found = TEXTS[name], blocks(TEXTS[name])
    assert any(block.run and block.language in ("bash", "yaml") for block in found)
    if name != "methods/auto.md":  # a table of others
        assert any(block.language == "math" for block in found)
    assert "## What it costs" in text and "evals/RESULTS.md" in text


@pytest.mark.parametrize("name", [name for name in TEXTS if "```math" in TEXTS[name]])
def test_equations_can_be_drawn(name: str) -> None:
    for block in blocks(TEXTS[name]):
        if block.language == "math":
            drawn = hooks().equation(block.text, "math", "math", {}, None)
            box = re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', drawn)
            assert box and 60 < float(box[1]) < WIDEST and 10 < float(box[2]) < 80, f"{name}:{block.line}"


def hooks() -> Any:
    """docs/mkdocs_hooks.py, which needs no mkdocs to draw."""
    return module_at("docs/mkdocs_hooks.py")


def test_every_method_has_a_page() -> None:
    listed = TEXTS["methods/index.md"]
    for method in (*METHODS, *SPARSE, *LOW_RANK, "auto", "--update", "--activations", "bnb-nf4", "bnb-int8"):
        assert f"`{method}`" in listed, method
    for name in OF_METHODS:
        assert f"]({Path(name).name})" in listed, name


def test_the_table_of_auto_is_the_table() -> None:
    rows = re.findall(r"^\| (\d) \| \[`([\w-]+)`\]", TEXTS["methods/auto.md"], re.MULTILINE)
    assert {int(bits): method for bits, method in rows} == AUTO


@pytest.mark.parametrize("name", [*OF_METHODS, "choosing.md"])
def test_figures_are_those_of_the_results(name: str) -> None:
    """Whoever measures again changes RESULTS.md, and is told here which pages said otherwise."""
    known = set(_FIGURE.findall(RESULTS.read_text(encoding="utf-8")))
    parts = TEXTS[name].split("\n## ")
    if name in OF_METHODS:
        parts = [part for part in parts if part.startswith(("What it costs", "When not"))]
    figures = [figure for part in parts for figure in _FIGURE.findall(_NO_FIGURE.sub("", part))]
    assert not [figure for figure in figures if figure not in known]


# --- pages are found, and lead on ---


def settings() -> dict[str, Any]:
    """mkdocs.yml without what only mkdocs can build."""
    text = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(re.sub(r"!!python/\S+", "", text)))


def listed(nav: Any) -> Iterator[str]:
    for entry in nav:
        for target in entry.values() if isinstance(entry, dict) else [entry]:
            if isinstance(target, str):
                yield target
            else:
                yield from listed(target)


def test_the_nav_lists_every_page_once() -> None:
    found = sorted(listed(settings()["nav"]))
    assert found == sorted([*PAGES, "evals/RESULTS.md"])


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", TEXTS[name], flags=re.M | re.S)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (PAGES[name].parent / path).resolve() if path else PAGES[name]
        assert target.is_file(), f"{name}: {link}"
        on_site = target.is_relative_to(DOCS) or target.parent == RESULTS.parent
        assert on_site, f"{name}: {link} is not on the site"
        if anchor:
            assert anchor in headings(target.read_text(encoding="utf-8")), f"{name}: {link}"


def test_pages_that_others_name_are_there() -> None:
    """In messages, docstrings, scripts, examples and README.md."""
    folders = [REPOSITORY / name for name in ("llmcomp", "scripts", "examples", "evals")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".yaml", ".j2", ".md")]
    for path in (*files, REPOSITORY / "README.md"):
        for named in re.findall(r"(?<![\w/])docs/[\w/-]+\.md", path.read_text(encoding="utf-8")):
            assert (REPOSITORY / named).is_file(), f"{path.relative_to(REPOSITORY)} names {named}"


def test_the_api_page_has_every_public_name() -> None:
    entries = re.findall(r"^::: (\S+)$", TEXTS["api.md"], re.MULTILINE)
    assert sorted(entry.rpartition(".")[2] for entry in entries) == llmcomp.__all__
    for entry in entries:
        home, _, name = entry.rpartition(".")
        assert getattr(llmcomp, name) is getattr(sys.modules[home], name), entry


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed (pip install -e '.[docs]')")
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")}
    assert "aria-label=" in pages["gptq.html"] and "evals/RESULTS.html#" in pages["gptq.html"]
    assert all(f'id="llmcomp.{name}"' in pages["api.html"] for name in ("api.quantize", "training_api.recover"))
    for name, page in pages.items():
        assert not re.search(r"<(script|link|img)[^>]*(src|href)=.?https?:", page), f"{name} loads from a network"
