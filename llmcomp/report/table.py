"""The terminal's view of a report, made for 80 columns and better with more; nothing depends on colour.

Where the terminal cannot show Unicode, rich draws its boxes in ASCII and `_Ascii` does the same for the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from llmcomp.report import schema, summary, words
from llmcomp.report.schema import LayerReport, Report
from llmcomp.report.summary import Row
from llmcomp.report.trained import pruning_lines

COLOURS = {"better": "green", "worse": "yellow", "same": ""}
ROLE_COLOURS = {"attention": "blue", "mlp": "magenta", "embeddings": "cyan", "head": "green"}
_LEVELS = "▁▂▃▄▅▆▇█"
_TO_ASCII = str.maketrans("→×–—−…·✓✗²' " + _LEVELS, ">x---..+x2' " + "12345678")


def table(report: Report, page: str | None = None, worst: int = 10) -> RenderableType:
    """The whole report.

    Args:
        page: where its HTML page lies, None where there is none.
        worst: how many of the layers of largest error to list.
    """
    return _View(report, page, worst)


class _View:
    """Laid out when drawn, since only then the width and the encoding are known."""

    def __init__(self, report: Report, page: str | None, worst: int) -> None:
        self.report, self.page, self.worst = report, page, worst

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(Group(*self._parts(options.max_width)), options):
            if options.ascii_only and not segment.is_control:
                text = segment.text.translate(_TO_ASCII).encode("ascii", "replace").decode("ascii")
                yield Segment(text, segment.style)
            else:
                yield segment

    def _parts(self, width: int) -> list[RenderableType]:
        report = self.report
        parts = [
            _headline(report),
            _comparison(report),
            _recovery(report),
            _lines("How it was trained", pruning_lines(report)),
            _roles(report, wide=width >= 100),
            _worst(report, self.worst),
            _groups("Fell back", summary.fallbacks(report), "yellow"),
            _groups("Left alone", summary.left(report), ""),
            _verification(report),
            _lines("What it is good for", report.labels),
            _lines("Notes", [*_warnings(report), *report.notes]),
            _footer(report, self.page),
        ]
        return [part for part in parts if part is not None]


def _headline(report: Report) -> RenderableType:
    title = Text.assemble((report.model, "bold"))
    if report.output and report.output != report.model:
        title.append("  →  ").append(report.output, "bold cyan")
    before, after = summary.sizes(report)
    line = Text()
    if before and after:
        change = words.ratio(before.bytes_on_disk, after.bytes_on_disk)
        line.append(f"{words.size(before.bytes_on_disk)} → {words.size(after.bytes_on_disk)}")
        line.append(f"   {change}", "bold green" if "smaller" in change else "bold")
    elif after or before:
        line.append(words.size((after or before).bytes_on_disk))  # type: ignore[union-attr]
    cost = _main_change(report)
    if cost is not None:
        known = f"{cost.before} → {cost.after}" if cost.change else cost.after
        line.append("   ").append(f"{cost.label} {known}")
        line.append(f" ({cost.change})" if cost.change else "", COLOURS[cost.verdict])
    what = " · ".join(part for part in (report.architecture, report.task, report.format) if part)
    body = Group(title, *([line] if line else []), Text(what, "dim"))
    title_line = f"llmcomp {report.command}"
    return Panel(body, title=title_line, title_align="left", border_style="cyan", padding=(0, 1))


def _main_change(report: Report) -> Row | None:
    """The first quality metric that was measured on both sides; of sentence encoders without scores the overlap."""
    rows = summary.quality_rows(report)
    overlap = (row for row in rows if row.label == "overlap at 10")
    return next((row for row in rows if row.change), next(overlap, None))


def _comparison(report: Report) -> RenderableType | None:
    rows = summary.comparison(report)
    if not rows:
        return None
    grid = _grid("", "before", "after", "change", justify=("left", "right", "right", "left"))
    for row in rows:
        grid.add_row(
            row.label,
            _cell(row.before, row.before_interval),
            _cell(row.after, row.after_interval),
            Text(row.change, COLOURS[row.verdict]),
        )
    title = "What it cost" if report.recovery is None else "Compressed and recovered"
    return _section(title, Group(grid, Text(_measured_on(report), "dim")))


def _recovery(report: Report) -> RenderableType | None:
    found = report.recovery
    if found is None:
        return None
    lines: list[RenderableType] = [Text(line, "dim") for line in summary.recovery_lines(report)]
    if rows := summary.recovery_rows(report):
        grid = _grid("", "original", "compressed", "recovered", "won back", justify=("left", *["right"] * 4))
        for row in rows:
            grid.add_row(row.label, _cell(*row.original), _cell(*row.compressed), _cell(*row.recovered), row.won_back)
        lines.insert(0, grid)
    return _section("What was won back", Group(*lines))


def _measured_on(report: Report) -> str:
    measured = [side.quality for side in (report.after, report.before) if side and side.quality]
    if not measured:
        return "Quality was not measured; llmcomp evaluate does it."
    one = measured[0]
    amount = f"{one.samples:,} windows, {one.tokens:,} tokens" if one.tokens else f"{one.samples:,} rows"
    return f"Measured on {one.data}: {amount}. [low, high]: 95% bootstrap."


def _cell(value: str, interval: str) -> Text:
    text = Text(value, "dim" if value == words.ABSENT else "")
    return text.append(f"\n{interval}", "dim") if interval else text


def _roles(report: Report, wide: bool) -> RenderableType | None:
    rows = summary.roles(report)
    if not rows:
        return None
    titles = ["role", "layers", "scheme", "mean error", "worst", "bytes"]
    justify = ["left", "right", "left", "right", "right", "left"]
    if wide:
        titles, justify = [*titles, "error by block"], [*justify, "left"]
    grid = _grid(*titles, justify=justify)
    for row in rows:
        colour = ROLE_COLOURS.get(row.role, "")
        cells: list[RenderableType] = [
            Text(row.role, colour),
            str(row.layers),
            row.schemes,
            words.error(row.error_mean),
            words.error(row.error_worst),
            f"{words.size(row.bytes_before)} → {words.size(row.bytes_after)}",
        ]
        if wide:
            cells.append(Text(_spark([one for one in report.layers if one.role == row.role]), colour))
        grid.add_row(*cells)
    return _section("By role", grid)


def _spark(layers: Sequence[LayerReport], width: int = 24) -> str:
    """The largest error of each block as a bar of eight heights on a log scale, at most `width` bars."""
    blocks: dict[int, float] = {}
    for layer in layers:
        if layer.block is not None and layer.error:
            blocks[layer.block] = max(blocks.get(layer.block, 0.0), layer.error)
    if len(blocks) < 2:
        return ""
    values = [math.log(blocks[index]) for index in sorted(blocks)]
    step = math.ceil(len(values) / width)
    values = [max(values[start : start + step]) for start in range(0, len(values), step)]
    low, high = min(values), max(values)
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(_LEVELS[round((value - low) * scale)] for value in values)


def _worst(report: Report, count: int) -> RenderableType | None:
    layers = summary.worst(report, count)
    if not layers:
        return None
    grid = _grid("layer", "scheme", "method", "error", justify=("left", "left", "left", "right"))
    grid.columns[0].overflow = "fold"
    for layer in layers:
        style = "yellow" if layer.fallback else ""
        name = Text(layer.name, ROLE_COLOURS.get(layer.role, ""))
        grid.add_row(name, layer.scheme, Text(layer.method, style), Text(words.error(layer.error), style))
    total = len(report.layers)
    shown = f"{len(layers)} worst of {total} layers" if len(layers) < total else "Layers"
    return _section(f"{shown}, by share of their output lost", grid)


def _groups(title: str, groups: Sequence[summary.Group], style: str) -> RenderableType | None:
    if not groups:
        return None
    lines = []
    for group in groups:
        many = f"{len(group.names)} modules" if len(group.names) > 1 else "1 module"
        lines.append(Text(f"{group.reason} ({many}, {words.size(group.bytes)})", style))
        names = words.collapse(group.names)
        more = f", and {len(names) - 6} more" if len(names) > 6 else ""
        lines.append(Text("  " + ", ".join(names[:6]) + more, "dim"))
    return _section(title, Group(*lines))


def _verification(report: Report) -> RenderableType | None:
    found = report.verification
    if found is None:
        return None if report.command == "evaluate" else _section("Verified", Text("not verified", "yellow"))
    sign, style = ("✓", "green") if found.passed else ("✗", "red")
    lines = [Text.assemble((f"{sign} ", style), check) for check in found.checks]
    how = "block by block, as the model does not fit" if found.streamed else "in a fresh process"
    apart = found.max_logit_difference
    largest = "" if apart is None else f"; largest logit difference {words.number(apart)}"
    state = "Verified" if found.passed else "Verification FAILED"
    modules = f"{found.modules_compressed} compressed modules"
    return _section(f"{state}: reloaded {how}, {modules}{largest}", Group(*lines))


def _lines(title: str, lines: Sequence[str]) -> RenderableType | None:
    if not lines:
        return None
    grid = Table.grid(padding=(0, 1))
    for line in lines:
        grid.add_row("·", Text(line))
    return _section(title, grid)


def _warnings(report: Report) -> list[str]:
    return [str(line) for line in report.calibration.get("warnings") or []]


def _footer(report: Report, page: str | None) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    if report.phases:
        total = words.seconds(sum(report.phases.values()))
        spent = [f"{name} {words.seconds(value).replace(' ', '')}" for name, value in report.phases.items()]
        grid.add_row("time", f"{total} ({', '.join(spent)})")
    if report.peak_memory is not None:
        what = "compress" if report.recovery is None and report.pruning is None else "train"
        grid.add_row("peak memory", f"{words.size(report.peak_memory)} to {what} and save")
    if report.resumed_blocks:
        grid.add_row("resumed", f"{report.resumed_blocks} blocks were done by an earlier run")
    if report.output:
        grid.add_row("model", Text(report.output))
        grid.add_row("report", Text(f"{report.output.rstrip('/')}/{schema.FILE_NAME}"))
    if page:
        grid.add_row("page", Text(page))
    return Group(Text(""), Padding(grid, (0, 0, 0, 1), expand=False))


def _grid(*titles: str, justify: Sequence[str]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), header_style="dim")
    for title, side in zip(titles, justify, strict=True):
        grid.add_column(title, justify=side, overflow="fold")  # type: ignore[arg-type]
    return grid


def _section(title: str, body: RenderableType) -> RenderableType:
    indented = Padding(body, (0, 0, 0, 3), expand=False)
    return Group(Text(""), Text(f" {title}", "bold"), indented)
