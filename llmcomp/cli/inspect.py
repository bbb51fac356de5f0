"""`llmcomp inspect`: what a model is made of, what would be compressed and what not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from llmcomp.cli import options as o

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from llmcomp.report.structure import Item, Structure


def inspect(
    model: Annotated[str, typer.Argument(help="A directory, Hub id, alias or sample:…", show_default=False)],
    json: o.Json = False,
) -> None:
    """Show blocks, roles, shapes and bytes, and what a plain quantize would do. Weights are not read.

    Examples:

        llmcomp inspect sample:lm

        llmcomp inspect ./my-model --json
    """
    from llmcomp.cli.progress import listener
    from llmcomp.hub import resolve

    with listener(json) as progress:
        source = resolve(model, progress=progress)
    from llmcomp.adapters.discover import discover, skeleton
    from llmcomp.checkpoint import Checkpoint, bind
    from llmcomp.report.structure import structure

    checkpoint = Checkpoint.open(source.path)
    checkpoint.require_dense()
    built = skeleton(source.path)
    binding = bind(checkpoint, built)  # before discover: it settles which ties hold
    found = structure(discover(built), binding)
    if json:
        import dataclasses
        import json as json_module

        data = {"model": model, "source": source.source, **dataclasses.asdict(found)}
        typer.echo(json_module.dumps(data, indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    Console().print(view(model, found))


def view(model: str, found: Structure) -> RenderableType:
    """The structure as a terminal shows it."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.panel import Panel
    from rich.text import Text

    from llmcomp.report import words

    dtypes = ", ".join(dict.fromkeys(item.dtype for item in found.items))
    change = words.ratio(found.bytes_before, found.bytes_after)
    compressed = sum(item.scheme is not None for item in found.items)
    facts = Text(
        f"{found.architecture} · {found.task} · {words.parameters(found.parameters)} parameters · "
        f"{words.size(found.bytes_before)} {dtypes}"
    )
    plan = Text.assemble(
        "llmcomp quantize would make it ",
        (words.size(found.bytes_after), "bold"),
        f" ({change}): {compressed} of {len(found.items) + len(found.others)} matrices compressed",
    )
    parts: list[RenderableType] = [
        Panel(Group(facts, plan), title=Text(model, "bold"), title_align="left", border_style="cyan"),
        *_blocks(found),
        Text("\n Around the blocks", "bold"),
        _around(found),
    ]
    parts += [Padding(Text(line, "yellow"), (0, 0, 0, 3)) for line in found.notes]
    return Group(*parts)


def _blocks(found: Structure) -> list[RenderableType]:
    """One table for blocks that are alike."""
    from rich.padding import Padding
    from rich.text import Text

    from llmcomp.report import words
    from llmcomp.report.structure import alike

    parts: list[RenderableType] = []
    for indices, items in alike(found):
        first = found.blocks[indices[0]]
        many = f"Blocks {words.ranges(indices)}" if len(indices) > 1 else f"Block {indices[0]}"
        before, after = (
            sum(sizes) for sizes in zip(*((i.bytes_before, i.bytes_after) for i in items), strict=True)
        )
        each = "each " if len(indices) > 1 else ""
        where = first if len(indices) == 1 else first.rpartition(".")[0]
        title = Text.assemble(
            (f"\n {many}", "bold"), f" of {where}, {each}{words.size(before)} → {words.size(after)}"
        )
        rows = [(item, item.name[len(first) + 1 :]) for item in items]
        parts += [title, Padding(_table(rows, stages=True), (0, 0, 0, 1), expand=False), _reasons(rows)]
    return parts


def _around(found: Structure) -> RenderableType:
    from rich.console import Group
    from rich.padding import Padding

    from llmcomp.report import words

    outside = [item for item in found.items if item.block is None]
    rows = [(item, item.name) for item in (*outside, *found.others)]
    table = _table(rows, stages=False)
    table.add_row("norms, biases and the rest", "", "", words.size(found.rest), "stays")
    return Group(Padding(table, (0, 0, 0, 1), expand=False), _reasons(rows))


def _reasons(rows: Sequence[tuple[Item, str]]) -> RenderableType:
    """Why some of the rows stay as they are, or become something other than the default."""
    from rich.padding import Padding
    from rich.text import Text

    names: dict[str, list[str]] = {}
    for item, name in rows:
        if item.reason:
            names.setdefault(item.reason, []).append(name)
    lines = [Text.assemble(f"{', '.join(some)}: ", (reason, "yellow")) for reason, some in names.items()]
    return Padding(Text("\n").join(lines), (0, 0, 0, 3), expand=False) if lines else Text("", end="")


def _table(rows: Sequence[tuple[Item, str]], stages: bool) -> Table:
    """Rows of (item, its name as shown); with `stages`, a rule between groups that read different inputs."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from llmcomp.report import words
    from llmcomp.report.table import ROLE_COLOURS

    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, header_style="dim", padding=(0, 1), collapse_padding=True
    )
    columns = {
        "name": "left",
        "role": "left",
        "shape": "right",
        "bytes": "right",
        "becomes": "left",
        "": "right",
    }
    for title, justify in columns.items():
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for position, (item, name) in enumerate(rows):
        last = position + 1 == len(rows) or rows[position + 1][0].stage != item.stage
        table.add_row(
            Text(name),
            Text(item.role, ROLE_COLOURS.get(item.role, "")),
            " × ".join(map(str, item.shape)),
            words.size(item.bytes_before) if item.bytes_before else "shared",
            Text(item.scheme, "green") if item.scheme else Text("stays", "dim"),
            words.size(item.bytes_after) if item.scheme else "",
            end_section=stages and last and position + 1 < len(rows),
        )
    return table
