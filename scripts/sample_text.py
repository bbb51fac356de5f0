"""The text that the sample models learn from: documentation strings of the standard library.

Sources are parsed, not imported, so nothing opens a window or a browser; only modules that have no source
(built-in and extension modules) are imported. The language reference in `pydoc_data.topics` comes last.
`llmcomp/samples/modules.json` holds the areas, the modules held out of each, and which private module
belongs to which public one; what it does not name is training text without a label.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

MODULES = json.loads((Path(__file__).parents[1] / "llmcomp/samples/modules.json").read_text())
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "turtledemo", "site-packages", "pydoc_data", "lib-dynload"}
SKIPPED_MODULES = {"antigravity", "this", "_tkinter"}  # the first opens a browser, the last wants a display
SEPARATOR = "\n\n\n"


class Document(NamedTuple):
    module: str  # public top-level module, "json" for json.decoder
    text: str  # dedented documentation string

    @property
    def key(self) -> str:
        """The words alone, so that one text indented in two ways counts once."""
        return " ".join(self.text.split())


def from_source() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        name = parts[0].removesuffix(".py")
        if SKIPPED_FOLDERS & set(parts) or name not in sys.stdlib_module_names:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, documented)]
        for node in sorted(nodes, key=lambda n: getattr(n, "lineno", 0)):
            yield Document(name, ast.get_docstring(node) or "")


def from_extensions() -> Iterator[Document]:
    for name in sorted(sys.stdlib_module_names - SKIPPED_MODULES):
        spec = importlib.util.find_spec(name) if name != "__main__" else None
        if spec is None or spec.origin == "frozen" or (spec.origin or "").endswith(".py"):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:  # built without the library that it wraps
            continue
        for thing in [module, *vars(module).values()]:
            for part in [thing, *(vars(thing).values() if inspect.isclass(thing) else [])]:
                text = getattr(part, "__doc__", None)
                if (inspect.ismodule(part) or callable(part) or inspect.isdatadescriptor(part)) and text:
                    yield Document(name, inspect.cleandoc(text) if isinstance(text, str) else "")


def documents() -> list[Document]:
    """Every documentation string of at least 20 characters once, under its public module's name."""
    found: dict[str, Document] = {}
    reference = (Document("pydoc_data", text) for _, text in sorted(topics.items()))
    for source in (from_source(), from_extensions(), reference):
        for name, text in source:
            public = name.lstrip("_") if name.lstrip("_") in sys.stdlib_module_names else name
            document = Document(MODULES["part_of"].get(name, public), text.strip())
            if len(document.key) >= 20 and document.key.isprintable():
                previous = found.setdefault(document.key, document)
                if document.module in held_out() and previous.module not in held_out():
                    found[document.key] = document
    return list(found.values())


def held_out() -> set[str]:
    return {name for area in MODULES["areas"].values() for name in area["held_out"]}


def split(found: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held out), without training texts that repeat a held-out line of 40 characters or more."""
    found = list(found)
    validation = [d for d in found if d.module in held_out()]
    lines = set().union(*(long_lines(d.text) for d in validation))
    return [d for d in found if d.module not in held_out() and not long_lines(d.text) & lines], validation


def long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 40}


def every_fourth_run(found: Iterable[Document], characters: int = 4000) -> list[Document]:
    """A quarter of the text, in runs of neighbours, so that it reads as the whole does."""
    kept, position = [], 0
    for document in found:
        if position // characters % 4 == 0:
            kept.append(document)
        position += len(document.text)
    return kept


def labelled(found: Iterable[Document]) -> list[dict[str, str | int]]:
    """Rows {"text", "label", "module"} of the documents of 80 characters or more whose module has an area."""
    label = {m: i for i, a in enumerate(MODULES["areas"].values()) for m in a["training"] + a["held_out"]}
    return [
        {"text": d.text, "label": label[d.module], "module": d.module}
        for d in found
        if d.module in label and len(d.key) >= 80
    ]
