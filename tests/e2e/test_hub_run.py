"""`llmcomp quantize bert-base` by real processes: from a Hub on loopback, from the cache, and with neither."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_runs import hashes
from hub_server import HubServer, hub_environment
from tiny import tiny

from llmcomp.report.schema import Report

BERT = "google-bert/bert-base-uncased"
QUICK = ["--samples", "8", "--sequence-length", "32", "--no-evaluate", "--json"]
# The command, and on its last line of stderr which heavy packages it has imported.
WATCHED = """
import sys
from llmcomp.cli.main import main
status = main(sys.argv[1:])
heavy = {"torch", "transformers", "datasets", "numpy", "matplotlib"} & set(sys.modules)
print("imported:", *sorted(heavy), file=sys.stderr)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    root = tmp_path_factory.mktemp("repositories")
    tiny("bert", root / BERT, tokenizer=True)
    with HubServer(root) as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def llmcomp(
    environment: dict[str, str], *arguments: str, script: str | None = None
) -> subprocess.CompletedProcess[str]:
    start = ["-m", "llmcomp"] if script is None else ["-c", script]
    return subprocess.run(
        [sys.executable, *start, *arguments], env={**environment, "OMP_NUM_THREADS": "1"}, text=True,
        capture_output=True, stdin=subprocess.DEVNULL, timeout=240, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip


@pytest.fixture(scope="module")
def first(
    hub: HubServer, home: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Report, str]:
    """The run that downloads, with its verification; its report and stderr."""
    output = tmp_path_factory.mktemp("first") / "q"
    command = ["quantize", "bert-base", "--calibration", str(text), "-o", str(output), *QUICK]
    done = llmcomp(hub.environment(home), *command)
    assert done.returncode == 0, done.stderr
    return Report.from_json(done.stdout), done.stderr


def test_from_the_hub(first: tuple[Report, str], hub: HubServer) -> None:
    report, said = first
    assert report.model == "bert-base" and report.source == BERT
    assert report.architecture == "BertForMaskedLM" and len(report.layers) == 12
    assert report.verification is not None and report.verification.passed
    assert "Downloading bert-base (google-bert/bert-base-uncased)" in said
    asked = [request for request in hub.requests if request.startswith("GET /api/models")]
    assert f"GET /api/models/{BERT}/revision/main" in asked


def test_its_output_is_json_and_plain_lines(first: tuple[Report, str]) -> None:
    """stdout was parsed as one object by the fixture; stderr has neither colours nor bars when piped."""
    report, said = first
    assert "\x1b" not in said and "\r" not in said and "%|" not in said
    assert "Traceback" not in said and "Warning" not in said
    assert [line for line in said.splitlines() if line.startswith("block 2/2")]
    written = (Path(report.output) / "llmcomp_report.json").read_text(encoding="utf-8")
    assert Report.from_json(written) == report


def test_again_offline_from_the_cache(
    first: tuple[Report, str], hub: HubServer, home: Path, text: Path, tmp_path: Path
) -> None:
    asked = len(hub.requests)
    environment = {**hub.environment(home), "HF_HUB_OFFLINE": "1"}
    command = ["quantize", "bert-base", "--calibration", str(text), "-o", str(tmp_path / "q"), "--no-verify"]
    done = llmcomp(environment, *command, *QUICK)
    assert done.returncode == 0, done.stderr
    assert len(hub.requests) == asked, "offline, yet it asked"
    assert "comes from the cache" in done.stderr
    assert hashes(tmp_path / "q") == hashes(Path(first[0].output))


def test_neither_cached_nor_reachable(tmp_path: Path) -> None:
    """One sentence, no torch, and quick; the two seconds are for a machine of one's own, so here it is ten."""
    environment = hub_environment("http://127.0.0.1:1", tmp_path / "home")
    command = ["quantize", "bert-base", "-o", str(tmp_path / "q")]
    began = time.monotonic()
    done = llmcomp(environment, *command, script=WATCHED)
    seconds = time.monotonic() - began
    sentence, imported = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert sentence.startswith(f"llmcomp: bert-base ({BERT}) is neither cached (in ")
    assert "nor reachable" in sentence and "what works offline: sample:lm, " in sentence
    assert imported == "imported:"
    assert not any(path.name.endswith((".partial", "q")) for path in tmp_path.iterdir())
    assert seconds < 10


def test_not_cached_and_offline(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = llmcomp(environment, "quantize", "bert-base", "--json", script=WATCHED)
    sentence, imported = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert "HF_HUB_OFFLINE is set" in sentence and imported == "imported:"


def test_the_repository_is_gone(hub: HubServer, home: Path) -> None:
    done = llmcomp(hub.environment(home), "quantize", "google-bert/no-such", "--json", script=WATCHED)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 2 and "google-bert/no-such" in done.stderr
