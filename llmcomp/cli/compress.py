"""`llmcomp compress`: several steps in one pass, by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcomp.cli import options as o
from llmcomp.cli.running import Publishing, run


def compress(
    model: o.Model,
    recipe: Annotated[Path, typer.Option("--recipe", help="A YAML file with the steps; see examples/.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory.", show_default="./MODEL-STEP-STEP")
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
    """Compress a model by a recipe, all its steps in one pass; verify the checkpoint, measure what it cost.

    Examples:

        llmcomp compress sample:lm --recipe examples/2of4-int4.yaml
    """
    made = o.make_recipe(recipe)
    run(
        model, made, json, None, activation_memory, Publishing(push_to_hub, private), output=output,
        overwrite=overwrite, evaluate=evaluate, verify=verify, device=device, eval_data=eval_data,
        text_column=text_column, label_column=label_column, trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle, revision=revision,
    )  # fmt: skip
