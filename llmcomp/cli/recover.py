"""`llmcomp recover`: what was compressed, trained in the form that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcomp.cli import options as o
from llmcomp.cli import training as t
from llmcomp.cli.running import Publishing, show

_LORA = "LoRA"


def recover(
    directory: Annotated[str, typer.Argument(help="A checkpoint that llmcomp has written.", show_default=False)],
    data: t.Data = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="lora: two thin factors beside each compressed linear, merged into it where it is floating; full: "
            "all weights, for those that are floating; qat: all weights, integers as what is rounded to their grid.",
        ),
    ] = "lora",
    learn_scales: Annotated[bool, typer.Option("--learn-scales", help="Of qat: train scales, too.")] = False,
    samples: t.Samples = None,
    sequence_length: t.SequenceLength = 256,
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
        typer.Option(help="Learn from this model's logits, too, such as the original.", rich_help_panel=t.TEACHER),
    ] = None,
    temperature: t.Temperature = 2.0,
    soft_weight: Annotated[
        float, typer.Option("--soft-weight", help="Share of the teacher in the loss.", rich_help_panel=t.TEACHER)
    ] = 0.5,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", help="The highest.", show_default="2e-4, full 5e-5, qat 1e-4", rich_help_panel=t.TRAINING
        ),
    ] = None,
    epochs: t.Epochs = 1.0,
    steps: t.Steps = None,
    batch_size: t.BatchSize = 8,
    accumulate: t.Accumulate = 1,
    seed: t.Seed = 0,
    bf16: t.Bf16 = False,
    evaluate_every: t.EvaluateEvery = None,
    patience: t.Patience = None,
    save_every: t.SaveEvery = None,
    group_by_length: t.GroupByLength = False,
    gradient_checkpointing: t.GradientCheckpointing = False,
    powersgd: t.PowerSgd = None,
    track: t.Track = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory.", show_default="./DIRECTORY-recovered")
    ] = None,
    overwrite: o.Overwrite = False,
    evaluate: o.Evaluate = True,
    verify: o.Verify = True,
    device: o.Device = "auto",
    eval_data: o.EvalData = None,
    text_column: t.TextColumn = None,
    label_column: t.LabelColumn = None,
    push_to_hub: o.PushToHub = None,
    private: o.Private = False,
    json: o.Json = False,
) -> None:  # fmt: skip
    """Train what was compressed, in the form that it has; verify the checkpoint, measure what was won back.

    Examples:

        llmcomp recover sample-lm-sparsegpt-2of4 --data default --method full

        llmcomp recover my-model-gptq-w2 --data text.txt --teacher ./my-model --epochs 2

        llmcomp recover my-model-gptq-w2 --data text.txt --method qat --teacher ./my-model

        llmcomp recover classifier-2of4 --data train.jsonl --eval-data test.jsonl --label-column label
    """
    from llmcomp.errors import BadData

    if data is None:
        raise BadData("llmcomp recover needs something to train on; give --data a file, a Hub dataset or 'default'.")
    publishing = Publishing(push_to_hub, private)
    publishing.check(verify)
    from llmcomp.cli.progress import listener
    from llmcomp.run_options import RunOptions
    from llmcomp.training.settings import Lora, Optimization, Teaching
    from llmcomp.training_api import recover

    with listener(json) as progress:
        result = recover(
            directory, data, method=method, learn_scales=learn_scales, samples=samples, sequence_length=sequence_length,
            lora=Lora(rank, alpha, dropout, tuple(target or ())),
            teaching=Teaching(teacher, temperature, soft_weight),
            optimization=Optimization(
                learning_rate, epochs, steps, batch_size, accumulate, seed, bf16, evaluate_every, patience, save_every,
                group_by_length=group_by_length, gradient_checkpointing=gradient_checkpointing, powersgd=powersgd,
                track=track,
            ),
            options=RunOptions(
                output=output, overwrite=overwrite, evaluate=evaluate, verify=verify, device=device,
                eval_data=eval_data, text_column=text_column, label_column=label_column,
            ),
            progress=progress,
        )  # fmt: skip
    show(result, json)
    publishing.publish(result.output, json)
