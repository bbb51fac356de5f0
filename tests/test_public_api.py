"""The surface: public names, their docstrings and types, help texts whose examples parse, files of one idea."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import typer
from command_line import commands, parse, verbs

import llmcomp
from llmcomp.errors import LlmcompError

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = sorted((REPOSITORY / "llmcomp").rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def test_names_are_sorted_and_found() -> None:
    assert llmcomp.__all__ == sorted(llmcomp.__all__)
    assert dir(llmcomp) == llmcomp.__all__
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = llmcomp.quantise


@pytest.mark.parametrize("name", llmcomp.__all__)
def test_public_names_are_documented_and_typed(name: str) -> None:
    found = getattr(llmcomp, name)
    assert inspect.getdoc(found), f"{name} has no docstring"
    if inspect.isclass(found) and issubclass(found, LlmcompError):
        return
    signature = inspect.signature(found)
    bare = [p.name for p in signature.parameters.values() if p.annotation is inspect.Parameter.empty]
    assert not bare, f"{name}: not annotated: {bare}"
    if inspect.isfunction(found):
        assert signature.return_annotation is not inspect.Signature.empty
        assert "Raises:" in inspect.getdoc(found), f"{name} does not say what it raises"


def test_error_classes_say_what_they_mean() -> None:
    kinds: list[type[LlmcompError]] = [LlmcompError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert {kind.exit_code for kind in kinds[1:]} == {1, 2}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_file_is_one_idea(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert not text.strip() or ast.get_docstring(tree), "no head docstring"
    assert text.count("\n") <= LONGEST_FILE
    long = {node.name: length for node in ast.walk(tree) if (length := _length(node)) > LONGEST_FUNCTION}
    assert not long, f"longer than {LONGEST_FUNCTION} lines: {long}"


def _length(node: ast.AST) -> int:
    """Lines of a function's body: what follows signature and docstring (a verb's signature is its options)."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return 0
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("name", sorted(verbs()))
def test_examples_of_a_verb_parse(name: str) -> None:
    verb = verbs()[name]
    examples = list(commands(verb.help or ""))
    assert examples, f"llmcomp {name} --help shows no example"
    for example in examples:
        assert example[0] == name
        parse(example)


def test_a_wrong_example_would_not_parse() -> None:
    with pytest.raises(Exception, match="No such option") as wrong:
        parse(["quantize", "sample:lm", "--bitz", "4"])
    assert type(wrong.value).__name__ == "NoSuchOption" and not isinstance(wrong.value, typer.Exit)


@pytest.mark.parametrize("name", sorted(verbs()))
def test_every_option_has_a_help_text(name: str) -> None:
    silent = [p.name for p in verbs()[name].params if p.name != "help" and not getattr(p, "help", None)]
    assert not silent


def test_version_is_the_same_everywhere() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert version and f"## {version[1]}" in changes
