"""`llmcomp quantize`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcomp.cli import options as o
from llmcomp.cli.running import Publishing, run


def quantize(
    model: o.Model,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    method: o.Method = None,
    asymmetric: o.Asymmetric = None,
    activations: o.Activations = None,
    target: o.Targets = None,
    skip: o.Skip = None,
    override: o.Overrides = None,
    option: o.Options = None,
    calibration: o.Data = None,
    samples: o.Samples = None,
    sequence_length: o.SequenceLength = None,
    seed: o.Seed = None,
    format: o.Format = None,
    recipe: o.RecipeFile = None,
    save_recipe: o.SaveRecipe = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory.", show_default="./MODEL-METHOD-wBITS")
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
    """Make a model smaller: quantize its weights, verify the checkpoint, measure what it cost.

    Examples:

        llmcomp quantize sample:lm --bits 4

        llmcomp quantize bert-base --bits 8 --group-size channel

        llmcomp quantize ./my-llama --bits 3 --override "down_proj bits=4" --skip blocks:0-1

        llmcomp quantize ./my-classifier --eval-data test.csv --label-column label

        llmcomp quantize ./all-MiniLM-L6-v2 --eval-data pairs.csv --text-column first,second --label-column score
    """
    made = o.make_recipe(
        recipe, bits=bits, group_size=group_size, method=method, asymmetric=asymmetric, activations=activations,
        target=target, skip=skip, override=override, option=option, calibration=calibration, samples=samples,
        sequence_length=sequence_length, seed=seed, format=format,
    )  # fmt: skip
    run(
        model, made, json, save_recipe, activation_memory, Publishing(push_to_hub, private), output=output,
        overwrite=overwrite, evaluate=evaluate, verify=verify, device=device, eval_data=eval_data,
        text_column=text_column, label_column=label_column, trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle, revision=revision,
    )  # fmt: skip
