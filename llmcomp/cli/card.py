"""`llmcomp card`: the model card of a checkpoint, as `llmcomp push` would write it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def card(
    directory: Annotated[Path, typer.Argument(help="A directory that llmcomp wrote.", show_default=False)],
    repo: Annotated[
        str | None,
        typer.Option("--repo", help="Under which name the card loads it: user/name.", show_default="the directory"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="A directory that gets README.md and its plots; DIRECTORY itself, to edit the card "
            "before a push.", show_default="stdout",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Show the model card: what it was made of and how, what that cost, how to load it.

    Examples:

        llmcomp card tinyllama-gptq-w4

        llmcomp card tinyllama-gptq-w4 --repo me/tinyllama-w4 --output tinyllama-gptq-w4
    """
    from llmcomp.formats.save import writing
    from llmcomp.publishing import card_of

    made = card_of(directory, repo or str(directory))
    if output is None:
        typer.echo(made.text, nl=False)
        return
    with writing(output / "README.md"):
        for name, image in made.images.items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_bytes(image)
        (output / "README.md").write_text(made.text, encoding="utf-8")
