"""What every verb that compresses does with its recipe: run it, listen, show the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llmcomp.ranks import launched
from llmcomp.recipe import Recipe

if TYPE_CHECKING:
    from llmcomp.run_options import CompressResult


@dataclass(frozen=True)
class Publishing:
    """Where the result goes once it is done: 'user/name' on the Hub, or nowhere."""

    repo: str | None = None
    private: bool = False

    def check(self, verify: bool) -> None:
        """Refuse before any work what could not be published after it.

        Raises:
            UserError, RunError: not verified, or as `llmcomp.publishing.ready`.
        """
        from llmcomp.errors import UserError

        if self.private and self.repo is None:
            raise UserError("--private says how to publish; say where, too, by --push-to-hub user/name.")
        if self.repo is None or not launched().first:
            return
        if not verify:
            raise UserError("--push-to-hub publishes only what was verified; leave out --no-verify.")
        from llmcomp.publishing import ready

        ready(self.repo, self.private)

    def publish(self, output: Path, json: bool) -> None:
        """Push a finished checkpoint; whatever happens, it stays.

        Raises:
            UserError, RunError: as `llmcomp.push`.
        """
        if self.repo is None or not launched().first:
            return
        from llmcomp.cli.progress import listener
        from llmcomp.publishing import push

        with listener(json) as progress:
            result = push(output, self.repo, private=self.private, progress=progress)
        typer.echo(f"Published: {result.url}", err=True)


def run(
    model: str, recipe: Recipe, json: bool, save_recipe: Path | None, activation_memory: int,
    publishing: Publishing = Publishing(), **settings: Any
) -> None:  # fmt: skip
    """Compress `model` and print the table, or the report as JSON.

    Args:
        save_recipe: where the recipe is written first, if anywhere.
        activation_memory: MB. publishing: what follows. settings: the other fields of `RunOptions`.

    Raises:
        UserError, RunError: as `llmcomp.compress`.
    """
    from llmcomp.api import compress
    from llmcomp.cli.progress import listener
    from llmcomp.run_options import RunOptions

    publishing.check(settings.get("verify", True))
    if save_recipe is not None and launched().first:
        _save(save_recipe, recipe.to_yaml())
    with listener(json) as progress:
        options = RunOptions(activation_memory=activation_memory * 2**20, **settings)
        result = compress(model, recipe, options=options, progress=progress)
    show(result, json)
    publishing.publish(result.output, json)


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
