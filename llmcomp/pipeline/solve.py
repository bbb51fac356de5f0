"""One stage: linears that share an input, compressed from one set of statistics."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from llmcomp.building import build
from llmcomp.calibration.stats import InputStats
from llmcomp.formats import Layout
from llmcomp.methods import METHODS, SPARSE
from llmcomp.methods.retarget import retarget
from llmcomp.methods.solution import Solution, sampled_row_losses
from llmcomp.pipeline.assign import Task
from llmcomp.pipeline.beside import SourceStats
from llmcomp.pipeline.factored import factored
from llmcomp.pipeline.solved import Solved, method_config, method_has
from llmcomp.ranks import ALONE, World
from llmcomp.report.schema import LayerReport
from llmcomp.weights import QuantizedWeight, SparseWeight


def solve_stage(
    tasks: Sequence[Task], weights: Sequence[Tensor], stats: InputStats | None, options: Mapping[str, Any],
    world: World = ALONE, pruning: Mapping[str, Any] = MappingProxyType({}),
    factoring: Mapping[str, Any] = MappingProxyType({}), beside: SourceStats | None = None,
) -> list[Solved]:
    """Compress weights [out, in] that read the same input; those that are treated alike are stacked.

    Rows do not depend on each other once the statistics are known, so each rank solves an equal part of the stack
    (linears dealt whole would leave ranks idle: a stage often has one), and all get all of it. Where rows compete for
    what an unstructured pattern keeps, those of each rank do so by themselves.

    Args:
        options, pruning, factoring: settings of the methods that quantize, that remove weights, that make factors.
        beside: of the same input in the source model, where a task wants it.
    """
    tasks = [_affordable(task, stats) for task in tasks]
    if stats is not None and not stats.tokens:
        stats = None  # an expert that nothing has reached: no error to state either
    groups: dict[Any, list[int]] = {}
    results: list[Solved | None] = [None] * len(tasks)
    if beside is not None and beside.cross is not None and stats is not None and stats.gram is not None:
        cross, gram = beside.cross, stats.gram
        weights = [
            _aimed(task, weight, gram, cross, options) for task, weight in zip(tasks, weights, strict=True)
        ]
    low = [position for position, task in enumerate(tasks) if task.factoring is not None]
    if low:  # before a method may factorize the Gram matrix in place
        given = [(tasks[position], weights[position]) for position in low]
        for position, found in zip(low, factored(given, stats, beside, options, factoring, world), strict=True):
            results[position] = found
    for position, task in enumerate(tasks):
        if task.factoring is not None:
            continue
        alone = position if _competes(task) else None
        groups.setdefault((task.scheme, task.method, task.pruning, alone), []).append(position)
    for members in groups.values():
        began = time.perf_counter()
        rows = sum(weights[member].shape[0] for member in members)
        stacked = _stack([weights[member] for member in members], world.rows(rows))
        solution = _joined(_solution(tasks[members[0]], stacked, stats, options, pruning), rows, world)
        seconds = time.perf_counter() - began
        start = 0
        for member in members:
            stop = start + weights[member].shape[0]
            share = seconds * (stop - start) / rows
            results[member] = Solved(tasks[member], solution.rows(start, stop), share)
            start = stop
    return [result for result in results if result is not None]


def _aimed(task: Task, weight: Tensor, gram: Tensor, cross: Tensor, options: Mapping[str, Any]) -> Tensor:
    """What is solved for in the place of a weight behind compressed blocks."""
    if task.pruning is not None and task.pruning.update:
        return retarget(weight, gram, cross)
    if task.aim is not None:
        return task.aim(weight, gram, cross, _config(task, options))
    return weight


def _competes(task: Task) -> bool:
    """Whether rows of its weight compete for what is kept, so that another weight's must not join them."""
    pruning = task.pruning
    return pruning is not None and pruning.pattern.group is None and not SPARSE[pruning.method].by_row


def _solution(
    task: Task, weight: Tensor, stats: InputStats | None, options: Mapping[str, Any], pruning: Mapping[str, Any]
) -> Solution:
    """What the task's methods make of rows of a weight.

    SparseGPT and GPTQ are one sweep. After another method GPTQ rounds what that has left, under its mask and from the
    same statistics; what else rounds needs no mask, since zero lies on every grid.
    """
    if task.pruning is None:
        return _quantized(task, weight, stats, options)
    pattern, removing = task.pruning.pattern, SPARSE[task.pruning.method]
    if task.one_sweep:
        return _quantized(task, weight, stats, options, pattern=pattern)
    own = pruning if set(pruning) <= set(removing.config.__dataclass_fields__) else {}
    config = build(removing.config, dict(own), f"options of {task.pruning.method}")
    sparse = removing.function(weight, stats, pattern, weight.dtype, config)
    if task.scheme is None:
        return sparse
    left = sparse.weight
    assert isinstance(left, SparseWeight)  # as methods that remove weights give
    mask = {"pattern": pattern, "mask": left.mask} if task.method == "gptq" else {}
    found = _quantized(task, left.dense(), stats, options, **mask)
    rounded = found.weight
    assert isinstance(rounded, QuantizedWeight)  # as methods that quantize give
    errors, norms = sampled_row_losses(weight, rounded, stats)  # of the source's weight, not of what was left
    rounded = replace(rounded, pattern=pattern, mask=left.mask)
    return replace(found, weight=rounded, row_error=errors, row_norm=norms)


def _quantized(
    task: Task, weight: Tensor, stats: InputStats | None, options: Mapping[str, Any], **mask: Any
) -> Solution:
    config = _config(task, options)
    return METHODS[task.method].function(weight, stats, task.scheme, weight.dtype, config, **mask)


def _config(task: Task, options: Mapping[str, Any]) -> Any:
    return method_config(task.method, options if method_has(task.method, options) else {})


def _stack(weights: Sequence[Tensor], wanted: slice) -> Tensor:
    """Rows start..stop of weights [rows, in] that stand on each other."""
    parts, above = [], 0
    for weight in weights:
        part = weight[max(0, wanted.start - above) : max(0, wanted.stop - above)]
        above += weight.shape[0]
        if len(part):
            parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _joined(own: Solution, rows: int, world: World) -> Solution:
    """The solution of all rows, from each rank's."""

    def join(part: Tensor | None) -> Tensor | None:
        return None if part is None else world.join_rows(part, rows)

    weight = own.weight.by_rows(lambda part: world.join_rows(part, rows))
    return replace(own, weight=weight, row_error=join(own.row_error), row_norm=join(own.row_norm))


def _affordable(task: Task, stats: InputStats | None) -> Task:
    """The task, or a humbler method where too few tokens have reached an expert.

    With fewer tokens than columns the Gram matrix is singular, and GPTQ compensates along directions that the
    tokens happen to lack: on held-out inputs (tests/methods/test_few_tokens.py) a search that reads only the
    matrix as a weighting is better there, and GPTQ is better from one token a column on.
    """
    routed, width = task.ref.share < 1, task.ref.in_features
    if stats is None or not routed or not task.calibrated or stats.tokens >= width:
        return task
    clipped, masked, low = ("rtn-clip", "wanda", "asvd") if stats.tokens else ("rtn", "magnitude", "svd")
    humbler = task
    if task.factoring is not None and task.factoring.bits is None and task.factoring.method != "svd":
        humbler = replace(task, factoring=replace(task.factoring, method=low))
    if task.pruning is not None and task.pruning.method not in ("magnitude", masked):
        humbler = replace(task, pruning=replace(task.pruning, method=masked))
    if task.scheme is None:
        removing = humbler.pruning or humbler.factoring
        assert removing is not None  # a task does something
        humbler = replace(humbler, method=removing.method)
    elif METHODS[task.method].calibrated:
        humbler = replace(humbler, method=clipped)
    if humbler == task:
        return task
    why = f"{stats.tokens} calibration tokens reached this expert, fewer than its width {width}: {humbler.methods}"
    return replace(humbler, fallback="; ".join(filter(None, (task.fallback, why))))


def layer_report(solved: Solved, layout: Layout, itemsize: int, scaling: str | None = None) -> LayerReport:
    """The report's line of a solved linear.

    Args:
        itemsize: bytes of one value of the source's weight. scaling: what is said of its inputs' scale.
    """
    ref, solution = solved.task.ref, solved.solution
    error = None
    if solution.row_error is not None and solution.row_norm is not None:
        norm = float(solution.row_norm.nansum())
        error = float(solution.row_error.nansum()) / norm if norm > 0 else 0.0
    stored_dense = ref.name in layout.dense
    reasons = [solved.task.fallback, solution.fallback]
    return LayerReport(
        name=ref.name,
        block=ref.block,
        role=ref.role,
        shape=(ref.out_features, ref.in_features),
        scheme=solved.task.label + (" stored dense" if stored_dense else ""),
        method=solved.task.methods,
        bytes_before=ref.weights * itemsize,
        bytes_after=layout.nbytes(ref, itemsize),
        error=error,
        damping=solution.damping,
        fallback="; ".join(reason for reason in reasons if reason) or None,
        seconds=solved.seconds,
        dead_columns=solution.dead_columns,
        scaling=scaling,
        block_error_start=None if solved.learned is None else solved.learned[0],
        block_error=None if solved.learned is None else solved.learned[1],
    )
