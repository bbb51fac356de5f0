"""Where a run stands, on stderr: a live bar on a terminal, one plain line per block or phase elsewhere.

Linears are told one by one and shown block by block: `block 3/22  attention 0.0123  mlp 0.0234  2.1 s`, where
each figure is the mean error of a role and blocks count from 1.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.text import Text

from llmcomp.progress import Progress
from llmcomp.report import words
from llmcomp.report.schema import LayerReport

# A layer that loses less than a hundredth of its output rarely shows in perplexity; five hundredths often do.
_FINE, _DOUBTFUL = 0.01, 0.05


@contextlib.contextmanager
def listener(json: bool = False, stream: TextIO | None = None) -> Iterator[Progress]:
    """Something to hand to library code as its `progress`.

    Args:
        json: the output is read by a program: plain lines, even on a terminal.
        stream: where to, stderr by default; never stdout.
    """
    stream = sys.stderr if stream is None else stream
    lively = stream.isatty() and not json and os.environ.get("TERM") != "dumb"
    shown: _Lines = _Live(stream) if lively else _Lines(stream)
    try:
        yield shown
    finally:
        shown.close()


class _Lines:
    """Plain text, a line at a time, flushed so that a log can be followed."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.total: int | None = None
        self.pending: list[LayerReport] = []
        self.since = time.monotonic()

    def phase(self, name: str, total: int | None = None) -> None:
        self._block_done()
        self.total, self.since = total, time.monotonic()
        self._phase(name)

    def step(self, done: int = 1) -> None:
        self._block_done()

    def layer(self, layer: LayerReport) -> None:
        if self.pending and self.pending[-1].block != layer.block:
            self._block_done()
        self.pending.append(layer)

    def note(self, text: str) -> None:
        self._say(Text(f"note: {text}"))

    def close(self) -> None:
        self._block_done()

    def _phase(self, name: str) -> None:
        self._say(Text(name))

    def _block_done(self) -> None:
        if self.pending:
            now = time.monotonic()
            self._say(block_line(self.pending, self.total, now - self.since))
            self.pending, self.since = [], now

    def _say(self, text: Text) -> None:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(text.plain.encode(encoding, "replace").decode(encoding) + "\n")
        self.stream.flush()


class _Count(MofNCompleteColumn):
    """3/22, and nothing where the number of steps is not known."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total is not None else Text()


class _Left(TimeRemainingColumn):
    """Time left, once it can be told."""

    def render(self, task: Task) -> Text:
        known = task.total is not None and task.time_remaining is not None
        return super().render(task).append(" left") if known else Text()


class _Live(_Lines):
    """The same lines in colour, above a bar of the present phase with the time that is left."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            _Count(),
            TimeElapsedColumn(),
            _Left(),
            TextColumn("{task.fields[last]}"),
            console=Console(file=stream, force_terminal=True),
            transient=True,
        )
        self.task: TaskID | None = None
        self.started = 0.0
        self.bar.start()

    def _phase(self, name: str) -> None:
        self._finish()
        self.started = time.monotonic()
        self.task = self.bar.add_task(name, total=self.total, last="")

    def step(self, done: int = 1) -> None:
        super().step(done)
        if self.task is not None:
            self.bar.update(self.task, advance=done)

    def layer(self, layer: LayerReport) -> None:
        super().layer(layer)
        if self.task is not None:
            last = f"{layer.name.rsplit('.', 1)[-1]} {words.error(layer.error)}"
            self.bar.update(self.task, last=Text(last, colour(layer.error)).markup)

    def note(self, text: str) -> None:
        self._say(Text.assemble(("note: ", "cyan"), text))

    def close(self) -> None:
        super().close()
        self._finish()
        self.bar.stop()

    def _finish(self) -> None:
        """Take the bar of the phase away and leave a line in its place."""
        if self.task is not None:
            name = self.bar.tasks[-1].description
            self.bar.remove_task(self.task)
            self.task = None
            self._say(Text.assemble(("• ", "dim"), (name, "bold"), f"  {words.seconds(self._age())}"))

    def _age(self) -> float:
        return time.monotonic() - self.started

    def _say(self, text: Text) -> None:
        self.bar.console.print(text, soft_wrap=True, highlight=False)


def block_line(layers: list[LayerReport], total: int | None, elapsed: float) -> Text:
    """One line for linears that were compressed together: those of one block, or one outside of the blocks.

    Args:
        total: blocks in all, where known.
        elapsed: seconds.
    """
    block = layers[0].block
    if block is None:
        where = "outside the blocks"
    elif total is not None and block < total:
        where = f"block {block + 1:>{len(str(total))}}/{total}"
    else:
        where = f"block {block + 1}"
    line = Text.assemble((where, "dim"))
    for role in dict.fromkeys(layer.role for layer in layers):
        errors = [layer.error for layer in layers if layer.role == role and layer.error is not None]
        mean = sum(errors) / len(errors) if errors else None
        line.append(f"  {role} ").append(words.error(mean), colour(mean))
    back = sum(layer.fallback is not None for layer in layers)
    if back:
        line.append(f"  {back} fell back", "yellow")
    return line.append(f"  {words.seconds(elapsed)}", "dim")


def colour(error: float | None) -> str:
    """Of a layer's error in a terminal."""
    if error is None:
        return ""
    return "green" if error < _FINE else "yellow" if error < _DOUBTFUL else "red"
