"""`llmcomp recover`: what was compressed, trained in the form that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcomp.cli import options as o
from llmcomp.cli.running import Publishing, show

_TEACHER, _LORA, _TRAINING = "A teacher", "LoRA", "Training"
_Columns = "of --data and --eval-data"


def recover(
    directory: Annotated[str, typer.Argument(help="A checkpoint that llmcomp has written.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="What to train on: a .txt, .jsonl, .csv or .parquet file, a Hub dataset name[:config[:split]], or "
            "'default', the text that a calibration takes.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="lora: two thin factors beside each compressed linear, merged into it where it is floating; full: "
            "all weights, for those that are floating.",
        ),
    ] = "lora",
    samples: Annotated[int | None, typer.Option(help="Samples of the data.", show_default="all")] = None,
    sequence_length: Annotated[int, typer.Option("--sequence-length", help="Tokens of a sample.")] = 256,
    rank: Annotated[int, typer.Option(help="Of the factors.", rich_help_panel=_LORA)] = 16,
    alpha: Annotated[
        float | None,
        typer.Option(help="They count alpha / rank.", show_default="twice the rank", rich_help_panel=_LORA),
    ] = None,
    dropout: Annotated[float, typer.Option(help="On what the factors read.", rich_help_panel=_LORA)] = 0.0,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help="Which linears get factors: a role (attention, mlp, head) or a module's last name; may be repeated.",
            show_default="all that were compressed",
            rich_help_panel=_LORA,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Learn from this model's logits, too, such as the original.", rich_help_panel=_TEACHER),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the teacher's logits.", rich_help_panel=_TEACHER)] = 2.0,
    soft_weight: Annotated[
        float, typer.Option("--soft-weight", help="Share of the teacher in the loss.", rich_help_panel=_TEACHER)
    ] = 0.5,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", help="The highest.", show_default="2e-4, full 5e-5", rich_help_panel=_TRAINING
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=_TRAINING)] = 1.0,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps, instead of passes.", rich_help_panel=_TRAINING)
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Samples of a forward.", rich_help_panel=_TRAINING)
    ] = 8,
    accumulate: Annotated[int, typer.Option(help="Forwards of a step.", rich_help_panel=_TRAINING)] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Order, dropout, factors.", rich_help_panel=_TRAINING)] = 0,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Forwards and gradients in bf16.", rich_help_panel=_TRAINING)
    ] = False,
    evaluate_every: Annotated[
        int | None,
        typer.Option(
            "--evaluate-every", help="Steps between losses on a held-out part.", show_default="never",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Losses that may be no better before training ends; the best weights are taken.",
            show_default="trained to the end", rich_help_panel=_TRAINING,
        ),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(
            "--save-every", help="Steps between what a killed run resumes from.", show_default="a tenth of all",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory.", show_default="./DIRECTORY-recovered")
    ] = None,
    overwrite: o.Overwrite = False,
    evaluate: o.Evaluate = True,
    verify: o.Verify = True,
    device: o.Device = "auto",
    eval_data: o.EvalData = None,
    text_column: Annotated[
        str | None, typer.Option("--text-column", help=f"Column with the text, {_Columns}.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option("--label-column", help=f"Column with the label of a row, {_Columns}.")
    ] = None,
    push_to_hub: o.PushToHub = None,
    private: o.Private = False,
    json: o.Json = False,
) -> None:  # fmt: skip
    """Train what was compressed, in the form that it has; verify the checkpoint, measure what was won back.

    Examples:

        llmcomp recover sample-lm-sparsegpt-2of4 --data default --method full

        llmcomp recover my-model-gptq-w2 --data text.txt --teacher ./my-model --epochs 2

        llmcomp recover classifier-2of4 --data train.jsonl --eval-data test.jsonl --label-column label
    """
    from llmcomp.errors import BadData

    if data is None:
        raise BadData("llmcomp recover needs something to train on; give --data a file, a Hub dataset or 'default'.")
    publishing = Publishing(push_to_hub, private)
    publishing.check(verify)
    from llmcomp.api import recover
    from llmcomp.cli.progress import listener
    from llmcomp.run_options import RunOptions
    from llmcomp.training.settings import Lora, Optimization, Teaching

    with listener(json) as progress:
        result = recover(
            directory, data, method=method, samples=samples, sequence_length=sequence_length,
            lora=Lora(rank, alpha, dropout, tuple(target or ())),
            teaching=Teaching(teacher, temperature, soft_weight),
            optimization=Optimization(
                learning_rate, epochs, steps, batch_size, accumulate, seed, bf16, evaluate_every, patience, save_every
            ),
            options=RunOptions(
                output=output, overwrite=overwrite, evaluate=evaluate, verify=verify, device=device,
                eval_data=eval_data, text_column=text_column, label_column=label_column,
            ),
            progress=progress,
        )  # fmt: skip
    show(result, json)
    publishing.publish(result.output, json)
