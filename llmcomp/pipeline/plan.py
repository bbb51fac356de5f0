"""What a run would need and give, from config.json alone: bytes after, peak memory, disk, time."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmcomp.adapters.base import Adapter
from llmcomp.errors import BadRecipe
from llmcomp.feeds import encoder_decoder
from llmcomp.methods import METHODS
from llmcomp.pipeline.footprint import converting, footprint
from llmcomp.pipeline.job import Plan, plan_recipe
from llmcomp.pipeline.pruning_cost import pruning_footprint, pruning_seconds
from llmcomp.pipeline.terms import Lanes, MemoryTerms
from llmcomp.pipeline.timing import Rates, measure_rates, seconds
from llmcomp.pipeline.waiting import Look
from llmcomp.recipe import Calibration, FactorizeStep, PruneStep, QuantizeStep, Recipe, pattern_for
from llmcomp.schemes import INT8_STATIC

# What a shard's header says of a tensor beside its name, shape and offsets.
_EMPTY: dict[str, Any] = {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}


@dataclass(frozen=True)
class Row:
    """What one method at one width would cost.

    Attributes:
        bits: of the step that quantizes, None without one; overrides keep their own.
        bytes_after: weight files with their headers.
        peak_memory: anonymous resident bytes of compressing and saving over those after imports, of each rank.
        moment, terms: when the peak is, and of what it is made.
        disk: bytes that the output's disk must have free: output, and spilled activations while it runs.
        spilled: activations beyond `--activation-memory`, in mapped files.
        seconds: of compressing and saving, good to a factor of two, if each rank is as fast as this process.
        statistics: inputs whose Gram matrices are gathered. passes: how often each window is computed for them: once
            more where the source model's activations go beside (`beside`), where something is shared out beforehand
            (`shared`, and what) or blocks are measured, and where a smaller model is made first.
        fallbacks: {module name: what is done instead of what was asked}.
        asked: whether this is what the recipe says, as opposed to an alternative.
        prunes: whether a smaller model is made first, by what calibration reads.
    """

    method: str
    bits: int | None
    bytes_after: int
    peak_memory: int
    moment: str
    terms: MemoryTerms
    disk: int
    spilled: int
    seconds: float
    statistics: int
    fallbacks: dict[str, str]
    asked: bool
    passes: int = 1
    beside: bool = False
    shared: str | None = None
    prunes: bool = False


@dataclass(frozen=True)
class Prospect:
    """A model and what could be made of it.

    Attributes:
        dtype: of the weights, as the config says.
        bytes_before: of the tensors as the config describes them, a shared one counted once.
        windows, length: of calibration. rows: alternatives, the recipe's own first.
        ranks: processes that share the work.
        notes: what the user should know, one sentence each.
    """

    architecture: str
    task: str
    dtype: str
    parameters: int
    bytes_before: int
    windows: int
    length: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    ranks: int = 1


def prospect(
    adapter: Adapter, recipe: Recipe, bits: Sequence[int], activation_memory: int, max_length: int | None = None,
    ranks: int = 1,
) -> Prospect:
    """The recipe, and all methods at `bits`, side by side.

    Args:
        adapter: of a skeleton; no weights are read.
        bits: widths to show.
        activation_memory: bytes, as `RunOptions`.
        max_length: the model's positions; longer windows are clipped.
        ranks: processes that share the work.

    Raises:
        BadRecipe: the recipe does not fit the model, or the ranks.
    """
    calibration = recipe.calibration
    length = adapter.sample_tokens or min(calibration.sequence_length, max_length or calibration.sequence_length)
    calibration = Calibration(calibration.source, calibration.samples, length)
    dtype = adapter.model.dtype
    assert isinstance(dtype, torch.dtype)
    rates = measure_rates(dtype)
    look = Look(adapter)
    own = row(adapter, recipe, calibration, activation_memory, rates, look, ranks)
    rows, planned = [own], plan_recipe(recipe, adapter)
    _check_ranks(recipe, planned, ranks)
    unfit: dict[str, str] = {}
    step = recipe.quantizing
    for width in () if step is None or planned.whole or len(recipe.steps) > 1 else bits:  # there is nothing to choose
        for method, entry in METHODS.items():
            assert step is not None  # else there is no width
            possible = entry.calibrated or step.activations != INT8_STATIC
            if possible and (method, width) != (own.method, step.bits):
                options = step.options if method == own.method else {}
                other = replace(recipe, steps=(replace(step, method=method, bits=width, options=options),))
                try:
                    found = row(adapter, other, calibration, activation_memory, rates, look, ranks)
                except BadRecipe as error:  # the recipe's own row was made, so it is the method that does not fit
                    unfit.setdefault(method, str(error))
                    continue
                rows.append(replace(found, asked=False))
    before, parameters = _before(adapter)
    notes = [*planned.layout.notes, *(f"No row for {method}: {why}" for method, why in unfit.items())]
    if adapter.sample_tokens is None and length < recipe.calibration.sequence_length:
        notes.append(f"Windows are cut at {length} tokens, the most that the model reads.")
    if adapter.trace_problem is not None:
        notes.append("Its forward could not be followed without weights, so memory is a rougher guess here.")
    return Prospect(
        architecture=adapter.architecture,
        task=adapter.task,
        dtype=str(dtype).removeprefix("torch."),
        parameters=parameters,
        bytes_before=before,
        windows=calibration.samples,
        length=length,
        rows=tuple(rows),
        notes=tuple(notes),
        ranks=ranks,
    )


def _check_ranks(recipe: Recipe, plan: Plan, ranks: int) -> None:
    if plan.whole and ranks > 1:
        raise BadRecipe(f"--format {recipe.format} is made in one process; plan it without --ranks.")
    if plan.assignment.calibrated and recipe.calibration.samples < ranks:
        raise BadRecipe(
            f"{recipe.calibration.samples} calibration windows cannot feed {ranks} ranks: give more by --samples, or "
            "fewer --ranks."
        )


def row(
    adapter: Adapter, recipe: Recipe, calibration: Calibration, activation_memory: int, rates: Rates,
    look: Look, ranks: int = 1,
) -> Row:
    """What one recipe would cost.

    Raises:
        BadRecipe: it does not fit the model.
    """
    plan, step = plan_recipe(recipe, adapter), recipe.quantizing
    lanes = Lanes.of(calibration.samples, calibration.sequence_length, ranks, tokens=plan.tokens_per_batch)
    if encoder_decoder(adapter.model) and adapter.sample_tokens is None:
        lanes = replace(lanes, length=-(-lanes.length // 2))  # a window is read by two chains, half by each
    budget, tokens, pruning, smaller = activation_memory, calibration.samples * lanes.length, 0.0, 0
    found = None
    if plan.reduction is not None:
        if ranks > 1:
            raise BadRecipe("A model is pruned in one process; plan it without --ranks.")
        found = pruning_footprint(plan, plan.reduction, lanes, budget, look)
        pruning = pruning_seconds(plan.reduction, tokens, lanes.count, rates)
        adapter = plan.adapter
        look, (smaller, _) = Look(adapter), _before(adapter)
    after = bytes_after(adapter, plan)
    rest = converting(adapter, plan, after) if plan.whole else footprint(adapter, plan, lanes, budget, look)
    found = rest if found is None or rest.terms.total > found.terms.total else found
    after += header_bytes(adapter, plan)
    tasks = plan.assignment.tasks
    fallbacks = {name: task.fallback for name, task in tasks.items() if task.fallback}
    fallbacks |= {name: f"stored dense: {why}" for name, why in plan.layout.dense.items()}
    calibrated = {name for name, task in tasks.items() if task.calibrated}
    stages = [stage for block in adapter.blocks for stage in block.stages]
    passes = sum(any(ref.name in calibrated for ref in stage) for stage in stages) + _cuts(plan)
    if adapter.head is not None and adapter.head.name in calibrated:
        passes += 1
    return Row(
        method=_method(recipe, plan),
        bits=None if step is None else step.bits,
        bytes_after=after,
        peak_memory=found.terms.total,
        moment=found.moment,
        terms=found.terms,
        disk=after + smaller + found.spilled,
        spilled=found.spilled,
        seconds=pruning + seconds(adapter, plan, tokens, lanes.count, rates, calibration.sequence_length, ranks),
        statistics=passes,
        fallbacks=fallbacks,
        asked=True,
        passes=_passes(plan),
        beside=plan.assignment.beside,
        shared=plan.shared if plan.assignment.calibrated else None,
        prunes=plan.reduction is not None and plan.reduction.calibrated,
    )


def _cuts(plan: Plan) -> int:
    """Output projections whose inputs a step to prune reads."""
    reduction = plan.reduction
    return reduction.blocks * len(reduction.keep) if reduction is not None and reduction.calibrated else 0


def _passes(plan: Plan) -> int:
    """How often each calibration window is computed."""
    own = 1 + plan.assignment.beside + (plan.shared is not None and plan.assignment.calibrated)
    reduction = plan.reduction
    if reduction is None or not reduction.calibrated:
        return own
    # For gradients blocks are computed on both ways.
    looks = 2 if reduction.taylor else int(reduction.blocks < len(reduction.source.blocks))
    return looks + bool(reduction.keep) + own * plan.assignment.calibrated


def _method(recipe: Recipe, plan: Plan) -> str:
    """The methods of the recipe's steps; for `auto` what it takes at the step's width."""
    said = []
    for step in recipe.steps:
        method = step.method
        if isinstance(step, QuantizeStep):
            found = (task.method for task in plan.assignment.tasks.values() if task.bits == step.bits)
            said.append(next(found, method) if method == "auto" else method)
        elif isinstance(step, FactorizeStep | PruneStep):
            said.append(f"{method} {step.amount}")
        else:
            said.append(f"{method} {pattern_for(step, None).label}" + (" allocated" if step.allocate else ""))
    return " + ".join(said)


def bytes_needed(plan: Plan, stored: Collection[str]) -> int:
    """Bytes that the output's disk must have free: the checkpoint beside the one that it may replace, and the smaller
    model that steps behind one that prunes read.

    Args:
        stored: names that the source holds.
    """
    state = _written(plan.adapter, plan, stored).values() if plan.reduction is not None else ()
    return 2 * bytes_after(plan.adapter, plan, stored) + sum(one.numel() * one.element_size() for one in state)


def bytes_after(adapter: Adapter, plan: Plan, stored: Collection[str] | None = None) -> int:
    """Bytes of the compressed checkpoint's tensors, without headers.

    Args:
        stored: names that the source holds (`Binding.key_of`); None: all that the model has.
    """
    total, tasks = 0, plan.assignment.tasks
    for name, tensor in _written(adapter, plan, stored).items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in tasks:
            total += plan.layout.nbytes(tasks[module].ref, tensor.element_size())
        else:
            total += tensor.numel() * tensor.element_size()
    return total


def header_bytes(adapter: Adapter, plan: Plan) -> int:
    """Bytes of the shards' headers, one shard a block: in a model of a few megabytes they count."""
    tasks, shards = plan.assignment.tasks, dict[int | None, dict[str, Any]]()
    alike: dict[tuple[Any, ...], tuple[str, dict[str, Tensor]]] = {}
    for name, tensor in _written(adapter, plan, None).items():
        module, _, leaf = name.rpartition(".")
        entries = {name: tensor}
        if leaf == "weight" and module in tasks:
            ref = tasks[module].ref
            kind = (tuple(tensor.shape), ref.role, tasks[module].kind, module in plan.layout.dense, tensor.dtype)
            if kind not in alike:
                alike[kind] = module, plan.layout.blank(ref, tasks[module].kind, tensor.dtype)
            first, found = alike[kind]
            entries = {module + own.removeprefix(first): value for own, value in found.items()}
        shard = shards.setdefault(adapter.block_of(name), {"__metadata__": {"format": "pt"}})
        for key, value in entries.items():
            offset = value.numel() * value.element_size() * max(1, len(shard) // 2)
            shard[key] = {**_EMPTY, "shape": list(value.shape), "data_offsets": [offset, offset]}
    return sum(8 + len(json.dumps(shard, separators=(",", ":"))) + 4 for shard in shards.values())


def _written(adapter: Adapter, plan: Plan, stored: Collection[str] | None) -> dict[str, Tensor]:
    """The model's tensors that get a place of their own in the output."""
    state = adapter.model.state_dict()
    wanted = state if stored is None else stored
    return {name: value for name, value in state.items() if name in wanted and name not in plan.ties}


def _before(adapter: Adapter) -> tuple[int, int]:
    """Bytes of the tensors, and how many parameters; what is tied counts once."""
    state = {name: value for name, value in adapter.model.state_dict().items() if name not in adapter.ties}
    parameters = {name for name, _ in adapter.model.named_parameters(remove_duplicate=False)}
    return (
        sum(value.numel() * value.element_size() for value in state.values()),
        sum(value.numel() for name, value in state.items() if name in parameters),
    )
