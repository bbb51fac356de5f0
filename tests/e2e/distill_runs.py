"""Short distillations for the end-to-end tests, whole ones and broken ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmcomp import DistillPlan, distill, training_run
from llmcomp.errors import RunError
from llmcomp.formats.verify import check
from llmcomp.report.schema import Report
from llmcomp.training import trainer

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
    with pytest.MonkeyPatch.context() as patch:
        end, count = trainer.Watch.on_step_end, 0

        def stop(self: Any, args: Any, state: Any, control: Any, **unused: Any) -> None:
            nonlocal count
            end(self, args, state, control)
            count += 1
            if count == after:
                raise RunError("stopped by the test")

        patch.setattr(trainer.Watch, "on_step_end", stop)
        with pytest.raises(RunError, match="stopped by the test"):
            run(output, **settings)
