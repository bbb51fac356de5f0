"""`llmcomp evaluate`: what a checkpoint is like, alone or beside the one it was made from."""

from __future__ import annotations

from typing import Annotated

import typer

from llmcomp.cli import options as o

_COST = "What to measure"


def evaluate(
    directory: o.Checkpoint,
    against: Annotated[
        str | None,
        typer.Option(
            help="The model it was made from.", show_default="what DIRECTORY's report names, if it is there"
        ),
    ] = None,
    eval_data: o.EvalData = None,
    text_column: o.TextColumn = None,
    label_column: o.LabelColumn = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.", rich_help_panel=o.QUALITY)] = 64,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of a window.", rich_help_panel=o.QUALITY)] = 512,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a table.", rich_help_panel=o.QUALITY)] = 2000,
    seed: Annotated[
        int, typer.Option(min=0, help="Which windows, masks and resamples.", rich_help_panel=o.QUALITY)
    ] = 0,
    cost: Annotated[bool, typer.Option(help="Latency and peak memory.", rich_help_panel=_COST)] = True,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            metavar="TASKS",
            help="Also these tasks of lm-eval: names or YAML files, separated by commas.",
            rich_help_panel=_COST,
        ),
    ] = None,
    json: o.Json = False,
) -> None:
    """Measure quality, divergence from the original, size, latency and memory.

    Examples:

        llmcomp evaluate bert-base-gptq-w4

        llmcomp evaluate my-model-w4 --against my-model --eval-data held-out.txt

        llmcomp evaluate classifier-w4 --eval-data reviews.jsonl --text-column text --label-column stars
    """
    from llmcomp.cli.progress import listener
    from llmcomp.hub import resolve

    with listener(json) as progress:
        path = resolve(directory, progress=progress).path

        from llmcomp import api
        from llmcomp.measure.inputs import default_against, evaluation_data
        from llmcomp.measure.load import task_of
        from llmcomp.measure.run import Settings

        data = None
        if eval_data is not None:
            data = evaluation_data(
                task_of(path), eval_data, text_column=text_column, label_column=label_column, progress=progress
            )
        tasks = tuple(name.strip() for name in lm_eval.split(",")) if lm_eval else ()
        settings = Settings(windows, sequence_length, rows, seed=seed, cost=cost, lm_eval=tasks)
        found = api.evaluate(
            path, against=against or default_against(path), data=data, settings=settings, progress=progress
        )
    report = found.as_report()
    if json:
        typer.echo(report.to_json(), nl=False)
        return
    from rich.console import Console

    from llmcomp.report.table import table

    Console().print(table(report))
