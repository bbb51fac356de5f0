"""Two network namespaces train as one process does: the launch of two hosts, on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_runs import LENGTH, tensors
from recovery_runs import Made

from llmcomp.cli.main import main
from llmcomp.report.schema import Report

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "two_hosts.py"


def hosts(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], env={**known, **environment}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_two_hosts_are_one_process(compressed: Made, text: Path, tmp_path: Path) -> None:
    """Losses are divided by the tokens of both: weights differ by the order of sums alone."""
    words = [
        "recover", str(compressed["llama 2:4"]), "--data", str(text), "--method", "full", "--sequence-length",
        str(LENGTH), "--steps", "4", "--learning-rate", "1e-3", "--samples", "24", "--no-evaluate", "--no-verify",
        "--device", "cpu",
    ]  # fmt: skip
    ended = hosts(*words, "--batch-size", "2", "-o", str(tmp_path / "two"))
    if ended.returncode == 3:
        pytest.skip(ended.stderr.strip().splitlines()[-1])
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert main([*words, "--batch-size", "4", "-o", str(tmp_path / "one")]) == 0
    one, two = (tensors(tmp_path / name) for name in ("one", "two"))
    for name, tensor in one.items():
        assert float((two[name] - tensor).norm()) < 1e-2 * float(tensor.norm()), name
    losses = [
        [entry["loss"] for entry in report.recovery.history]
        for report in map(Report.read, (tmp_path / "one", tmp_path / "two")) if report.recovery is not None
    ]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 4


def test_without_the_tools_a_sentence_says_why(tmp_path: Path) -> None:
    ended = hosts("--help", PATH=str(tmp_path))
    assert ended.returncode == 3 and ended.stdout == ""
    assert ended.stderr == "two_hosts: unshare is not installed, which makes network namespaces.\n"
