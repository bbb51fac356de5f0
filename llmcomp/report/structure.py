"""What a model is made of and what a quantize step would do to each part: what `llmcomp inspect` shows.

Only headers are read. Bytes before are those in the files, bytes after those that the format would write.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from llmcomp.adapters.base import Adapter, LinearRef
from llmcomp.checkpoint import Binding
from llmcomp.formats import FORMATS, Layout, broken_ties
from llmcomp.pipeline.assign import Assignment, assign
from llmcomp.recipe import QuantizeStep


@dataclass(frozen=True)
class Item:
    """One weight.

    Attributes:
        block: index of its block, None outside; stage: those of one stage read the same input.
        shape: [out, in], also where the file holds [in, out].
        bytes_before: 0 where it has no tensor of its own (a tie).
        scheme: what it becomes, None where it stays dense.
        reason: why it stays dense, or why its groups are not those of the default; '' otherwise.
    """

    name: str
    role: str
    block: int | None
    stage: int | None
    shape: tuple[int, ...]
    dtype: str
    bytes_before: int
    bytes_after: int
    scheme: str | None
    reason: str


@dataclass(frozen=True)
class Structure:
    """A model's parts.

    Attributes:
        bytes_before, bytes_after: of all tensors in the files, now and by the step; without the optimizer's
            or tokenizer's files.
        items: embeddings, linears of the blocks in the order of computation, head.
        others: matrices that no role claims.
        rest: bytes of everything else (norms, biases, position embeddings).
        ties: parameter → the parameter whose storage it shares.
        notes: what the format or the discovery has to say.
    """

    architecture: str
    task: str
    parameters: int
    bytes_before: int
    bytes_after: int
    blocks: tuple[str, ...]
    items: tuple[Item, ...]
    others: tuple[Item, ...]
    rest: int
    ties: dict[str, str]
    notes: tuple[str, ...]


def structure(
    adapter: Adapter, binding: Binding, step: QuantizeStep | None = None, format: str = "compressed-tensors"
) -> Structure:
    """What `step` (by default that of a plain `llmcomp quantize`) would do to the model.

    Args:
        binding: of the adapter's model to its checkpoint; only sizes are read.
        format: a name in `llmcomp.formats.FORMATS`.

    Raises:
        BadRecipe: a step that does not fit the model.
    """
    assignment = assign(adapter, QuantizeStep() if step is None else step)
    stages = {
        ref.name: n for block in adapter.blocks for n, stage in enumerate(block.stages) for ref in stage
    }
    layout = FORMATS[format]([(task.ref, task.kind) for task in assignment.tasks.values()], adapter.model)
    untied = broken_ties(binding.ties, set(assignment.tasks) - set(layout.dense))
    items = tuple(
        _item(ref, stages.get(ref.name), assignment, layout, binding, f"{ref.name}.weight" in untied)
        for ref in adapter.refs
    )
    others = tuple(_other(name, reason, binding) for name, reason in adapter.uncompressed.items())
    total = binding.checkpoint.nbytes
    saved = sum(item.bytes_before - item.bytes_after for item in items)
    problem = adapter.trace_problem
    untraced = (
        [f"A forward pass could not be followed ({problem}): each stage is one linear."] if problem else []
    )
    return Structure(
        architecture=adapter.architecture,
        task=adapter.task,
        parameters=_parameters(adapter, binding),
        bytes_before=total,
        bytes_after=total - saved,
        blocks=tuple(block.name for block in adapter.blocks),
        items=items,
        others=others,
        rest=total - sum(item.bytes_before for item in (*items, *others)),
        ties=dict(binding.ties),
        notes=(*layout.notes, *untraced),
    )


def alike(found: Structure) -> list[tuple[list[int], list[Item]]]:
    """Blocks that hold the same: (their indices, the items of the first of them), in order."""
    groups: dict[tuple[object, ...], tuple[list[int], list[Item]]] = {}
    for index, name in enumerate(found.blocks):
        items = [item for item in found.items if item.block == index]
        key = tuple(
            (i.name[len(name) :], i.role, i.stage, i.shape, i.dtype, i.bytes_before, i.scheme, i.reason)
            for i in items
        )
        groups.setdefault(key, ([], items))[0].append(index)
    return list(groups.values())


def _item(
    ref: LinearRef, stage: int | None, assignment: Assignment, layout: Layout, binding: Binding, untied: bool
) -> Item:
    """`untied`: the step ends a tie, so that a weight which shared its storage gets its own."""
    parameter = f"{ref.name}.weight"
    info = binding.checkpoint.keys[binding.key_of[parameter]]
    tied = binding.ties.get(parameter)
    before = 0 if tied else info.nbytes
    task, dense = assignment.tasks.get(ref.name), layout.dense.get(ref.name)
    compressed = task is not None and dense is None
    itemsize = binding.dtypes[parameter].itemsize
    after = ref.weights * itemsize if untied else before
    why = assignment.left[ref.name] if task is None else dense or task.fallback or ""
    return Item(
        name=ref.name,
        role=ref.role,
        block=ref.block,
        stage=stage,
        shape=(ref.out_features, ref.in_features),
        dtype=str(info.dtype).removeprefix("torch."),
        bytes_before=before,
        bytes_after=layout.nbytes(ref, itemsize) if compressed else after,
        scheme=task.label if task is not None and compressed else None,
        reason=f"{why}; {'no longer shares' if untied else 'shares'} its storage with {tied}"
        if tied and not compressed
        else why,
    )


def _other(name: str, reason: str, binding: Binding) -> Item:
    """A matrix that no role claims; `name` is a linear's or, of other matrices, the parameter's own."""
    parameter = name if name in binding.key_of else f"{name}.weight"
    info = binding.checkpoint.keys[binding.key_of[parameter]]
    before = 0 if parameter in binding.ties else info.nbytes
    dtype = str(info.dtype).removeprefix("torch.")
    return Item(name, "other", None, None, info.shape, dtype, before, before, None, reason)


def _parameters(adapter: Adapter, binding: Binding) -> int:
    """Parameters, a shared one counted once."""
    names: Iterable[str] = (name for name, _ in adapter.model.named_parameters(remove_duplicate=False))
    keys = {binding.key_of[name] for name in names if name in binding.key_of}
    return sum(prod(binding.checkpoint.keys[key].shape) for key in keys)
