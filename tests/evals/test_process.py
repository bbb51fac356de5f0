"""The runner and its memory monitor, against a process whose memory is known."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evals.common import Memory
from evals.process import RunFailed, Sample, descendants, environment, machine, run, summarize, versions

MB = 1_000_000
PYTHON = Path(sys.executable)


def test_anonymous_memory_is_measured_and_mapped_pages_are_not():
    measured = run(PYTHON, "tests.evals.allocate", ["own"], threads=1)
    # 150 MB held; the 64 MB written as bytes() before are freed by then, the 64 MB mapped are a file's.
    assert measured.peak_anonymous == pytest.approx(150 * MB, rel=0.02)
    assert measured.peak_mapped > 64 * MB
    assert 0.5 < measured.seconds < measured.process_seconds
    # The kernel's own maximum agrees with the largest sample: nothing was missed.
    assert measured.missed < 2 * MB


def test_children_count():
    measured = run(PYTHON, "tests.evals.allocate", ["child"], threads=1)
    assert 150 * MB < measured.peak_anonymous < 170 * MB  # and the child's interpreter


def test_a_process_that_has_ended_has_no_descendants():
    with subprocess.Popen([str(PYTHON), "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in descendants(os.getpid())
        child.communicate(b"\n")
    assert child.pid not in descendants(os.getpid())
    assert descendants(child.pid) == []


def test_a_failing_tool_is_reported_with_its_words():
    with pytest.raises(RunFailed, match=r"(?s)status 3.*the disk is on fire"):
        run(PYTHON, "tests.evals.allocate", ["fail"], threads=1)


def row(stage: str, at: float, anonymous: int) -> dict:
    return {"stage": stage, "time": at, "anonymous": anonymous, "mapped": 1, "resident": 0, "high_water": 900}


def test_only_samples_between_the_marks_count():
    def sample(at: float, anonymous: int, resident: int) -> Sample:
        return Sample(at, Memory(anonymous, 5, resident, 0), anonymous, 5)

    rows = [row("IMPORTED", 10.0, 100), row("LOADED", 11.0, 150), row("DONE", 20.0, 120)]
    samples = [sample(9.0, 5_000, 850), sample(12.0, 400, 700), sample(21.0, 6_000, 5_000)]
    measured = summarize(rows, samples, 13.0)
    assert measured.peak_anonymous == 300
    assert measured.seconds == 10.0
    assert measured.peak_mapped == 5
    assert measured.missed == 50  # before IMPORTED counts here, as it does in the kernel's maximum
    assert measured.stages == {"LOADED": 1.0, "DONE": 10.0}


def test_environment_sets_every_pool_and_no_network():
    found = environment(threads=3)
    assert found["OMP_NUM_THREADS"] == found["MKL_NUM_THREADS"] == found["GPTQMODEL_CPU_WORKERS"] == "3"
    assert environment(threads=1)["GPTQMODEL_CPU_WORKERS"] == "2"
    assert found["HF_HUB_OFFLINE"] == "1"


def test_machine_and_versions_are_recorded():
    assert machine(2)["threads"] == 2
    assert machine(2)["cpu"]
    assert versions(PYTHON, ["torch", "no-such-package-here"]).keys() == {"torch"}
