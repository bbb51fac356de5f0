"""`llmcomp bench`: how fast a checkpoint runs and what it takes in memory, alone or beside another one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmcomp.cli import options as o
from llmcomp.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmcomp.measure.bench import Benchmark
    from llmcomp.measure.figures import Figure, Ratio, Result

_RATES = ("tokens/s", "samples/s")
_LIST = "numbers separated by commas, or the option several times"


def bench(
    directory: o.Checkpoint,
    against: Annotated[
        str | None, typer.Option(help="Another one to compare with, round by round.", show_default="none")
    ] = None,
    threads: Annotated[
        list[str] | None, typer.Option(help=f"Each is measured by itself: {_LIST}.", show_default="all cores")
    ] = None,
    prompt_tokens: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Lengths of prompts, or of an encoder's forwards: {_LIST}.", show_default="128,512; encoders 128"
        ),
    ] = None,
    batch_size: Annotated[
        list[str] | None, typer.Option(help=f"Rows of each: {_LIST}.", show_default="1; encoders 1,32")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Written one by one after a prompt, to time decoding.")] = 32,
    compile: Annotated[
        bool, typer.Option("--compile", help="Through torch.compile, which takes minutes before it runs.")
    ] = False,
    repeats: Annotated[
        int, typer.Option(min=1, help="Rounds; each has a fresh process for each checkpoint and number of threads.")
    ] = 3,
    json: o.Json = False,
) -> None:
    """Measure decode and prefill tokens a second, time to first token, load time and memory.

    Of an encoder it measures forwards. Each figure is the median of the rounds, with the lowest and the highest; a
    ratio is that of two runs of the same round.

    Examples:

        llmcomp bench sample:lm

        llmcomp bench my-model-w4 --against my-model --threads 1,2 --repeats 5

        llmcomp bench sample:classifier --batch-size 1,32 --prompt-tokens 128 --json
    """
    from llmcomp.cli.progress import listener

    counts = _numbers(threads, "--threads")
    lengths, batches = _numbers(prompt_tokens, "--prompt-tokens"), _numbers(batch_size, "--batch-size")
    with listener(json) as progress:
        from llmcomp.hub import resolve

        path = resolve(directory, progress=progress).path
        other = None if against is None else resolve(against, progress=progress).path

        from llmcomp import api
        from llmcomp.measure.bench import Settings

        settings = Settings(counts, lengths, batches, new_tokens, compile, rounds=repeats)
        found = api.bench(path, against=other, settings=settings, progress=progress)
    if json:
        typer.echo(found.to_json(), nl=False)
        return
    from rich.console import Console

    Console().print(view(found))


def _numbers(texts: list[str] | None, flag: str) -> tuple[int, ...]:
    """['1', '2,4'] as (1, 2, 4); a number counts once.

    Raises:
        UserError: something that is no whole number above 0.
    """
    words = [word.strip() for text in texts or () for word in text.split(",")]
    for word in words:
        if not word.isdecimal() or int(word) < 1:
            raise UserError(f"{flag} {word!r} is no whole number above 0; expected such as {flag} 1,2.")
    return tuple(dict.fromkeys(map(int, words)))


def view(found: Benchmark) -> RenderableType:
    """The benchmark as a terminal shows it: a table for each number of threads."""
    from rich.console import Group
    from rich.text import Text

    from llmcomp.report import words

    versions = found.machine.versions
    where = (
        f"{found.machine.cpu} · {found.capability} · last-level cache {words.size(found.cache)} · "
        f"torch {versions['torch']} · transformers {versions['transformers']}"
    )
    rounds = "1 round" if found.rounds == 1 else f"{found.rounds} rounds"
    how = f"{'torch.compile' if found.compiled else 'eager'}, {rounds} of fresh processes"
    spread = "median [lowest, highest] of the rounds; ratio [95%]"
    parts: list[RenderableType] = [Text(where), Text(f"{how}; {spread}", "dim")]
    each = 1 if found.against is None else 2
    for start in range(0, len(found.results), each):
        parts += [Text(), _table(found.results[start : start + each])]
    return Group(*parts)


def _table(results: tuple[Result, ...]) -> RenderableType:
    """Figures of one number of threads: one checkpoint, or two and their ratio."""
    from rich import box
    from rich.table import Table

    own, *others = results
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="dim", padding=(0, 1))
    table.add_column("1 thread" if own.threads == 1 else f"{own.threads} threads")
    for result in results:
        table.add_column(Path(result.name).name, justify="right")
    if others:
        table.add_column("ratio", justify="right")
    known = {(figure.name, figure.unit): figure for result in others for figure in result.figures}
    compared = {(ratio.name, ratio.unit): ratio for ratio in own.ratios}
    for figure in own.figures:
        key = (figure.name, figure.unit)
        label = f"{figure.name}, {figure.unit}" if figure.unit in _RATES else figure.name
        row = [label, _cell(figure)]
        if others:
            row += [_cell(known.get(key)), _cell(compared.get(key))]
        table.add_row(*row)
    return table


def _cell(found: Figure | Ratio | None) -> str:
    """The median, and below it what it lies between."""
    from llmcomp.measure.figures import Ratio
    from llmcomp.report import words

    if found is None:
        return words.ABSENT
    unit = "×" if isinstance(found, Ratio) else found.unit
    median, low, high = (amount(value, unit) for value in (found.median, found.low, found.high))
    return median if low == high else f"{median}\n[{low}, {high}]"


def amount(value: float, unit: str) -> str:
    """A figure as people read it; rates without their unit, which is the row's.

    >>> amount(12.345, "tokens/s"), amount(0.0213, "s"), amount(2.2e9, "bytes"), amount(1.4e10, "bytes/s")
    ('12.35', '21.3 ms', '2.20 GB', '14.0 GB/s')
    >>> amount(0.713, "share"), amount(2.905, "×")
    ('71.3%', '2.90×')
    """
    from llmcomp.report import words

    if unit == "s":
        return words.seconds(value)
    if unit.startswith("bytes"):
        return words.size(value) + unit.removeprefix("bytes")
    if unit == "share":
        return words.percent(value)
    return words.number(value) if unit in _RATES else f"{value:.2f}{unit}"
