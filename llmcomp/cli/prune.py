"""`llmcomp prune`: a smaller model of the same kind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcomp.cli import options as o
from llmcomp.cli.running import Publishing, run


def prune(
    model: o.Model,
    heads: Annotated[
        float | None,
        typer.Option("--heads", help="Share of the attention heads that go, in groups that share keys and values."),
    ] = None,
    mlp: Annotated[float | None, typer.Option("--mlp", help="Share of the MLPs' neurons that go.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="How many blocks go.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="activation: what costs least of what calibration reads, made up for by what stays; taylor: what "
            "changes the loss least (of a classifier by the labels of --calibration), made up for, too; or magnitude.",
            show_default="activation",
        ),
    ] = None,
    option: o.Options = None,
    calibration: o.Data = None,
    samples: o.Samples = None,
    sequence_length: o.SequenceLength = None,
    seed: o.Seed = None,
    save_recipe: o.SaveRecipe = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory.", show_default="./MODEL-pruned-mlp-0.3")
    ] = None,
    overwrite: o.Overwrite = False,
    evaluate: o.Evaluate = True,
    verify: o.Verify = True,
    device: o.Device = "auto",
    eval_data: o.EvalData = None,
    text_column: o.TextColumn = None,
    label_column: o.LabelColumn = None,
    activation_memory: o.ActivationMemory = 8,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    allow_pickle: o.AllowPickle = False,
    push_to_hub: o.PushToHub = None,
    private: o.Private = False,
    json: o.Json = False,
) -> None:
    """Take heads, neurons and blocks out of a model, verify the checkpoint, measure what it cost.

    What comes out is an ordinary, smaller model: any software that opens the original opens it.

    Examples:

        llmcomp prune sample:lm --mlp 0.25

        llmcomp prune ./my-llama --heads 0.25 --mlp 0.3 --layers 4

        llmcomp prune bert-base --mlp 0.5 --method magnitude
    """
    made = o.make_recipe(
        None, "prune", heads=heads, mlp=mlp, layers=layers, method=method, option=option, calibration=calibration,
        samples=samples, sequence_length=sequence_length, seed=seed, format="dense",
    )  # fmt: skip
    run(
        model, made, json, save_recipe, activation_memory, Publishing(push_to_hub, private), output=output,
        overwrite=overwrite, evaluate=evaluate, verify=verify, device=device, eval_data=eval_data,
        text_column=text_column, label_column=label_column, trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle, revision=revision,
    )  # fmt: skip
