"""What a model is made of and what a quantize step would do to each part: what `llmcomp inspect` shows.

Only headers are read. Bytes before are those in the files, bytes after those that the format would write.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from llmcomp.adapters.base import Adapter, LinearRef
from llmcomp.checkpoint import Binding
from llmcomp.formats import FORMATS, Layout
from llmcomp.recipe import QuantizeStep, matches, override_for, scheme_for
from llmcomp.schemes import Scheme


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
    """
    step = QuantizeStep() if step is None else step
    stages = {
        ref.name: n for block in adapter.blocks for n, stage in enumerate(block.stages) for ref in stage
    }
    chosen = {ref.name: (ref, scheme) for ref in adapter.refs if (scheme := _scheme(step, ref)) is not None}
    layout = FORMATS[format](list(chosen.values()))
    items = tuple(
        _item(ref, stages.get(ref.name), chosen.get(ref.name, (ref, None))[1], step, layout, binding)
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


def _scheme(step: QuantizeStep, ref: LinearRef) -> Scheme | None:
    """What the step makes of the weight, None where it leaves it alone."""
    override = override_for(step, ref.name, ref.role, ref.block)
    if not _targeted(step, ref) or (override is not None and override.skip):
        return None
    scheme = scheme_for(step, override, ref.in_features)
    return scheme if scheme.fits(ref.in_features) else None


def _targeted(step: QuantizeStep, ref: LinearRef) -> bool:
    return any(matches(target, ref.name, ref.role, ref.block) for target in step.targets)


def _item(
    ref: LinearRef,
    stage: int | None,
    scheme: Scheme | None,
    step: QuantizeStep,
    layout: Layout,
    binding: Binding,
) -> Item:
    parameter = f"{ref.name}.weight"
    info = binding.checkpoint.keys[binding.key_of[parameter]]
    tied = binding.ties.get(parameter)
    before = 0 if tied else info.nbytes
    dense = layout.dense.get(ref.name)
    compressed = scheme is not None and dense is None
    after = layout.nbytes(ref, binding.dtypes[parameter].itemsize) if compressed else before
    return Item(
        name=ref.name,
        role=ref.role,
        block=ref.block,
        stage=stage,
        shape=(ref.out_features, ref.in_features),
        dtype=str(info.dtype).removeprefix("torch."),
        bytes_before=before,
        bytes_after=after,
        scheme=scheme.label if scheme is not None and compressed else None,
        reason=dense or _reason(step, ref, scheme, tied),
    )


def _reason(step: QuantizeStep, ref: LinearRef, scheme: Scheme | None, tied: str | None) -> str:
    if scheme is None:
        shared = f"shares its storage with {tied}; " if tied else ""
        if not _targeted(step, ref):
            return f"{shared}not a target unless asked for"
        override = override_for(step, ref.name, ref.role, ref.block)
        if override is not None and override.skip:
            return f"{shared}skipped by the override {override.target}"
        return f"{shared}the group size does not divide its {ref.in_features} inputs"
    if step.group_size is None and scheme.group_size != 128:
        if scheme.group_size is None:
            return f"per channel: none of 128, 64, 32 divides its {ref.in_features} inputs"
        return f"groups of {scheme.group_size}: larger ones do not divide its {ref.in_features} inputs"
    return ""


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
