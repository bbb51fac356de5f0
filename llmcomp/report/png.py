"""The page's plots as PNG files, for places that show no inline SVG, such as a model card.

They are drawn by the same functions, whose stand-in colours (`llmcomp.report.svg`) become those of a light page.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from llmcomp.report import plots
from llmcomp.report.schema import Report
from llmcomp.report.svg import SETTINGS, VARIABLES, WIDTH

_LIGHT = {
    "attention": "#2f6fde", "mlp": "#d9822b", "embeddings": "#2e9e6b", "head": "#9a54c7", "other": "#8a8f98",
    "left": "#c5c9d0", "ink": "#1c1f24", "muted": "#5b626d", "line": "#d7dbe1", "warn": "#c23b3b", "card": "#ffffff",
    "ghost": "#e6e9ee",
}  # fmt: skip
_OF_STAND_IN = {VARIABLES[name]: colour for name, colour in _LIGHT.items()}
_COLOURS = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")


def drawings(report: Report) -> dict[str, tuple[str, bytes]]:
    """{name of a plot: (what it shows, PNG)}, of those for which the report has something."""
    found = {}
    for name, draw in (("sizes", plots.sizes), ("errors", plots.errors), ("places", plots.places)):
        drawn: Any = draw(report, png)
        if drawn is not None:
            found[name] = drawn
    return found


def png(
    name: str, title: str, description: str, height: float, draw: Callable[[Figure], None], titles: dict[str, list[str]]
) -> tuple[str, bytes]:
    """What `llmcomp.report.svg.svg` takes; the title and the image."""
    settings = {key: value for key, value in SETTINGS.items() if not key.startswith("svg.")}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        draw(figure)
        for artist in figure.findobj():
            _recolour(artist)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    return f"{title}: {description}", image.getvalue()


def _recolour(artist: Any) -> None:
    for kind in _COLOURS:
        read, write = getattr(artist, f"get_{kind}", None), getattr(artist, f"set_{kind}", None)
        if read is None or write is None:
            continue
        try:
            now = to_hex(read())
        except ValueError:  # 'none', or the colours of a collection of several
            continue
        if now in _OF_STAND_IN:
            write(_OF_STAND_IN[now])
