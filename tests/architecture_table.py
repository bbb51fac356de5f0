"""docs/architectures.md, made from the models that the tests run.

    python tests/architecture_table.py     # write it anew

The rows are the models of tiny.py, which tests/e2e/test_architectures.py compresses by the methods of `PROVEN`;
what a row says is what discovery and the format answer for that model today.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tiny import TINY, build

from llmcomp.adapters.base import Adapter, Block
from llmcomp.adapters.discover import discover
from llmcomp.errors import BadRecipe
from llmcomp.experts import split_experts
from llmcomp.pipeline.job import plan_recipe
from llmcomp.pipeline.pruning import reduce_model
from llmcomp.recipe import FactorizeStep, PruneStep, Recipe

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
COMMAND = "python tests/architecture_table.py"
PROVEN = ("gptq", "rtn")  # on whole models; models with a classification head: by the first

_HEAD = f"""# Architectures

Written by `{COMMAND}`; a test fails when this page is out of date.

llmcomp has no list of architectures: it finds the blocks of a model, runs its forward without weights, and sees
which linear layers read the same tensor. So others may work as well (`llmcomp inspect MODEL` shows what is found).
Those below are proven on every commit (`tests/e2e/test_architectures.py`): a small random model of each is compressed
to 4 bits, loaded by plain transformers in a fresh process, and compared with what was compressed and with the
original. Other widths, zero points and `rtn-clip` are proven on Llama and BERT (`tests/test_every_method.py`).

- **compressed, in this order**: of a block. Linears with a comma between them read the same tensor and share
  statistics; those behind an arrow are calibrated on what the compressed ones before it compute. `each expert`
  stands for all experts of a block, each with statistics of the tokens that are routed to it. Two kinds of blocks have
  a semicolon between them: an encoder's and a decoder's, or the first and the later ones of a mixture of experts.
- **left alone**: matrices that stay as they are, besides norms, and embeddings and the output head, which a recipe
  may ask for.
- **in the file**: what `--format compressed-tensors` makes of 4 bits, see [formats.md](formats.md).
  `--format dense` holds any of them.
- **factors**: what `llmcomp factorize` plans for it: whether factors are fitted anew to the inputs of now. Llama, BERT,
  GPT-2, Mixtral and ALBERT are run to the end (`tests/e2e/test_factorizing.py`).
- **can go**: what `llmcomp prune` can take out; [pruning.md](methods/pruning.md) says why not the rest. Fifteen are run
  to the end (`tests/e2e/test_pruning.py`).

| architecture | with a head for | compressed, in this order | left alone | in the file | factors | can go | proven |
|---|---|---|---|---|---|---|---|
"""


@dataclass
class _Row:
    kind: str
    stages: str
    left: dict[str, None] = field(default_factory=dict)
    stored: dict[str, None] = field(default_factory=dict)
    factors: dict[str, None] = field(default_factory=dict)
    pruned: dict[str, None] = field(default_factory=dict)
    tasks: dict[str, None] = field(default_factory=dict)


def render() -> str:
    """The page."""
    rows: dict[tuple[str, str], _Row] = {}
    for name in TINY:
        model = build(name).to("meta")
        split_experts(model)
        adapter = discover(model)
        kind = re.split(r"For[A-Z]|LMHead", adapter.architecture)[0]
        stages = "; ".join(dict.fromkeys(_stages(block) for block in adapter.blocks))
        row = rows.setdefault((kind, stages), _Row(kind, stages))
        row.tasks[adapter.task] = None
        row.left |= dict.fromkeys(_left(adapter))
        row.stored[_stored(adapter)] = None
        row.factors[_factors(adapter)] = None
        row.pruned[_pruned(adapter)] = None
    methods = ", ".join(f"`{method}`" for method in PROVEN)
    lines = [
        " | ".join(
            (
                row.kind, ", ".join(row.tasks), row.stages, ", ".join(row.left), "; ".join(row.stored),
                "; ".join(row.factors), "; ".join(row.pruned), methods,
            )
        )
        for row in sorted(rows.values(), key=lambda row: row.kind.lower())
    ]
    return _HEAD + "".join(f"| {line} |\n" for line in lines)


def _stages(block: Block) -> str:
    """Of several experts, the first, for all."""
    stages = [stage for stage in block.stages if stage[0].share == 1 or ".0." in stage[0].name.partition(".mlp")[2]]
    last = Counter(ref.name.rpartition(".")[2] for stage in stages for ref in stage)

    def short(name: str) -> str:
        parts = re.sub(r"\bexperts\.0", "each expert", name).split(".")
        return ".".join(parts[-1:] if last[parts[-1]] == 1 and "each expert" not in parts else parts[-2:])

    inside = (", ".join(short(ref.name) for ref in stage) for stage in stages)
    return " → ".join(inside) + (" (one block, run at every depth)" if block.applications > 1 else "")


def _left(adapter: Adapter) -> list[str]:
    """Names without their beginning and without numbers."""
    parts = ([part for part in name.split(".") if not part.isdigit()] for name in adapter.uncompressed)
    return [".".join(names[-2:]) for names in parts]


def _factors(adapter: Adapter) -> str:
    try:
        plan = plan_recipe(Recipe((FactorizeStep(),), format="llmcomp"), adapter)
    except BadRecipe:
        return "refused, its linears compute in a way of their own; `--format dense` holds the product"
    low = [task for task in plan.assignment.tasks.values() if task.factoring is not None]
    updated = [task for task in low if task.factoring is not None and task.factoring.update]
    return "not updated" if not updated else "updated" if len(updated) == len(low) else "updated, experts not"


def _pruned(adapter: Adapter) -> str:
    steps = {"heads": PruneStep(heads=0.5), "neurons": PruneStep(mlp=0.5), "blocks": PruneStep(layers=1)}
    found = []
    for what, step in steps.items():
        try:
            reduce_model(adapter, step)
        except BadRecipe:
            continue
        found.append(what)
    return ", ".join(found) or "nothing"


def _stored(adapter: Adapter) -> str:
    layout = plan_recipe(Recipe(), adapter).layout
    config = layout.config(adapter.model)
    assert config is not None and not layout.dense
    (form,) = {group["format"] for group in config["config_groups"].values()}
    (strategy,) = {group["weights"]["strategy"] for group in config["config_groups"].values()}
    remarks = ["transposed blocks"] * (strategy == "block") + ["decoded at load"] * bool(config.get("dequantize"))
    return f"`{form}`" + (f" ({', '.join(remarks)})" if remarks else "")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
