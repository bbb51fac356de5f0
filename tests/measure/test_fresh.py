"""A process of its own: what it prints is taken, what it dies of becomes one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmcomp.errors import RunError, UserError
from llmcomp.measure import fresh

KILLED = "ended by SIGKILL, as a process is that takes more memory than there is"


def python(folder: Path, *lines: str) -> Path:
    """Something that is called like an interpreter."""
    script = folder / "python"
    script.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    script.chmod(0o755)
    return script


def test_the_last_line_is_the_answer(tmp_path: Path) -> None:
    say = 'echo "noise"; echo "{\\"arguments\\": \\"$*\\", \\"threads\\": \\"$OMP_NUM_THREADS\\"}"'
    found = fresh.ask("some.module", ["a b"], "Asking", python=python(tmp_path, say), environment=fresh.pools(3))
    assert found == {"arguments": "-m some.module a b", "threads": "3"}


def test_it_is_offline_and_finds_this_package(tmp_path: Path) -> None:
    say = 'echo "[\\"$HF_HUB_OFFLINE\\", \\"$PYTHONPATH\\"]"'
    offline, path = fresh.ask("m", [], "Asking", python=python(tmp_path, say))
    assert offline == "1" and (Path(path.split(":")[0]) / "llmcomp" / "measure" / "fresh.py").is_file()


@pytest.mark.parametrize(
    ("lines", "kind", "sentence"),
    [
        (["echo 'No such model.' >&2", "exit 2"], UserError, "No such model."),
        (["echo first >&2", "echo 'OSError: gone' >&2", "exit 1"], RunError, "Asking failed: OSError: gone"),
        (["exit 3"], RunError, "Asking failed: exit status 3"),
        (["kill -9 $$"], RunError, f"Asking failed: {KILLED}"),
        (["exit 0"], RunError, "Asking failed: the process ended without a result."),
    ],
    ids=["a user's mistake", "an error", "silent", "out of memory", "nothing said"],
)
def test_failures_are_one_sentence(lines: list[str], kind: type[Exception], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(kind) as failed:
        fresh.ask("m", [], "Asking", python=python(tmp_path, *lines))
    assert str(failed.value) == sentence and type(failed.value) is kind


def test_every_pool_gets_the_threads() -> None:
    assert set(fresh.pools(2).values()) == {"2"}
    assert {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} <= set(fresh.pools(2))
    json.dumps(fresh.pools(2))
