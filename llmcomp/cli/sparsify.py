"""`llmcomp sparsify`: weights set to zero."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcomp.cli import options as o
from llmcomp.cli.running import Publishing, run


def sparsify(
    model: o.Model,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--pattern",
            help="2:4, 4:8 or any N:M, which keeps N of every M consecutive weights of a row; or unstructured.",
            show_default="2:4",
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option("--sparsity", help="Share that an unstructured pattern removes.", show_default="0.5"),
    ] = None,
    allocate: Annotated[
        bool | None,
        typer.Option(
            "--allocate/--uniform",
            help="That share of all matrices together, more being removed where a pass over the source model has found "
            "that it costs less; or of each.",
            show_default="uniform",
        ),
    ] = None,
    update: Annotated[
        bool | None,
        typer.Option(
            "--update/--no-update",
            help="Let what is left aim at the source model's outputs on what the compressed blocks before it give: "
            "nearer to the source on such text; its activations go through the model, too, which takes time.",
            show_default="no update",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="sparsegpt, alps, wanda or magnitude.", show_default="sparsegpt"),
    ] = None,
    target: o.Targets = None,
    skip: o.Skip = None,
    override: o.Overrides = None,
    option: o.Options = None,
    calibration: o.Data = None,
    samples: o.Samples = None,
    sequence_length: o.SequenceLength = None,
    seed: o.Seed = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="dense: plain safetensors, zeros stored like any weight, as large as before; llmcomp: what N:M keeps "
            "and where it stands (2:4 of 16 bits: 0.56 of the bytes), with no form for unstructured weights.",
            show_default="dense",
        ),
    ] = None,
    save_recipe: o.SaveRecipe = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory.", show_default="./MODEL-METHOD-2of4")
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
    """Set weights to zero, verify the checkpoint, measure what it cost. In --format dense it is as large as before.

    Examples:

        llmcomp sparsify sample:lm

        llmcomp sparsify ./my-llama --format llmcomp

        llmcomp sparsify bert-base --pattern unstructured --sparsity 0.6 --method alps

        llmcomp sparsify ./my-llama --pattern 4:8 --skip blocks:0-1 --override "down_proj pattern=2:4"
    """
    made = o.make_recipe(
        None, "sparsify", pattern=pattern, sparsity=sparsity, allocate=allocate, update=update, method=method,
        target=target, skip=skip, override=override, option=option, calibration=calibration, samples=samples,
        sequence_length=sequence_length, seed=seed, format=format or "dense",
    )  # fmt: skip
    run(
        model, made, json, save_recipe, activation_memory, Publishing(push_to_hub, private), output=output,
        overwrite=overwrite, evaluate=evaluate, verify=verify, device=device, eval_data=eval_data,
        text_column=text_column, label_column=label_column, trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle, revision=revision,
    )  # fmt: skip
