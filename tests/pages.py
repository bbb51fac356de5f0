"""Pages of Markdown as the tests read them: their blocks of code, what is said of each, and how they are run.

A block of code stands directly below one of two marks:

    <!-- run -->                             the tests run it, in order with the page's others and in one directory
    *Not run by the tests: it needs a GPU.*  they do not; readers see why

```text and ```math are shown, not run. A ```yaml or ```json block with `title="NAME"` becomes the file of that name.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import yaml
from markdown_it import MarkdownIt

from llmcomp.cli.main import main

REPOSITORY = Path(__file__).resolve().parent.parent
RUN = "<!-- run -->"
CODE, SHOWN = ("bash", "python", "yaml", "json"), ("text", "math")
_REASON = re.compile(r"^\*Not run by the tests: (.+)\.\*$", re.DOTALL)
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: of the fence, counted from 1.
        language: '' where the fence names none, 'indented' where there is no fence.
        run: whether it is marked to be run; reason: why it is not, as readers see it.
        title: the file that it is.
    """

    line: int
    language: str
    text: str
    run: bool
    reason: str | None
    title: str | None


def blocks(page: str) -> list[Block]:
    """All of a page, wherever they stand."""
    tokens = MarkdownIt().enable("table").parse(page)
    found = []
    for number, token in enumerate(tokens):
        if token.type not in ("fence", "code_block"):
            continue
        language = token.info.split()[0] if token.info else ("" if token.type == "fence" else "indented")
        before = tokens[number - 1] if number else None
        run = before is not None and before.type == "html_block" and before.content.strip() == RUN
        words = tokens[number - 2] if number > 1 and before is not None and before.type == "paragraph_close" else None
        reason = _REASON.match(words.content) if words is not None else None
        title = _TITLE.search(token.info)
        line = (token.map or [0])[0] + 1
        reason_text, title_text = reason and reason[1], title and title[1]
        found.append(Block(line, language, token.content, run, reason_text, title_text))
    return found


def headings(page: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site name them."""
    tokens = MarkdownIt().parse(page)
    titles = [tokens[number + 1] for number, token in enumerate(tokens) if token.type == "heading_open"]
    words = ["".join(child.content for child in title.children or []) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in words}


def run(page: str, name: str, where: Path) -> None:
    """Run what is marked, in `where`, which is the working directory, too.

    Raises:
        AssertionError: a command that fails, or one that nobody here knows how to run.
    """
    names: dict[str, object] = {}
    for block in blocks(page):
        if not block.run:
            continue
        place = f"{name}:{block.line}"
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, name, "exec"), names)
        elif block.language == "bash":
            for command in shell_lines(block.text):
                assert _status(command) == 0, f"{place}: {' '.join(command)}"
        elif block.language in ("yaml", "json"):
            assert (yaml.safe_load if block.language == "yaml" else json.loads)(block.text), place
            if block.title is not None:
                (where / block.title).write_text(block.text, encoding="utf-8")
        else:
            raise AssertionError(f"{place}: {block.language or 'a block without a language'} cannot be run.")


def shell_lines(text: str) -> Iterator[list[str]]:
    """Words of every command; a line that ends in a backslash goes on, a comment is none."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def _status(command: list[str]) -> int:
    """The exit status of a command, in this process."""
    if command[0] == "llmcomp":
        return main(command[1:])
    if command[:2] == ["accelerate", "launch"] and command[2].startswith("scripts/"):
        return int(module_at(command[2]).main(command[3:]))
    raise AssertionError(f"The tests cannot run {' '.join(command)}; mark its block as not run.")


def module_at(path: str) -> ModuleType:
    """The module in a file of the repository that no package holds."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
