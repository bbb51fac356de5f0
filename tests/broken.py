"""Runs that stop on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llmcomp.errors import RunError
from llmcomp.pipeline.journal import Journal


@contextmanager
def stopped_after(parts: int) -> Iterator[None]:
    """What runs inside fails after so many finished parts (the embeddings, if they are compressed, then blocks)."""
    with failing_after(parts), pytest.raises(RunError, match="stopped by the test"):
        yield


@contextmanager
def failing_after(parts: int) -> Iterator[None]:
    """The same, where something else catches the error."""
    add, finished = Journal.add, 0

    def failing(self: Journal, *arguments: object) -> None:
        nonlocal finished
        if finished == parts:
            raise RunError("stopped by the test")
        finished += 1
        add(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", failing)
        yield
