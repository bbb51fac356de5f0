"""`llmcomp factorize`: two thin factors in the place of matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcomp.cli import options as o
from llmcomp.cli.running import Publishing, run


def factorize(
    model: o.Model,
    ratio: Annotated[
        float | None,
        typer.Option("--ratio", help="Share of the matrices' bytes that is kept.", show_default="0.8"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Of every matrix, instead of a ratio.", show_default=False)
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="svd-llm, asvd or svd.", show_default="svd-llm")
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            "--ranks",
            help="uniform: the ratio holds for each matrix; balanced: for all of them together, and ranks go where a "
            "pass over the source model has found that they take most off the loss.",
            show_default="uniform",
        ),
    ] = None,
    update: Annotated[
        bool | None,
        typer.Option(
            "--update/--no-update",
            help="Fit a factor anew to what the compressed blocks before it give.",
            show_default="where the method is svd-llm",
        ),
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
            help="llmcomp, which holds the factors, or dense: their product, as large as before.",
            show_default="llmcomp",
        ),
    ] = None,
    save_recipe: o.SaveRecipe = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory.", show_default="./MODEL-METHOD-ratio-0.8")
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
    """Put two thin factors in the place of matrices, verify the checkpoint, measure what it cost.

    Fewer bytes and fewer multiplications. llmcomp.load computes with the factors; other readers cannot open them.

    Examples:

        llmcomp factorize sample:lm

        llmcomp factorize bert-base --ratio 0.6 --targets attention,mlp --skip blocks:0

        llmcomp factorize ./my-llama --ratio 0.7 --ranks balanced --override "down_proj ratio=0.9"
    """
    made = o.make_recipe(
        None, "factorize", ratio=ratio, rank=rank, method=method, ranks=ranks, update=update, target=target, skip=skip,
        override=override, option=option, calibration=calibration, samples=samples, sequence_length=sequence_length,
        seed=seed, format=format or "llmcomp",
    )  # fmt: skip
    run(
        model, made, json, save_recipe, activation_memory, Publishing(push_to_hub, private), output=output,
        overwrite=overwrite, evaluate=evaluate, verify=verify, device=device, eval_data=eval_data,
        text_column=text_column, label_column=label_column, trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle, revision=revision,
    )  # fmt: skip
