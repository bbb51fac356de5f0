"""`llmcomp report`: a finished run's table and HTML page again, from the report inside its directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llmcomp.report.schema import Report


def report(
    directory: Annotated[Path, typer.Argument(help="A directory that llmcomp wrote.", show_default=False)],
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Where to write the page.", show_default="DIRECTORY/llmcomp_report.html"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    """Show what a run did and what it cost.

    Examples:

        llmcomp report tinyllama-gptq-w4

        llmcomp report tinyllama-gptq-w4 --html page.html

        llmcomp report tinyllama-gptq-w4 --json
    """
    from llmcomp.report.schema import Report

    found = Report.read(directory)
    if json:
        if html is not None:
            _write(html, found)
        typer.echo(found.to_json(), nl=False)
        return
    from rich.console import Console

    from llmcomp.report.html import FILE_NAME
    from llmcomp.report.table import table

    page = _write(html or directory / FILE_NAME, found)
    Console().print(table(found, page=str(page)))


def _write(path: Path, found: Report) -> Path:
    """Write the page of `found` to `path`, unless it is there already."""
    from llmcomp.errors import UserError
    from llmcomp.report.html import render

    text = render(found)
    try:
        # A page that is up to date stays as it is, so that a read-only directory can be reported on.
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The page {path} cannot be written ({error}); give another place by --html."
        ) from error
    return path
