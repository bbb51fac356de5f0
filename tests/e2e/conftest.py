"""What the end-to-end tests share: a text to calibrate on, few threads, and checkpoints to recover."""

from __future__ import annotations

import pydoc_data.topics
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from e2e_command import Command
from recovery_runs import Made, compressed_in, labelled_rows, recovered_of
from tiny import tiny

from llmcomp import training_run
from llmcomp.formats.verify import check


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain text file, long enough for every run here."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n\n".join(list(pydoc_data.topics.topics.values())[:6]), encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("bad") / "llama", tokenizer=True)


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def command(tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path / "out" / "q", text, capfd)


# --- recovery ---


@pytest.fixture
def quick() -> Iterator[None]:
    """Recovered checkpoints are verified in this process, and pages are not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "verify", check)
        patch.setattr(training_run, "render", lambda report: "<!doctype html>")
        yield


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recovery")


@pytest.fixture(scope="session")
def rows(root: Path) -> Path:
    return labelled_rows(root / "rows.jsonl")


@pytest.fixture(scope="session")
def compressed(root: Path, text: Path) -> Made:
    return compressed_in(root, text)


@pytest.fixture(scope="session")
def recovered(compressed: Made, root: Path, text: Path, rows: Path) -> Made:
    return recovered_of(compressed, root, text, rows)
