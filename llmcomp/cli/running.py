"""What every verb that compresses does with its recipe: run it, listen, show the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llmcomp.recipe import Recipe

if TYPE_CHECKING:
    from llmcomp.run_options import CompressResult


def run(
    model: str, recipe: Recipe, json: bool, save_recipe: Path | None, activation_memory: int, **settings: Any
) -> None:
    """Compress `model` and print the table, or the report as JSON.

    Args:
        save_recipe: where the recipe is written first, if anywhere.
        activation_memory: MB. settings: the other fields of `RunOptions`.

    Raises:
        UserError, RunError: as `llmcomp.compress`.
    """
    from llmcomp.api import compress
    from llmcomp.cli.progress import listener
    from llmcomp.ranks import launched
    from llmcomp.run_options import RunOptions

    if save_recipe is not None and launched().first:
        _save(save_recipe, recipe.to_yaml())
    with listener(json) as progress:
        options = RunOptions(activation_memory=activation_memory * 2**20, **settings)
        result = compress(model, recipe, options=options, progress=progress)
    show(result, json)


def show(result: CompressResult, json: bool) -> None:
    """Print the table, or the report as JSON."""
    if json:
        typer.echo(result.report.to_json(), nl=False)
        return
    from rich.console import Console

    from llmcomp.report.html import FILE_NAME
    from llmcomp.report.table import table

    Console().print(table(result.report, page=str(result.output / FILE_NAME)))


def _save(path: Path, text: str) -> None:
    from llmcomp.errors import UserError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"The recipe cannot be written to {path} ({error}); give another path.") from error
