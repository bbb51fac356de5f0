"""`llmcomp quantize`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcomp.cli import options as o


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
    save_recipe: Annotated[Path | None, typer.Option("--save-recipe", help="Write the recipe here.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory.", show_default="./MODEL-METHOD-wBITS")
    ] = None,
    overwrite: o.Overwrite = False,
    evaluate: Annotated[bool, typer.Option("--evaluate/--no-evaluate", help="Measure before and after.")] = True,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Reload in a fresh process and compare.")
    ] = True,
    device: Annotated[
        str,
        typer.Option(
            "--device", help="Where to compress: cpu, cuda or cuda:N; auto takes a GPU where each process can have one."
        ),
    ] = "auto",
    eval_data: o.EvalData = None,
    text_column: o.TextColumn = None,
    label_column: o.LabelColumn = None,
    activation_memory: o.ActivationMemory = 8,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pytorch_model.bin where there are no safetensors.")
    ] = False,
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
    from llmcomp.api import RunOptions
    from llmcomp.api import quantize as run
    from llmcomp.cli.progress import listener
    from llmcomp.ranks import launched

    made = o.make_recipe(
        recipe, bits=bits, group_size=group_size, method=method, asymmetric=asymmetric, activations=activations,
        target=target, skip=skip, override=override, option=option, calibration=calibration, samples=samples,
        sequence_length=sequence_length, seed=seed, format=format,
    )  # fmt: skip
    if save_recipe is not None and launched().first:
        _save(save_recipe, made.to_yaml())
    settings = RunOptions(
        output=output, overwrite=overwrite, evaluate=evaluate, verify=verify, device=device,
        activation_memory=activation_memory * 2**20, eval_data=eval_data, text_column=text_column,
        label_column=label_column, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, revision=revision,
    )  # fmt: skip
    with listener(json) as progress:
        result = run(model, recipe=made, options=settings, progress=progress)
    if json:
        typer.echo(result.report.to_json(), nl=False)
        return
    from rich.console import Console

    from llmcomp.report.html import FILE_NAME
    from llmcomp.report.table import table

    Console().print(table(result.report, page=str(result.output / FILE_NAME)))


def _save(path: Path, text: str) -> None:
    from llmcomp.errors import UserError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"The recipe cannot be written to {path} ({error}); give another path.") from error
