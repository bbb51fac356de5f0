"""What can be taken out of a block as a whole: its attention heads and the neurons of its MLP.

Found in the stages of a block, not by names. An MLP is the linears of that role: the last one, alone in its stage,
reads what those of one stage before it have made, channel by channel, so a neuron is a column of the last and a row
of each of the others; or two rows of one that makes gates and values at once, all of one behind all of the other. In
the attention the output projection reads heads side by side; what makes them are three linears of one stage, and where
keys and values are shared, the heads that share them are one unit.
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
        producers: (linear, how many of its rows a unit has side by side).
        halves: how often the units follow each other in a producer's rows, 2 where gates and values are fused.
    """

    what: str
    block: int
    output: LinearRef
    size: int
    heads: int
    producers: tuple[tuple[LinearRef, int], ...]
    halves: int = 1

    @property
    def units(self) -> int:
        return self.output.in_features // self.size

    @property
    def linears(self) -> tuple[LinearRef, ...]:
        return (*(ref for ref, _ in self.producers), self.output)

    def slices(self, kept: Tensor) -> dict[str, tuple[int, Tensor]]:
        """{parameter: (dimension, what stays of it)} where `kept` [units] stay; a bias may be none."""
        found = {f"{self.output.name}.weight": (0 if self.output.transposed else 1, spread(kept, self.size))}
        for ref, _ in self.producers:
            rows = self.rows(ref, kept)
            found[f"{ref.name}.weight"] = (1 if ref.transposed else 0, rows)
            found[f"{ref.name}.bias"] = (0, rows)
        return found

    def rows(self, ref: LinearRef, kept: Tensor) -> Tensor:
        """The rows of a producer that belong to the units `kept`, in the order of the matrix."""
        size = next(size for one, size in self.producers if one == ref)
        half = spread(kept, size)
        return torch.cat([half + number * size * self.units for number in range(self.halves)])


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
    made, read = sorted({ref.out_features for ref in producers}), output.in_features
    if made == [2 * read] and len(producers) == 1:
        return Part(NEURONS, block.index, output, 1, 1, ((producers[0], 1),), halves=2)
    if made != [read]:
        return f"linears that make {made} channels for one that reads {read} are no MLP that is known"
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
