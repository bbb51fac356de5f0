"""Trainings that end in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from llmcomp.errors import RunError
from llmcomp.training import trainer


@contextmanager
def stopped(after: int) -> Iterator[None]:
    """What is trained within fails at the end of the step that is counted so, over all trainings."""
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
            yield
