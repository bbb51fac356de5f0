"""What mkdocs does here beyond its own: files from outside of docs/ that pages link to, and equations.

* A page links to `../evals/RESULTS.md` as it lies in the repository, so the link works where the repository is read. On
  the site that file is `evals/RESULTS.md`, beside the pages, and the link is rewritten.
* A fence ```math holds LaTeX, which GitHub shows as an equation. Here it becomes MathML when the site is built:
  browsers draw that by themselves, without a script or a network.
"""

import posixpath
import re
from html import escape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parent.parent
# Files of the repository that are pages or pictures of the site, by their paths there.
BESIDE = ("evals/RESULTS.md", "evals/equal_bytes.png")
_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)]*)?(\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": equation}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
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
    """LaTeX as MathML, its source as the text for readers that show none."""
    latex = source.strip()
    drawn = convert(latex, display="block").replace("<math ", f'<math alttext="{escape(latex)}" ', 1)
    return f'<div class="{css_class}">{drawn}</div>'
