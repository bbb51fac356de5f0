"""Flags of verbs that train."""

from __future__ import annotations

from typing import Annotated

import typer

TEACHER, TRAINING = "A teacher", "Training"
_COLUMNS = "of --data and --eval-data"

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="What to train on: a .txt, .jsonl, .csv or .parquet file, a Hub dataset name[:config[:split]], or "
        "'default', the text that a calibration takes; of an image classifier a folder or a table of images.",
        show_default=False,
    ),
]
Samples = Annotated[int | None, typer.Option(help="Samples of the data.", show_default="all")]
SequenceLength = Annotated[int, typer.Option("--sequence-length", help="Tokens of a sample.")]
Temperature = Annotated[float, typer.Option(help="Of the teacher's logits.", rich_help_panel=TEACHER)]
Epochs = Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=TRAINING)]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps, instead of passes.", rich_help_panel=TRAINING)]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Samples of a forward.", rich_help_panel=TRAINING)]
Accumulate = Annotated[int, typer.Option(help="Forwards of a step.", rich_help_panel=TRAINING)]
Seed = Annotated[int, typer.Option(min=0, help="Order, dropout, fresh weights.", rich_help_panel=TRAINING)]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Forwards and gradients in bf16.", rich_help_panel=TRAINING)]
EvaluateEvery = Annotated[
    int | None,
    typer.Option(
        "--evaluate-every", help="Steps between losses on a held-out part.", show_default="never",
        rich_help_panel=TRAINING,
    ),
]  # fmt: skip
Patience = Annotated[
    int | None,
    typer.Option(
        help="Losses that may be no better before training ends; the best weights are taken.",
        show_default="trained to the end", rich_help_panel=TRAINING,
    ),
]  # fmt: skip
SaveEvery = Annotated[
    int | None,
    typer.Option(
        "--save-every", help="Steps between what a killed run resumes from.", show_default="a tenth of all",
        rich_help_panel=TRAINING,
    ),
]  # fmt: skip
GroupByLength = Annotated[
    bool,
    typer.Option(
        "--group-by-length", help="Rows of like length in a batch, which then holds little padding.",
        rich_help_panel=TRAINING,
    ),
]  # fmt: skip
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing", help="Compute blocks again on the way back instead of holding what they computed.",
        rich_help_panel=TRAINING,
    ),
]  # fmt: skip
PowerSgd = Annotated[
    int | None,
    typer.Option(
        "--powersgd", help="Rank of what processes exchange instead of gradients.", show_default="gradients",
        rich_help_panel=TRAINING,
    ),
]  # fmt: skip
Track = Annotated[
    str | None,
    typer.Option(
        "--track", help="tensorboard (in runs/ beside the output) or wandb.", show_default="neither",
        rich_help_panel=TRAINING,
    ),
]  # fmt: skip
TextColumn = Annotated[str | None, typer.Option("--text-column", help=f"Column with the text, {_COLUMNS}.")]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        "--label-column",
        help=f"Column with the label of a row, {_COLUMNS}; rows of --data without one learn from a teacher alone.",
    ),
]
