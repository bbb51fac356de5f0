"""Command lines as texts print them: found in help texts and in the README, parsed as the app would."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import typer.main

from llmcomp.cli.main import app


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of every line that starts with 'llmcomp '; a line that ends in a backslash goes on."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().startswith("llmcomp "):
            yield shlex.split(line.strip(), comments=True)[1:]


def verbs() -> dict[str, Any]:
    """{name: typer's command}."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def parse(arguments: list[str]) -> dict[str, Any]:
    """The verb's parameters, without running it.

    Raises:
        typer's UsageError: an option that does not exist, or a value that cannot be.
    """
    verb, *rest = arguments
    context = verbs()[verb].make_context(verb, list(rest))
    return dict(context.params)
