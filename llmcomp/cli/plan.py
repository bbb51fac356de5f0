"""`llmcomp plan`: what a run would need and give, before anything but the config is there."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcomp.cli import options as o

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmcomp.pipeline.plan import Prospect, Row
    from llmcomp.recipe import Recipe

_WIDTHS = (8, 4, 3, 2)
IMPORTED = 500_000_000  # bytes that a process holds with torch and transformers imported, before it does anything


def plan(
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
    activation_memory: o.ActivationMemory = 8,
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, help="Processes that share the work; memory and time are of each.")
    ] = 1,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="What each rank has, such as 24GiB: the table says how much of it is taken."),
    ] = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
) -> None:
    """Say what quantize would need and give: bytes after, peak memory, disk and time, for every method.

    Takes the flags of quantize. Only config.json is read, so it answers before a model is downloaded. Without
    --bits it compares 8, 4, 3 and 2.

    Examples:

        llmcomp plan tinyllama

        llmcomp plan ./my-model --bits 4 --samples 64 --json

        llmcomp plan ./my-70b --bits 4 --ranks 8 --memory 80GiB
    """
    from llmcomp.cli.progress import listener
    from llmcomp.hub import resolve
    from llmcomp.recipe import check

    made = o.make_recipe(
        recipe, bits=bits, group_size=group_size, method=method, asymmetric=asymmetric, activations=activations,
        target=target, skip=skip, override=override, option=option, calibration=calibration, samples=samples,
        sequence_length=sequence_length, seed=seed, format=format,
    )  # fmt: skip
    check(made)
    available = None if memory is None else o.parse_size(memory, "--memory")
    with listener(json) as progress:
        found = resolve(model, revision=revision, config_only=True, trust_remote_code=trust_remote_code,
                        progress=progress)  # fmt: skip
        open_width = bits is None and activations is None and recipe is None
        widths = _WIDTHS if open_width else tuple(one.bits for one in (made.quantizing,) if one is not None)
        seen = _look(found.path, made, widths, activation_memory * 2**20, trust_remote_code, ranks)
    if json:
        typer.echo(json_module.dumps(as_json(model, seen, available), indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    Console().print(view(model, seen, available))


def _look(
    path: Path, recipe: Recipe, widths: tuple[int, ...], memory: int, trust_remote_code: bool, ranks: int
) -> Prospect:
    """The prospect of a directory with a config.

    Raises:
        UserError: an unreadable or already compressed model, or a recipe that does not fit it.
    """
    import dataclasses

    from llmcomp.adapters.discover import discover, skeleton
    from llmcomp.errors import BadCheckpoint
    from llmcomp.measure.inputs import max_positions
    from llmcomp.pipeline.plan import prospect
    from llmcomp.shards import read_json_object

    config = read_json_object(path / "config.json")
    if config.get("quantization_config") or config.get("compression_config"):
        raise BadCheckpoint(f"{path} is already quantized; give the full-precision checkpoint instead.")
    adapter = discover(skeleton(path, trust_remote_code=trust_remote_code))
    seen = prospect(adapter, recipe, widths, memory, max_positions(adapter.model, None), ranks)
    if config.get("dtype") or config.get("torch_dtype"):
        return seen
    source = "the weights' headers" if any(path.glob("*.safetensors")) else "nothing, so float32 is assumed"
    note = f"config.json names no dtype; {seen.dtype} comes from {source}."
    return dataclasses.replace(seen, notes=(*seen.notes, note))


def as_json(model: str, seen: Prospect, memory: int | None = None) -> dict[str, Any]:
    """The prospect as one JSON object; with the `memory` of a rank in bytes, whether each row fits into it."""
    import dataclasses

    found = {"model": model, **dataclasses.asdict(seen)}
    if memory is not None:
        found["memory"] = memory
        for row in found["rows"]:
            row["fits"] = row["peak_memory"] + IMPORTED <= memory
    return found


def view(model: str, seen: Prospect, memory: int | None = None) -> RenderableType:
    """The prospect as a terminal shows it; with the `memory` of a rank in bytes, how much of it each row takes."""
    from rich import box
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from llmcomp.report import words

    own = seen.rows[0]
    facts = Text(
        f"{seen.architecture} · {seen.task} · {words.parameters(seen.parameters)} parameters · "
        f"{words.size(seen.bytes_before)} {seen.dtype}"
    )
    data = Text(f"calibration of up to {seen.windows} windows × {seen.length} tokens; only the config was read")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="dim", padding=(0, 1))
    # Of two that would make lines too long for a terminal, the one that was asked for.
    ratio, limit = (("",), ()) if memory is None else ((), (f"of {memory / 2**30:g} GiB",))
    for column in ("method", "bits", "size", *ratio, "memory", *limit, "disk", "time"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    ordered = sorted(seen.rows, key=lambda one: -(one.bits or 16))
    for number, one in enumerate(ordered):
        last = number + 1 == len(ordered) or ordered[number + 1].bits != one.bits
        taken = () if memory is None else (Text(f"{(one.peak_memory + IMPORTED) / memory:.1%}"),)
        for cell in taken:
            if memory is not None and one.peak_memory + IMPORTED > memory:
                cell.stylize("red")
        table.add_row(
            one.method, str(one.bits or "–"), words.size(one.bytes_after),
            *(words.ratio(seen.bytes_before, one.bytes_after) for _ in ratio),
            words.size(one.peak_memory), *taken, words.size(one.disk), f"~ {words.about(one.seconds)}",
            style="bold green" if one.asked else "", end_section=last and number + 1 < len(ordered),
        )  # fmt: skip
    terms = {name: size for name, size in vars(own.terms).items() if size}
    shares = ", ".join(f"{name} {words.size(size)}" for name, size in sorted(terms.items(), key=lambda t: -t[1]))
    width = "" if own.bits is None else f" at {own.bits} bits"
    peak = f"Peak memory of {own.method}{width}, while {own.moment}: {shares}."
    statistics = "No calibration is needed."
    if own.prunes:
        times = "once" if own.passes == 1 else f"{own.passes} times, to look at blocks, to prune, and for what follows"
        statistics = f"{own.statistics} Gram matrices are gathered; each window is computed {times}."
    elif own.statistics:
        statistics = f"{own.statistics} Gram matrices are gathered; each window is computed {_times(own)}."
    about = "Memory is over that after imports; time is of compressing and saving, good to a factor of two."
    if seen.ranks > 1:
        about += (
            f" Both are of each of {seen.ranks} ranks, if each is as fast as this process is here; a host "
            "holds as many times the memory as it has ranks, and the disk is the first rank's."
        )
    if memory is not None:
        about += f" Shares of {memory / 2**30:g} GiB count {words.size(IMPORTED)} for Python and its libraries, too."
    lines = [peak, statistics, about, *seen.notes, *_fallbacks(own.fallbacks)]
    return Group(
        Panel(Group(facts, data), title=Text(model, "bold"), title_align="left", border_style="cyan"),
        table,
        *(Text(f" · {line}") for line in lines),
    )


def _times(row: Row) -> str:
    """How often, and why more than once."""
    why = [f"to share out the {row.shared}"] if row.shared else []
    why += ["by the source model beside the compressed one"] if row.beside else []
    return ", ".join((("once", "twice", "three times")[len(why)], *why))


def _fallbacks(fallbacks: dict[str, str]) -> list[str]:
    """Each reason once, with the weights that it holds for."""
    from llmcomp.report import words

    names: dict[str, list[str]] = {}
    for name, reason in fallbacks.items():
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(words.collapse(some))}: {reason}" for reason, some in names.items()]
