"""The page's three plots: error by layer, size by part, bytes by block. Each is one <svg> as a string."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from llmcomp.report import summary, words
from llmcomp.report.schema import LayerReport, Report
from llmcomp.report.svg import VARIABLES, colour, svg

# Makes of (name, title, description, height, draw, tooltips) what is shown: `svg.svg`, or `png.png`.
Writer = Callable[..., Any]


def errors(report: Report, write: Writer = svg) -> str | None:
    """Relative error of every layer over its block, log scale, by role; None where nothing has an error."""
    layers = [layer for layer in report.layers if layer.error is not None and layer.error > 0]
    if not layers:
        return None
    roles = [role.role for role in summary.roles(report)]
    titles: dict[str, list[str]] = {}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_yscale("log")
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        columns = _places(report)
        for number, role in enumerate(roles):
            # Roles stand side by side within a block, or their marks would hide each other.
            shift = (number - (len(roles) - 1) / 2) * 0.16
            mine = [layer for layer in layers if layer.role == role]
            _middles(axes, mine, role, shift)
            _marks(axes, mine, columns, role, shift, titles)
        _block_axis(axes, report)
        axes.set_ylabel("share of the output lost")
        _plain_log(axes, [layer.error or 1.0 for layer in layers])

    largest = words.error(max(layer.error or 0.0 for layer in layers))
    described = f"{len(layers)} layers; the largest error is {largest}"
    drawn: str | None = write("errors", "Error of each layer by block, log scale", described, 3.5, draw, titles)
    return drawn


def _middles(axes: Any, layers: Sequence[LayerReport], role: str, shift: float) -> None:
    """A line through the middle of each block: the geometric mean, as the axis is logarithmic."""
    logs: dict[int, list[float]] = {}
    for layer in layers:
        if layer.block is not None and layer.error:
            logs.setdefault(layer.block, []).append(math.log(layer.error))
    blocks = sorted(logs)
    means = [math.exp(sum(logs[block]) / len(logs[block])) for block in blocks]
    axes.plot([block + shift for block in blocks], means, color=colour(role), linewidth=1.6, alpha=0.5)


def _marks(
    axes: Any,
    layers: Sequence[LayerReport],
    columns: dict[str, int],
    role: str,
    shift: float,
    titles: dict[str, list[str]],
) -> None:
    """A dot for each layer, and a ring around those that fell back."""
    back = [layer for layer in layers if layer.fallback]
    ring = {
        "markersize": 10,
        "markerfacecolor": "none",
        "markeredgecolor": VARIABLES["warn"],
        "markeredgewidth": 1.6,
    }
    dot = {"markersize": 4.6, "color": colour(role), "markeredgewidth": 0, "alpha": 0.9}
    for kind, some, style in (("layers", layers, dot), ("fallbacks", back, ring)):
        gid = f"{kind}-{role}"
        x = [columns[layer.name] + shift for layer in some]
        axes.plot(x, [layer.error for layer in some], "o", gid=gid, **style)
        titles[gid] = [
            f"{layer.name}: {words.error(layer.error)}, {layer.fallback or layer.scheme}" for layer in some
        ]


def sizes(report: Report, write: Writer = svg) -> str | None:
    """Bytes on disk before and after, stacked by part; None unless both are known with their parts."""
    before, after = summary.sizes(report)
    if before is None or after is None or not before.parts or not after.parts:
        return None
    total = max(before.bytes_on_disk, after.bytes_on_disk, 1)
    parts = summary.ordered({**before.parts, **after.parts})
    titles: dict[str, list[str]] = {}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, (when, one) in enumerate((("before", before), ("after", after))):
            start = 0
            for part in parts:
                count = one.parts.get(part, 0)
                if count <= 0:
                    continue
                gid = f"size-{when}-{part}"
                axes.barh(row, count, left=start, height=0.62, color=colour(part), linewidth=0)
                axes.patches[-1].set_gid(gid)
                titles[gid] = [f"{when}, {part}: {words.size(count)}"]
                if count > total * 0.09:
                    text = axes.text(start + count / 2, row, words.size(count), va="center_baseline")
                    text.set(ha="center", color=VARIABLES["card"])
                start += count
            label = words.size(one.bytes_on_disk)
            axes.text(start + total * 0.008, row, label, va="center_baseline", weight="bold")
        axes.set_yticks([0, 1], ["before", "after"])
        axes.set_ylim(1.4, -0.4)
        axes.set_xlim(0, total * 1.09)
        axes.set_xticks([])
        axes.spines[["bottom", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)

    described = f"{words.size(before.bytes_on_disk)} before, {words.size(after.bytes_on_disk)} after"
    drawn: str | None = write("sizes", "Bytes on disk before and after, by part", described, 1.35, draw, titles)
    return drawn


def places(report: Report, write: Writer = svg) -> str | None:
    """Where the bytes are in the written model: one column per block, a ghost for what it was before."""
    if not any(layer.block is not None for layer in report.layers):
        return None
    columns = _columns(report)
    scale, unit = _unit(max(sum(before.values()) for before, _ in columns.values()))
    outside = {x: name for name, x in _outside(report).items()}
    titles: dict[str, list[str]] = {}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        for x, (before, after) in sorted(columns.items()):
            label = outside.get(x, f"block {x}")
            bars = [("was", sum(before.values()), 0, VARIABLES["ghost"], f"{label}, before")]
            start = 0
            for part, count in after.items():
                bars.append((f"is-{part}", count, start, colour(part), f"{label}, {part}"))
                start += count
            for kind, count, bottom, fill, text in bars:
                axes.bar(x, count / scale, bottom=bottom / scale, width=0.78, color=fill, linewidth=0)
                axes.patches[-1].set_gid(f"{kind}-{x}")
                titles[f"{kind}-{x}"] = [f"{text}: {words.size(count)}"]
        axes.set_ylabel(unit)
        _block_axis(axes, report)

    total = sum(sum(after.values()) for _, after in columns.values())
    described = f"{len(columns)} columns, {words.size(total)} in all"
    drawn: str | None = write("places", "Where the bytes are: by block, after and before", described, 3.0, draw, titles)
    return drawn


def place_parts(report: Report) -> list[str]:
    """What the colours of `places` stand for, in order; 'left' are modules in blocks that were left alone."""
    found = {part for _, after in _columns(report).values() for part in after}
    return [*summary.ordered(found - {"left"}), *(["left"] if "left" in found else [])]


def _columns(report: Report) -> dict[int, tuple[dict[str, int], dict[str, int]]]:
    """Bytes before and after, each by part, of every block and of the columns outside of them."""
    found: dict[int, tuple[dict[str, int], dict[str, int]]] = {}
    where, outside = _places(report), _outside(report)
    for layer in report.layers:
        before, after = found.setdefault(where[layer.name], ({}, {}))
        before[layer.role] = before.get(layer.role, 0) + layer.bytes_before
        after[layer.role] = after.get(layer.role, 0) + layer.bytes_after
    known = {layer.name for layer in report.layers}
    for item in report.left:
        if item.name not in known and where[item.name] not in outside.values():
            for side in found.setdefault(where[item.name], ({}, {})):
                side["left"] = side.get("left", 0) + item.bytes
    for name, x in outside.items():
        if x not in found:
            parts = [one.parts.get(name, 0) if one else 0 for one in summary.sizes(report)]
            if any(parts):
                found[x] = ({name: parts[0]}, {name: parts[1]})
    return found


def _places(report: Report) -> dict[str, int]:
    """Column of every layer and left module: its block, else that of embeddings or head."""
    outside = _outside(report)
    found = {}
    for layer in report.layers:
        known = "embeddings" if layer.role == "embeddings" else "head"
        found[layer.name] = outside[known] if layer.block is None else layer.block
    lists = {one.name.split(f".{one.block}.")[0] for one in report.layers if one.block is not None}
    inside = re.compile(rf"(?:{'|'.join(map(re.escape, lists))})\.(\d+)\." if lists else r"(?!)")
    for item in report.left:
        block = inside.match(item.name)
        known = "embeddings" if "emb" in item.name else "head"
        found.setdefault(item.name, int(block[1]) if block else outside[known])
    return found


def _outside(report: Report) -> dict[str, int]:
    """Columns of what is no block, far enough from the blocks for their names to have room."""
    last = _last(report)
    gap = 1 + last // 12
    return {"embeddings": -gap, "head": last + gap}


def _last(report: Report) -> int:
    return max((layer.block for layer in report.layers if layer.block is not None), default=0)


def _block_axis(axes: Any, report: Report) -> None:
    """Numbers at some of the blocks; names at the columns outside of them that hold something."""
    outside, last = _outside(report), _last(report)
    step = max(1, math.ceil((last + 1) / 16))
    used = {round(x) for line in axes.lines for x in line.get_xdata()}
    used |= {round(patch.get_x() + patch.get_width() / 2) for patch in axes.patches}
    ticks = {block: str(block) for block in range(0, last + 1, step)}
    ticks.update({x: name for name, x in outside.items() if x in used})
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlim(min(ticks) - max(0.7, last / 24), max(*ticks, last) + 0.7)
    axes.set_xlabel("block")
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)


def _plain_log(axes: Any, values: list[float]) -> None:
    """Ticks at 1, 2, 5 × powers of ten within the values, written as decimals."""
    low, high = min(values) / 1.35, max(values) * 1.35
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = math.log10(high / low)
    digits = (1, 2, 5) if decades < 2.2 else (1, 3) if decades < 3.5 else (1,)
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)


def _unit(largest: float) -> tuple[float, str]:
    return next(
        ((scale, unit) for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if largest >= scale),
        (1.0, "B"),
    )
