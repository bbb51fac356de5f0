"""Flags that more than one verb takes, and how they become a recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from llmcomp.building import build
from llmcomp.errors import BadRecipe
from llmcomp.recipe import STEPS, Calibration, Override, Recipe, step_of

Model = Annotated[
    str,
    typer.Argument(
        help="A directory, a Hub id, an alias such as 'bert-base' (see llmcomp models), or 'sample:lm'.",
        show_default=False,
    ),
]
Bits = Annotated[int | None, typer.Option("--bits", help="2, 3, 4 or 8.", show_default="4, with --activations 8")]
GroupSize = Annotated[
    str | None,
    typer.Option(
        "--group-size",
        help="Weights that share a scale: 32, 64, 128, or 'channel' for a whole row.",
        show_default="128 where it divides the width",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="gptq, gptaq, awq, awq-gptq, signround, gptq-signround, rtn-clip or rtn; auto takes what was measured "
        "best at the width, which may take long.",
        show_default="gptq",
    ),
]
Asymmetric = Annotated[bool | None, typer.Option("--asymmetric/--symmetric", help="Store zero points.")]
Activations = Annotated[
    str | None,
    typer.Option(
        "--activations",
        help="Linears also round their inputs (W8A8). int8-dynamic: each token by its own scale; int8-static: by one "
        "scale for each linear, from calibration.",
        show_default="not rounded",
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "--targets",
        help="What to compress: a role (attention, mlp, embeddings, head), 'blocks:2-5', 're:PATTERN' or a "
        "module's last name; several with commas between them, or repeated.",
        show_default="attention, mlp",
    ),
]
Skip = Annotated[list[str] | None, typer.Option("--skip", help="A target to leave alone; may be repeated.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        help="What differs for a target: 'down_proj bits=8 group_size=channel'; may be repeated.",
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        help="A setting of the method, such as 'damping=0.05' or 'iterations=400'; may be repeated.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="A .txt, .jsonl, .parquet or .csv file, a .safetensors file of input_ids, or a Hub dataset; for models "
        "that read images or sound, a folder of them or a table with their paths.",
        show_default="WikiText-2 train where reachable, else the text that ships",
    ),
]
Samples = Annotated[int | None, typer.Option("--samples", help="Calibration windows.", show_default="128")]
SequenceLength = Annotated[
    int | None, typer.Option("--sequence-length", help="Tokens of a window.", show_default="512")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Which windows.", show_default="0")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="compressed-tensors, llmcomp, dense, bnb-nf4 or bnb-int8.",
        show_default="compressed-tensors",
    ),
]
SaveRecipe = Annotated[Path | None, typer.Option("--save-recipe", help="Write the recipe here.")]
Evaluate = Annotated[bool, typer.Option("--evaluate/--no-evaluate", help="Measure before and after.")]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Reload in a fresh process and compare.")]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="Where to compress: cpu, cuda or cuda:N; auto takes a GPU where each process can have one."
    ),
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pytorch_model.bin where there are no safetensors.")
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="Take all of the above from a YAML file.")]
ActivationMemory = Annotated[
    int,
    typer.Option("--activation-memory", min=0, help="MB of waiting activations before they go to mapped files."),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings along.")
]
Checkpoint = Annotated[str, typer.Argument(help="A checkpoint: directory, sample, alias or Hub id.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")]
QUALITY = "What to measure on"
EvalData = Annotated[
    str | None,
    typer.Option(
        "--eval-data",
        help="A .txt, .jsonl, .csv or .parquet file, or a Hub dataset name[:config[:split]].",
        show_default="WikiText-2 test, else the text that ships",
        rich_help_panel=QUALITY,
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        "--text-column", help="Column of --eval-data with the text; 'first,second' for pairs.", rich_help_panel=QUALITY
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        "--label-column", help="Column of --eval-data with the label of a row, or score of a pair.",
        rich_help_panel=QUALITY,
    ),
]  # fmt: skip
Private = Annotated[bool, typer.Option("--private", help="On the Hub, seen by its owners only.")]
PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        help="Publish the result there, as `llmcomp push` does: user/name. Name and token are checked first; the "
        "output stays whatever happens.",
        show_default="not published",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]

_STEP = {
    "bits": "bits", "group_size": "group_size", "method": "method", "asymmetric": "symmetric",
    "activations": "activations", "target": "targets", "skip": "skip", "override": "override", "option": "options",
    "pattern": "pattern", "sparsity": "sparsity", "allocate": "allocate", "ratio": "ratio", "rank": "rank",
    "ranks": "ranks", "update": "update", "heads": "heads", "mlp": "mlp", "layers": "layers",
}  # fmt: skip
_CALIBRATION = {"calibration": "source", "samples": "samples", "sequence_length": "sequence_length"}
_RUN = {"seed": "seed", "format": "format"}


def make_recipe(recipe_file: Path | None, kind: str = "quantize", **flags: Any) -> Recipe:
    """A recipe from a file, or of one step from flags.

    Args:
        kind: of the step, one of `llmcomp.recipe.STEPS`.
        flags: values of the options above, by the names that verbs give them; None or an empty list: not given.

    Raises:
        BadRecipe: both a file and flags, or texts that cannot be read.
    """
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    if recipe_file is not None:
        if given:
            said = ", ".join(sorted("--" + name.replace("_", "-") for name in given))
            raise BadRecipe(f"--recipe already says everything: drop {said}, or change it in the file.")
        return Recipe.load(recipe_file)
    step, calibration, run = (
        {field: given[flag] for flag, field in fields.items() if flag in given}
        for fields in (_STEP, _CALIBRATION, _RUN)
    )
    if "symmetric" in step:
        step["symmetric"] = not step["symmetric"]  # the flag is --asymmetric
    overrides = [_override(text) for text in step.pop("override", [])]
    overrides += [Override(target, skip=True) for target in step.pop("skip", [])]
    if "options" in step:
        step["options"] = dict(_setting(text, "--option") for text in step["options"])
    if "group_size" in step:
        step["group_size"] = _number(step["group_size"])
    if "targets" in step:
        step["targets"] = tuple(target for text in step["targets"] for target in _several(text))
    if overrides:
        step["overrides"] = tuple(overrides)
    made = step_of(run.get("format", ""), **step) if kind == "quantize" else STEPS[kind](**step)
    return Recipe((made,), Calibration(**calibration), **run)


def parse_size(text: str, flag: str) -> int:
    """Bytes of '24GiB', '80 GB' or '500MB'.

    Raises:
        BadRecipe: anything else.
    """
    found = re.fullmatch(r"([0-9.]+) *([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if found is None or not number:
        raise BadRecipe(f"{flag} {text!r} is no size; expected a number with a unit, such as 24GiB or 500MB.")
    return int(number * (1024 if found[3] else 1000) ** (1 + "KMGT".index(found[2].upper())))


def _several(text: str) -> list[str]:
    """'attention,mlp' as two targets; a comma in a pattern is the pattern's."""
    return [text] if text.startswith("re:") else [part.strip() for part in text.split(",")]


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _override(text: str) -> Override:
    """'down_proj bits=8 group_size=channel' as an Override."""
    if not text.strip():
        raise BadRecipe(f"--override {text!r} names no target; expected one and what differs, as 'down_proj bits=8'.")
    target, *settings = text.split()
    fields: dict[str, Any] = {"target": target}
    for setting in settings:
        name, value = _setting(setting, f"--override {text!r}")
        fields[name] = value
    override: Override = build(Override, fields, f"--override {text!r}")
    return override


def _setting(text: str, where: str) -> tuple[str, Any]:
    """'damping=0.05' as ('damping', 0.05).

    Raises:
        BadRecipe: no '=' in it.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise BadRecipe(f"{where}: expected NAME=VALUE, got {text!r}.")
    if value in ("true", "false"):
        return name, value == "true"
    try:
        return name, int(value) if re.fullmatch(r"-?[0-9]+", value) else float(value)
    except ValueError:
        return name, value
