"""Which linear loses which weights, alone or before it is quantized: the steps of a recipe met with a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from llmcomp.adapters.base import Adapter, LinearRef
from llmcomp.errors import BadRecipe
from llmcomp.methods import METHODS, SPARSE
from llmcomp.patterns import Pattern
from llmcomp.pipeline.assign import (
    Assignment,
    Pruning,
    Task,
    alone,
    assign,
    left_out,
    unknown,
    why_not_updated,
)
from llmcomp.pipeline.factorizing import Ranks, with_factors
from llmcomp.recipe import FactorizeStep, QuantizeStep, SparsifyStep, TargetedStep, override_for, pattern_for

# {linear: share of its weights that is removed}, as measured on the source model.
Sparsities = Mapping[str, float]


def shares_removal(step: SparsifyStep, ref: LinearRef) -> bool:
    """Whether what is removed of a linear is its part of a common budget: it has no pattern or sparsity of its own."""
    override = override_for(step, ref.name, ref.role, ref.block)
    return step.allocate and (override is None or (override.pattern is None and override.sparsity is None))


def assign_steps(
    adapter: Adapter, steps: Sequence[TargetedStep], ranks: Ranks = MappingProxyType({}),
    sparsities: Sparsities = MappingProxyType({}),
) -> Assignment:
    """What all steps of a recipe do to each linear.

    Args:
        ranks: of factors, sparsities: of unstructured patterns, where they were shared out.

    Raises:
        BadRecipe: a step that does not fit, or two that exclude each other on a linear.
    """
    if not steps:
        return Assignment({}, dict(adapter.uncompressed))
    others = [step for step in steps if not isinstance(step, FactorizeStep)]
    if len(others) < len(steps):
        return with_factors(adapter, steps, ranks)
    if len(others) == 1:
        return _one(adapter, others[0], sparsities)
    pruned, quantized = (_one(adapter, alone(step), sparsities) for step in others)
    tasks = {ref.name: _both(pruned.tasks.get(ref.name), quantized.tasks.get(ref.name)) for ref in adapter.refs}
    done = {name: task for name, task in tasks.items() if task is not None}
    if steps[0].options and any(task.one_sweep for task in done.values()):
        said = ", ".join(steps[0].options)
        raise BadRecipe(
            f"SparseGPT and GPTQ are one sweep, which GPTQ's settings govern; give {said} as options of the step to "
            "quantize."
        )
    return Assignment(done, {name: why for name, why in quantized.left.items() if name not in done})


def _one(adapter: Adapter, step: QuantizeStep | SparsifyStep, sparsities: Sparsities) -> Assignment:
    return assign(adapter, step) if isinstance(step, QuantizeStep) else _sparse(adapter, step, sparsities)


def _both(pruned: Task | None, quantized: Task | None) -> Task | None:
    if pruned is None or quantized is None:
        return pruned or quantized
    method = METHODS[quantized.method]
    if method.tune is not None or (method.factorizes and quantized.method != "gptq"):
        raise BadRecipe(
            f"{quantized.method} would move removed weights from zero; after sparsifying take gptq, awq, rtn-clip or "
            "rtn."
        )
    if quantized.scale is not None and pruned.pruning is not None and pruned.pruning.update:
        raise BadRecipe(
            f"{quantized.method} scales inputs that an update has to find as they are; after 'update: true' take gptq, "
            "rtn-clip or rtn."
        )
    fallback = "; ".join(filter(None, (pruned.fallback, quantized.fallback)))
    return replace(quantized, pruning=pruned.pruning, fallback=fallback or None)


def _sparse(adapter: Adapter, step: SparsifyStep, sparsities: Sparsities) -> Assignment:
    """Resolve targets, overrides and patterns.

    Raises:
        BadRecipe: an unknown method, a target or override that matches nothing, nothing to do, embeddings, or a pattern
            that does not divide a width. All problems are said at once.
    """
    problems = unknown(adapter, step, tuple(SPARSE))
    misfits: dict[str, list[int]] = {}
    tasks: dict[str, Task] = {}
    left = dict(adapter.uncompressed)
    repeated = any(block.applications > 1 for block in adapter.blocks)
    for ref in adapter.refs:
        if (why := left_out(step, ref)) is not None:
            left[ref.name] = why
        elif (task := _task(ref, step, problems, misfits, sparsities.get(ref.name))) is not None:
            tasks[ref.name] = updated(task, repeated) if step.update else task
    problems += [
        f"--pattern {label} does not divide the widths {sorted(set(widths))} of {len(widths)} weights; take a pattern "
        "whose M divides them, or unstructured, or skip them"
        for label, widths in misfits.items()
    ]
    if step.allocate and repeated:
        problems.append(
            "this model runs one block several times, so nothing says what removing costs in each of them; leave "
            "--allocate out"
        )
    if not tasks and not problems:
        problems.append("the recipe's targets and overrides leave nothing to sparsify")
    if problems:
        raise BadRecipe(f"The recipe does not fit {adapter.architecture}: {'; '.join(problems)}.")
    return Assignment(tasks, left)


def updated(task: Task, repeated: bool) -> Task:
    """The task that aims at the source's outputs, or says why it does not.

    Args:
        repeated: the model runs a block several times.
    """
    assert task.pruning is not None
    if (why := why_not_updated(task.ref, repeated)) is not None:
        return replace(task, fallback=why)
    return replace(task, pruning=replace(task.pruning, update=True))


def _task(
    ref: LinearRef, step: SparsifyStep, problems: list[str], misfits: dict[str, list[int]], shared: float | None
) -> Task | None:
    """The task of one linear; None where the recipe cannot be right, with `problems` saying why.

    Args:
        misfits: {pattern: widths that it does not divide}, which this adds to. shared: its part of a common budget.
    """
    override = override_for(step, ref.name, ref.role, ref.block)
    method = override.method if override is not None and override.method is not None else step.method
    if method not in SPARSE:
        return None
    if ref.role == "embeddings":
        said = "embeddings are looked up row by row, so no input says which of their weights matter"
        problems += [] if said in problems else [said]
        return None
    # Which can be, or `recipe.check` has said why not.
    pattern = pattern_for(step, override) if shared is None else Pattern(removed=shared)
    if not pattern.fits(ref.in_features):
        misfits.setdefault(pattern.label, []).append(ref.in_features)
        return None
    return Task(ref, None, method, pruning=Pruning(pattern, method))
