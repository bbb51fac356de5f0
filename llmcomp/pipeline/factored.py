"""Factors of linears that share an input, from one set of statistics: floating, in integers, or correcting integers.

All factors are made, and fitted to the inputs of now, before any is rounded: a method that rounds may factorize the
Gram matrix in place, and the fit reads the matrix.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmcomp.building import build
from llmcomp.calibration.stats import InputStats
from llmcomp.methods import LOW_RANK, METHODS
from llmcomp.methods.factors import CorrectionConfig, correct, quantize_factors
from llmcomp.methods.lowrank import refit, refit_losses
from llmcomp.methods.solution import Solution
from llmcomp.pipeline.assign import Task
from llmcomp.pipeline.beside import SourceStats
from llmcomp.pipeline.solved import Solved, method_config, method_has
from llmcomp.ranks import World
from llmcomp.weights import LowRankWeight, QuantizedWeight


def factored(
    given: Sequence[tuple[Task, Tensor]], stats: InputStats | None, beside: SourceStats | None,
    options: Mapping[str, Any], settings: Mapping[str, Any], world: World,
) -> list[Solved]:
    """What becomes of weights [out, in] that read the same input, each by itself.

    Rows of a factorization are not independent, so every rank makes all of it, and that of the first one counts.

    Args:
        stats: of the input now. beside: of the input in the source model, where a task wants it.
        options, settings: of the methods that quantize and that make factors.
    """
    starts = []
    for task, weight in given:
        began = time.perf_counter()
        start = None if task.factoring is None or task.factoring.bits else _start(task, weight, stats, beside, settings)
        starts.append((start, time.perf_counter() - began))
    found = []
    for (task, weight), (start, seconds) in zip(given, starts, strict=True):
        began = time.perf_counter()
        if start is None:
            solution = _corrected(task, weight, stats, options, settings)
        elif task.scheme is not None:
            solution = _in_integers(task, weight, start, stats, options)
        else:
            low = _low(start)
            assert isinstance(low.left, Tensor) and isinstance(low.right, Tensor)  # not rounded yet
            low = LowRankWeight(low.left.to(weight.dtype), low.right.to(weight.dtype))
            solution = replace(start, weight=low)
        if start is not None and _updated(task, beside) and beside is not None and beside.cross is not None:
            assert stats is not None  # what is read now
            losses = refit_losses(weight, _low(solution), beside.inputs, beside.cross, stats)
            solution = replace(solution, row_error=losses[0], row_norm=losses[1])
        seconds += time.perf_counter() - began
        found.append(Solved(task, _of_first(solution, world), seconds))
    return found


def _start(
    task: Task, weight: Tensor, stats: InputStats | None, beside: SourceStats | None, settings: Mapping[str, Any]
) -> Solution:
    """Floating factors: the best ones for the source's inputs, one of them fitted to those of now."""
    factoring = task.factoring
    assert factoring is not None
    method = LOW_RANK[factoring.method]
    own = settings if set(settings) <= set(method.config.__dataclass_fields__) else {}
    config = build(method.config, dict(own), f"options of {factoring.method}")
    seen = stats if beside is None or not factoring.source else beside.inputs
    changed = _updated(task, beside) or task.scheme is not None
    dtype = torch.float64 if changed else weight.dtype  # rounded once, at the end
    solution = method.function(weight, seen, factoring.rank, dtype, config)
    if not _updated(task, beside):
        return solution
    assert beside is not None and beside.cross is not None and stats is not None and stats.gram is not None
    fitted = refit(weight, _low(solution), stats.gram, beside.cross, fixed="left")
    return replace(solution, weight=fitted)


def _updated(task: Task, beside: SourceStats | None) -> bool:
    return task.factoring is not None and task.factoring.update and beside is not None


def _in_integers(
    task: Task, weight: Tensor, start: Solution, stats: InputStats | None, options: Mapping[str, Any]
) -> Solution:
    """Both factors rounded. What an update has made of them is what the integers stand for: the source's weight is not
    what suits the inputs of now."""
    kind, low = task.kind, _low(start)
    left, right = getattr(kind, "left", None), getattr(kind, "right", None)
    assert left is not None and right is not None and task.factoring is not None
    target = low.dense().float() if task.factoring.update else weight
    turn = METHODS[task.method].factorizes
    quantizer = _quantizer(task, options)
    return quantize_factors(target, low, stats, (left, right), weight.dtype, quantizer, turn=turn)


def _corrected(
    task: Task, weight: Tensor, stats: InputStats | None, options: Mapping[str, Any], settings: Mapping[str, Any]
) -> Solution:
    """Integers, and factors for what they have lost."""
    assert task.factoring is not None and task.scheme is not None
    rounded = _quantizer(task, options)(weight, stats, task.scheme, weight.dtype)
    base = rounded.weight
    assert isinstance(base, QuantizedWeight)  # as methods that quantize give
    config = build(CorrectionConfig, dict(settings), "options of the step to factorize")
    found = correct(weight, base, stats, task.factoring.rank, weight.dtype, config)
    return replace(found, damping=rounded.damping, fallback=rounded.fallback)


def _quantizer(task: Task, options: Mapping[str, Any]) -> Callable[..., Solution]:
    config = method_config(task.method, options if method_has(task.method, options) else {})

    def quantize(weight: Tensor, stats: InputStats | None, scheme: Any, dtype: torch.dtype) -> Solution:
        return METHODS[task.method].function(weight, stats, scheme, dtype, config)

    return quantize


def _low(solution: Solution) -> LowRankWeight:
    assert isinstance(solution.weight, LowRankWeight)  # as methods of low rank give
    return solution.weight


def _of_first(solution: Solution, world: World) -> Solution:
    """The solution of rank 0."""

    def told(part: Any) -> Any:
        if part is None:
            return None
        return world.from_first(part) if isinstance(part, Tensor) else part.by_rows(world.from_first)

    low = _low(solution)
    low = replace(low, left=told(low.left), right=told(low.right), base=told(low.base))
    return replace(solution, weight=low, row_error=told(solution.row_error), row_norm=told(solution.row_norm))
