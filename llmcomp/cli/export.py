"""`llmcomp export`: a checkpoint in another format, without the model it was made of."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from llmcomp.cli import options as o


def export(
    directory: o.Checkpoint,
    output: Annotated[Path, typer.Argument(help="The directory to make.", show_default=False)],
    format: Annotated[
        str,
        typer.Option("--format", help="compressed-tensors, dense, llmcomp, gguf, onnx, openvino.", show_default=False),
    ],
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Write a checkpoint in another format, from its own integers.

    Examples:

        llmcomp export tinyllama-gptq-w4 tinyllama-packed --format llmcomp

        llmcomp export tinyllama-gptq-w4 tinyllama-dense --format dense
    """
    from llmcomp.cli.progress import listener

    with listener(json) as progress:
        from llmcomp import api

        result = api.export(directory, output, format, overwrite=overwrite, progress=progress)
    if json:
        typer.echo(json_module.dumps({"output": str(result.output), "notes": result.notes}, indent=1))
        return
    for note in result.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(result.output)
