"""One stage: linears that share an input, compressed from one set of statistics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.formats import Layout
from llmcomp.methods import METHODS
from llmcomp.methods.solution import Solution
from llmcomp.pipeline.assign import Task
from llmcomp.ranks import ALONE, World
from llmcomp.recipe import build
from llmcomp.report.schema import LayerReport


@dataclass(frozen=True)
class Solved:
    """A task, its solution and its share of the time in seconds. `learned`: the error of the block's output before
    and after its weights were tuned together, of the output's energy; None where they were not."""

    task: Task
    solution: Solution
    seconds: float
    learned: tuple[float, float] | None = None


def method_config(method: str, options: dict[str, Any]) -> Any:
    """The method's own config from a recipe's options.

    Raises:
        BadRecipe: an option that the method does not have.
    """
    return build(METHODS[method].config, options, f"options of {method}")


def solve_stage(
    tasks: Sequence[Task], weights: Sequence[Tensor], stats: InputStats | None, options: dict[str, Any],
    world: World = ALONE,
) -> list[Solved]:
    """Compress weights [out, in] that read the same input; those alike in scheme and method are stacked.

    Rows do not depend on each other once the statistics are known, so each rank solves an equal part of the stack
    (linears dealt whole would leave ranks idle: a stage often has one), and all get all of it.
    """
    tasks = [_affordable(task, stats) for task in tasks]
    if stats is not None and not stats.tokens:
        stats = None  # an expert that nothing has reached: no error to state either
    groups: dict[tuple[Any, str], list[int]] = {}
    for position, task in enumerate(tasks):
        groups.setdefault((task.scheme, task.method), []).append(position)
    results: list[Solved | None] = [None] * len(tasks)
    for (scheme, method), members in groups.items():
        began = time.perf_counter()
        rows = sum(weights[member].shape[0] for member in members)
        stacked = _stack([weights[member] for member in members], world.rows(rows))
        entry = METHODS[method]
        config = method_config(method, options if method_has(method, options) else {})
        solution = _joined(entry.function(stacked, stats, scheme, stacked.dtype, config), rows, world)
        seconds = time.perf_counter() - began
        start = 0
        for member in members:
            stop = start + weights[member].shape[0]
            share = seconds * (stop - start) / rows
            results[member] = Solved(tasks[member], solution.rows(start, stop), share)
            start = stop
    return [result for result in results if result is not None]


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
    if stats is None or not routed or not METHODS[task.method].calibrated or stats.tokens >= width:
        return task
    method = "rtn-clip" if stats.tokens else "rtn"
    if method == task.method:
        return task
    why = f"{stats.tokens} calibration tokens reached this expert, fewer than its width {width}: {method}"
    return replace(task, method=method, fallback="; ".join(filter(None, (task.fallback, why))))


def method_has(method: str, options: dict[str, Any]) -> bool:
    """Whether the options are this method's: those of a step's main method do not reach an override's."""
    return set(options) <= set(METHODS[method].config.__dataclass_fields__)


def layer_report(solved: Solved, layout: Layout, itemsize: int, scaling: str | None = None) -> LayerReport:
    """The report's line of a solved linear.

    Args:
        itemsize: bytes of one value of the source's weight. scaling: what is said of its inputs' scale.
    """
    ref, solution, scheme = solved.task.ref, solved.solution, solved.task.scheme
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
        scheme=scheme.label + (" stored dense" if stored_dense else ""),
        method=solved.task.method,
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
