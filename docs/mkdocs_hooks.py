"""What mkdocs does here beyond its own: files from outside of docs/ that pages link to, and equations.

* A page links to `../evals/RESULTS.md` as it lies in the repository, so the link works where the repository is read. On
  the site that file is `evals/RESULTS.md`, beside the pages, and the link is rewritten.
* A fence ```math holds LaTeX, which GitHub shows as an equation. Here matplotlib, which llmcomp needs anyway, draws it
  when the site is built: an outline in the color of the text, without a script, a font or a network.
"""

from __future__ import annotations

import posixpath
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parent.parent
# Files of the repository that are pages or pictures of the site, by their paths there.
BESIDE = ("evals/RESULTS.md", "evals/equal_bytes.png")
_SIZE = 19  # of a letter, in the units of a page
_COMMANDS = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}
_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)]*)?(\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": equation}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for path in BESIDE:
        files.append(File.generated(config, path, abs_src_path=str(REPOSITORY / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that leave docs/ lead to where the site has the file."""
    if page.file.src_uri in BESIDE:
        return markdown
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def rewritten(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        if target not in BESIDE:
            return link[0]
        path = posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
        return f"{link[1]}{path}{link[3] or ''}{link[4]}"

    return _LINK.sub(rewritten, markdown)


def equation(source: str, language: str, css_class: str, options: Any, md: Any, **rest: Any) -> str:
    """LaTeX, as far as matplotlib knows it, as a drawing that says its source to readers who see none.

    Raises:
        ValueError: matplotlib does not know a command in it.
    """
    latex = " ".join(source.split())
    with rc_context({"mathtext.fontset": "stix"}):
        drawn = TextPath((0, 0), f"${latex}$", size=_SIZE)
    box = drawn.get_extents()
    left, top, width, height = box.x0 - 1, -box.y1 - 1, box.width + 2, box.height + 2
    lines = "".join(
        "Z" if code == Outline.CLOSEPOLY
        else _COMMANDS[code] + " ".join(f"{x:.2f} {-y:.2f}" for x, y in points.reshape(-1, 2))
        for points, code in drawn.iter_segments(curves=True, simplify=False)
    )
    view = f'viewBox="{left:.2f} {top:.2f} {width:.2f} {height:.2f}" width="{width:.0f}" height="{height:.0f}"'
    label = f'role="img" aria-label="{escape(latex)}"'
    return f'<div class="{css_class}"><svg {view} {label}><path d="{lines}"/></svg></div>'
