"""What can be taken out of a block as a whole: its attention heads and the neurons of its MLP.

Found in the stages of a block, not by names. An MLP is the linears of that role: the last one, alone in its stage,
reads what those of one stage before it have made, channel by channel, so a neuron is a column of the last and a row
of each of the others. In the attention the output projection reads heads side by side; what makes them are three
linears of one stage, and where keys and values are shared, the heads that share them are one unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcomp.adapters.base import Adapter, Block, LinearRef

HEADS, NEURONS = "heads", "neurons"


@dataclass(frozen=True)
class Part:
    """The heads or the neurons of one block.

    Attributes:
        what: HEADS or NEURONS. block: index of the block.
        output: the linear whose input they are.
        size: columns of `output` that a unit has.
        heads: of a unit, 1 for a neuron.
        producers: (linear, how many of its rows a unit has).
    """

    what: str
    block: int
    output: LinearRef
    size: int
    heads: int
    producers: tuple[tuple[LinearRef, int], ...]

    @property
    def units(self) -> int:
        return self.output.in_features // self.size

    @property
    def linears(self) -> tuple[LinearRef, ...]:
        return (*(ref for ref, _ in self.producers), self.output)

    def slices(self, kept: Tensor) -> dict[str, tuple[int, Tensor]]:
        """{parameter: (dimension, what stays of it)} where `kept` [units] stay; a bias may be none."""
        found = {f"{self.output.name}.weight": (0 if self.output.transposed else 1, spread(kept, self.size))}
        for ref, rows in self.producers:
            found[f"{ref.name}.weight"] = (1 if ref.transposed else 0, spread(kept, rows))
            found[f"{ref.name}.bias"] = (0, spread(kept, rows))
        return found


def spread(units: Tensor, size: int) -> Tensor:
    """The columns of units that lie side by side: int64 [units] → [units * size].

    >>> spread(torch.tensor([0, 2]), 3).tolist()
    [0, 1, 2, 6, 7, 8]
    """
    return (units.unsqueeze(1) * size + torch.arange(size, device=units.device)).flatten()


def neurons_of(block: Block) -> Part | str:
    """The neurons of a block's MLP, or why they cannot be told apart."""
    mlp = [[ref for ref in stage if ref.role == "mlp"] for stage in block.stages]
    mlp = [stage for stage in mlp if stage]
    refs = [ref for stage in mlp for ref in stage]
    if any(ref.share < 1 for ref in refs):
        return "its MLPs are mixtures of experts"
    if len(mlp) != 2 or len(mlp[1]) != 1:
        return f"an MLP of {len(refs)} linears is none of two, or of three with a gate"
    output, producers = mlp[1][0], mlp[0]
    if any(ref.out_features != output.in_features for ref in producers):
        made = ", ".join(f"{ref.name.rpartition('.')[2]} makes {ref.out_features}" for ref in producers)
        last = output.name.rpartition(".")[2]
        return f"{made} channels and {last} reads {output.in_features}, so two linears are fused in one"
    return Part(NEURONS, block.index, output, 1, 1, tuple((ref, 1) for ref in producers))


def heads_of(block: Block, config: Any) -> Part | str:
    """The attention heads of a block, by groups that share keys and values, or why they cannot be told apart.

    Args:
        config: of the model.
    """
    stages = [[ref for ref in stage if ref.role == "attention"] for stage in block.stages]
    stages = [stage for stage in stages if stage]
    if len(stages) == 2 and len(stages[0]) == 1:
        return f"queries, keys and values are fused in {stages[0][0].name.rpartition('.')[2]}"
    if len(stages) != 2 or [len(stage) for stage in stages] != [3, 1]:
        return "its attention is not made of queries, keys, values and one output projection"
    (output,), readers = stages[1], stages[0]
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None) or heads
    if not heads or not shared or output.in_features % heads or heads % shared:
        return f"{heads} heads with {shared} for keys and values do not divide a width of {output.in_features}"
    dim, together = output.in_features // heads, heads // shared
    rows = sorted(ref.out_features for ref in readers)
    if rows != [shared * dim, shared * dim, heads * dim]:
        return f"queries, keys and values of {rows} rows are not {heads} heads of {dim}, {shared} for keys and values"
    if shared == 1:
        return "all heads share one of keys and values, so they are one group"
    sizes = tuple((ref, ref.out_features // shared) for ref in readers)
    return Part(HEADS, block.index, output, dim * together, together, sizes)


def problem_of(adapter: Adapter) -> str | None:
    """Why nothing can be taken out of a model; None where it may."""
    if not adapter.stages_known:
        return f"its forward could not be traced, {adapter.trace_problem}, so nothing says what belongs together"
    if any(block.applications > 1 for block in adapter.blocks):
        return "it runs one block several times, so all of its layers share their weights"
    return None


def after(model: Any, slices: Mapping[str, tuple[int, Tensor]]) -> dict[str, tuple[int, ...]]:
    """{parameter or stored buffer: its shape} once `slices` are made."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, (dimension, kept) in slices.items():
        if name in shapes:
            shape = list(shapes[name])
            shape[dimension] = len(kept)
            shapes[name] = tuple(shape)
    return shapes
