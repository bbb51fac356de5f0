"""`llmcomp push`: a finished checkpoint to the Hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from llmcomp.cli import options as o


def push(
    directory: Annotated[Path, typer.Argument(help="A directory that llmcomp wrote.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="user/name, made where it is missing.", show_default=False)],
    private: o.Private = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, made where it is missing.", show_default="main")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="As a pull request, which somebody merges.")] = False,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Of the commit.", show_default="what was compressed")
    ] = None,
    json: o.Json = False,
) -> None:
    """Publish a verified checkpoint on the Hub, with tokenizer, recipe, report and model card; broken off, it resumes.

    Examples:

        llmcomp push tinyllama-gptq-w4 me/tinyllama-gptq-w4

        llmcomp push tinyllama-gptq-w4 my-team/tinyllama --private --revision w4
    """
    from llmcomp.cli.progress import listener
    from llmcomp.publishing import push as publish

    with listener(json) as progress:
        result = publish(
            directory, repo, private=private, revision=revision, create_pr=create_pr, message=message, progress=progress
        )
    if json:
        from json import dumps

        typer.echo(dumps(dataclasses.asdict(result)))
        return
    typer.echo(f"{result.url} ({result.files} files, {len(result.sent)} of them sent)")
