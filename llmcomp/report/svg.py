"""matplotlib figures as <svg> elements to be written into HTML: no file, no script, nothing from outside.

matplotlib draws with stand-in colours that then become CSS variables of the page (`var(--mlp)`), so that one
drawing follows the reader's light or dark theme. Text stays text, in the page's own font. Marks get a
<title>, which browsers show as a tooltip and screen readers read.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# stand-in colour → CSS variable; the values mean nothing but must differ
VARIABLES = {
    "attention": "#010101",
    "mlp": "#010102",
    "embeddings": "#010103",
    "head": "#010104",
    "other": "#010105",
    "left": "#010106",
    "ink": "#010107",
    "muted": "#010108",
    "line": "#010109",
    "warn": "#01010a",
    "card": "#01010b",
    "ghost": "#01010c",
}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": VARIABLES["ink"],
    "axes.edgecolor": VARIABLES["line"],
    "axes.labelcolor": VARIABLES["muted"],
    "xtick.color": VARIABLES["line"],
    "ytick.color": VARIABLES["line"],
    "xtick.labelcolor": VARIABLES["muted"],
    "ytick.labelcolor": VARIABLES["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": VARIABLES["line"],
    "text.parse_math": False,
}
WIDTH = 10.4


def colour(part: str) -> str:
    """The stand-in of a part's colour; parts unknown here look like 'other'."""
    return VARIABLES.get(part, VARIABLES["other"])


def svg(
    name: str,
    title: str,
    description: str,
    height: float,
    draw: Callable[[Figure], None],
    titles: dict[str, list[str]],
) -> str:
    """Draw and return one <svg> element.

    Args:
        name: prefix of its ids; plots on one page need different ones.
        title, description: what it shows and what there is to see, for those who cannot.
        height: inches; the width is the page's.
        draw: draws on the figure and may fill `titles`.
        titles: the tooltips of the marks of each matplotlib gid, in the order they were drawn.
    """
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.patch.set_visible(False)
        FigureCanvasSVG(figure)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(text.getvalue())
    _clean(root, name)
    _entitle(root, name, titles)
    return _themed(_label(root, name, title, description))


def _clean(root: ElementTree.Element, name: str) -> None:
    """Namespaces and metadata away (HTML needs neither), ids made unique on the page."""
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's <style> would be the whole page's, once inside of HTML
            if child.tag.endswith(("metadata", "style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        for key in list(element.attrib):
            value = element.attrib.pop(key)
            key = key.split("}")[-1]
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href":
                value = f"#{name}-{value[1:]}"
            element.set(key, value.replace("url(#", f"url(#{name}-"))


def _entitle(root: ElementTree.Element, name: str, titles: dict[str, list[str]]) -> None:
    groups = {element.get("id"): element for element in root.iter("g")}
    for gid, texts in titles.items():
        group = groups.get(f"{name}-{gid}")
        if group is None:
            continue
        marks = list(group.iter("use")) or list(group.iter("path"))
        for mark, text in zip(marks, texts, strict=len(marks) == len(texts)):
            ElementTree.SubElement(mark, "title").text = text


def _label(root: ElementTree.Element, name: str, title: str, description: str) -> str:
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-{'title' if tag == 'title' else 'description'}"})
        element.text = text
        root.insert(position, element)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _themed(text: str) -> str:
    for variable, colour in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
