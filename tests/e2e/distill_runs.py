"""Short distillations for the end-to-end tests, whole ones and broken ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stopped import stopped

from llmcomp import DistillPlan, distill, training_run
from llmcomp.formats.verify import check
from llmcomp.report.schema import Report

PLAN = DistillPlan(
    "sample:classifier", "layers=1", samples=24, sequence_length=24, steps=6, batch_size=4, learning_rate=1e-3,
    save_every=2, evaluate=False, device="cpu",
)  # fmt: skip


@contextmanager
def quickly() -> Iterator[None]:
    """Checkpoints are verified in this process, and pages are not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "verify", check)
        patch.setattr(training_run, "render", lambda report: "<!doctype html>")
        yield


def run(output: Path, **settings: Any) -> Report:
    return distill(replace(PLAN, output=str(output), **settings)).report


def broken_run(output: Path, after: int, **settings: Any) -> None:
    """A run that ends after so many steps, those of a baseline among them."""
    with stopped(after):
        run(output, **settings)
