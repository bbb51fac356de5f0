"""`llmcomp models`: the names that MODEL takes besides directories and Hub ids."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer

from llmcomp.aliases import ALIASES
from llmcomp.hub import cached
from llmcomp.samples import SAMPLES


def models(
    json: Annotated[bool, typer.Option("--json", help="One JSON list and nothing else.")] = False,
) -> None:
    """List sample models and aliases, with Hub id, family, size and whether they are cached here.

    Examples:

        llmcomp models

        llmcomp models --json
    """
    rows = table_rows()
    if json:
        typer.echo(json_module.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Names that MODEL takes, besides local directories and Hub ids")
    for column in ("alias", "Hub id", "family", "parameters", "here"):
        table.add_column(column, justify="right" if column == "parameters" else "left", overflow="fold")
    for row in rows:
        here = {"ships": "[green]ships[/]", "cached": "[green]cached[/]"}.get(row["here"], "")
        table.add_row(row["alias"], row["repo"] or "", row["family"], row["parameters"], here)
    Console().print(table)


def table_rows() -> list[dict[str, Any]]:
    """One dict per name: alias, repo (None for samples), family, parameters, here (ships, cached or '')."""
    samples = [
        {
            "alias": name,
            "repo": None,
            "family": _family(name),
            "parameters": _parameters(name),
            "here": "ships",
        }
        for name in SAMPLES
    ]
    return samples + [
        {"alias": name, **alias._asdict(), "here": "cached" if cached(alias.repo) else ""}
        for name, alias in ALIASES.items()
    ]


def _family(sample: str) -> str:
    config = json_module.loads((SAMPLES[sample] / "config.json").read_text(encoding="utf-8"))
    return str(config["architectures"][0])


def _parameters(sample: str) -> str:
    """Counted from the headers of the safetensors files; a tied weight is stored, and counted, once."""
    from math import prod

    from safetensors import safe_open

    total = 0
    for path in sorted(SAMPLES[sample].glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            total += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return f"{total / 1e6:.1f}M"
