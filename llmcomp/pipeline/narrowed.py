"""What is said of a narrowed model: its blocks under new numbers, its layers in the report, what is gone from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from llmcomp.adapters.base import LinearRef
from llmcomp.adapters.units import HEADS, Part
from llmcomp.checkpoint import Binding
from llmcomp.pipeline.pruning import Smaller
from llmcomp.report.schema import LayerReport, Removed


@dataclass(frozen=True)
class Renumbered:
    """`pipeline.residency.Values` of some of the source's blocks."""

    binding: Binding
    smaller: Smaller
    key_of: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, binding: Binding, smaller: Smaller) -> Renumbered:
        names = {name: smaller.original(name) for name in smaller.full.model.state_dict()}
        keys = {name: binding.key_of[old] for name, old in names.items() if old in binding.key_of}
        return cls(binding, smaller, keys)

    def tensor(self, name: str) -> Tensor:
        return self.binding.tensor(self.smaller.original(name))

    def file_name(self, name: str) -> str:
        """What the tensor is called in the file, by the number that its block has now."""
        old = self.smaller.original(name)
        stored = self.binding.file_name(old)
        if stored == old:
            return name
        numbered = [part for part in zip(old.split("."), name.split("."), strict=True) if part[0] != part[1]]
        for before, now in numbered:
            stored = stored.replace(f".{before}.", f".{now}.", 1)
        return stored


def narrowed(part: Part, ref: LinearRef, keep: int, itemsize: int, method: str) -> LayerReport:
    """The report's line of a linear of which `keep` units stay. itemsize: bytes of one value."""
    if ref is part.output:
        shape = (ref.out_features, keep * part.size)
    else:
        shape = (ref.out_features // part.units * keep, ref.in_features)
    return LayerReport(
        name=ref.name,
        block=ref.block,
        role=ref.role,
        shape=shape,
        scheme=f"{keep * part.heads} of {part.units * part.heads} {part.what}",
        method=method,
        bytes_before=ref.weights * itemsize,
        bytes_after=shape[0] * shape[1] * itemsize,
    )


def gone(part: Part, name: str, stays: Sequence[int], error: float | None) -> Removed:
    """What is gone from a part. name: of the output projection in the source. error: of its output."""
    kept = set(stays)
    lost = [unit for unit in range(part.units) if unit not in kept]
    which = lost if part.what == HEADS else []  # of neurons there are too many to read
    what = "group of heads" if part.heads > 1 else part.what.removesuffix("s")
    return Removed(name, what, part.units, len(lost), which, error)


def with_cut(done: Sequence[LayerReport], narrowed: Sequence[LayerReport]) -> list[LayerReport]:
    """The report's layers: those that later steps compressed, with what pruning did to them before, and those that
    were only narrowed. An error is that of the last step, against what pruning had left."""
    before = {layer.name: layer for layer in narrowed}
    found = []
    for layer in done:
        first = before.pop(layer.name, None)
        if first is not None:
            layer = replace(
                layer, scheme=f"{first.scheme} + {layer.scheme}", method=f"{first.method} + {layer.method}",
                bytes_before=first.bytes_before, seconds=first.seconds + layer.seconds,
            )  # fmt: skip
        found.append(layer)
    return [*found, *before.values()]


def notes(removed: Sequence[Removed], blocks: int) -> list[str]:
    """What is gone, in sentences. blocks: how many the source had."""
    said = []
    gone = [one for one in removed if one.what == "block"]
    if gone:
        scores = ", ".join(f"{number} ({one.score:.3g})" for one in gone for number in one.which)
        said.append(f"Blocks that are gone, of {blocks}, counted from 0, with the score for which they went: {scores}.")
    if any(one.which for one in removed if one.what != "block"):
        said.append("Which heads are gone from each block is in llmcomp_report.json, under 'removed'.")
    return said
