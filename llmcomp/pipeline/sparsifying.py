"""Which linear loses which weights, alone or before it is quantized: the steps of a recipe met with a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmcomp.adapters.base import Adapter, LinearRef
from llmcomp.errors import BadRecipe
from llmcomp.methods import METHODS, SPARSE
from llmcomp.pipeline.assign import Assignment, Pruning, Task, assign, left_out, unknown
from llmcomp.recipe import QuantizeStep, SparsifyStep, Step, override_for, pattern_for


def assign_steps(adapter: Adapter, steps: Sequence[Step]) -> Assignment:
    """What all steps of a recipe do to each linear.

    Raises:
        BadRecipe: a step that does not fit, or two that exclude each other on a linear.
    """
    made = [assign(adapter, step) if isinstance(step, QuantizeStep) else _sparse(adapter, step) for step in steps]
    if len(made) == 1:
        return made[0]
    pruned, quantized = made
    tasks = {ref.name: _both(pruned.tasks.get(ref.name), quantized.tasks.get(ref.name)) for ref in adapter.refs}
    done = {name: task for name, task in tasks.items() if task is not None}
    return Assignment(done, {name: why for name, why in quantized.left.items() if name not in done})


def _both(pruned: Task | None, quantized: Task | None) -> Task | None:
    if pruned is None or quantized is None:
        return pruned or quantized
    method = METHODS[quantized.method]
    if method.tune is not None or (method.factorizes and quantized.method != "gptq"):
        raise BadRecipe(f"{quantized.method} would move removed weights from zero; after sparsifying take gptq or awq.")
    return replace(quantized, pruning=pruned.pruning)


def _sparse(adapter: Adapter, step: SparsifyStep) -> Assignment:
    """Resolve targets, overrides and patterns.

    Raises:
        BadRecipe: an unknown method, a target or override that matches nothing, nothing to do, embeddings, or a pattern
            that does not divide a width. All problems are said at once.
    """
    problems = unknown(adapter, step, tuple(SPARSE))
    tasks: dict[str, Task] = {}
    left = dict(adapter.uncompressed)
    for ref in adapter.refs:
        if (why := left_out(step, ref)) is not None:
            left[ref.name] = why
        elif (task := _task(ref, step, problems)) is not None:
            tasks[ref.name] = task
    if not tasks and not problems:
        problems.append("the recipe's targets and overrides leave nothing to sparsify")
    if problems:
        raise BadRecipe(f"The recipe does not fit {adapter.architecture}: {'; '.join(problems)}.")
    return Assignment(tasks, left)


def _task(ref: LinearRef, step: SparsifyStep, problems: list[str]) -> Task | None:
    """The task of one linear; None where the recipe cannot be right, with `problems` saying why."""
    override = override_for(step, ref.name, ref.role, ref.block)
    method = override.method if override is not None and override.method is not None else step.method
    if method not in SPARSE:
        return None
    if ref.role == "embeddings":
        problems.append("embeddings are looked up row by row, so no input says which of their weights matter")
        return None
    try:
        pattern = pattern_for(step, override)
        pattern.check_width(ref.in_features, ref.name)
    except BadRecipe as error:
        said = str(error).removesuffix(".")
        if said not in problems:
            problems.append(said)
        return None
    return Task(ref, None, method, pruning=Pruning(pattern, method))
