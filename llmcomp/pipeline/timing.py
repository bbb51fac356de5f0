"""How long a run will take: operation counts over rates that this machine shows in half a second.

An estimate, good to a factor of two: other programs, a disk that is slow, and small models (whose time goes
into Python) all change it. Compressing and saving only; verification and evaluation come on top.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llmcomp.adapters.base import Adapter, Block
from llmcomp.matmul import WideProducts, fast_matmul
from llmcomp.methods import SPARSE
from llmcomp.methods._grid import SEARCH
from llmcomp.pipeline.assign import Task
from llmcomp.pipeline.job import Plan
from llmcomp.pipeline.solved import method_config, method_has

_SIZE = 1024  # of the matrices that are multiplied to see how fast
_ELEMENTS = 1 << 17  # of the chunk that is rounded to see how fast
_BUDGET = 0.15  # seconds for each rate
_COLUMN_PASSES = 12  # elementwise operations of the sweep on each weight
_SEARCH_PASSES = 6  # elementwise operations of one candidate scale on each weight
_EIGENVECTORS = 9  # operations on a symmetric matrix, times its side cubed
_LEARNING_FORWARDS = 2  # passes over all tokens: the target, and four losses over a quarter of them
_LEARNING_PASSES = 25  # elementwise operations of a step on each weight
STORED_BYTES = 4e8  # a second: packing, two digests, writing and syncing
_LINK = 1e9  # bytes a second between ranks: gloo within a host, or a network of 10 Gbit/s
LANE_STOP = 0.002  # seconds: a greenlet's way to its next stop, with the Python of the model between


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second: `forward` and `exact` floating-point operations of matrix products
    in the model's dtype and in float32 (`fast_matmul`); `elements`: elementwise operations in cache."""

    forward: float
    exact: float
    elements: float


def measure_rates(dtype: torch.dtype) -> Rates:
    """Time three small kernels with the threads that torch has; under a second."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(_SIZE, _SIZE, generator=generator)
    narrow = exact.to(dtype)
    flat = torch.randn(_ELEMENTS, generator=generator)
    with torch.no_grad():
        with WideProducts():
            forward = _rate(lambda: F.linear(narrow, narrow))
        with fast_matmul():
            full = _rate(lambda: exact @ exact)
        rounding = _rate(lambda: flat.mul(3.0).round_())
    operations = 2.0 * _SIZE**3
    return Rates(operations * forward, operations * full, 2.0 * _ELEMENTS * rounding)


def seconds(
    adapter: Adapter, plan: Plan, tokens: int, lanes: int, rates: Rates, length: int = 512, ranks: int = 1
) -> float:
    """Time to compress and save.

    Args:
        tokens: of calibration, in all.
        lanes: batches they come in, on each rank. length: tokens of a window.
        ranks: processes that share the work, each as fast as this one; the first one alone saves.
    """
    tasks, total, share = plan.assignment.tasks, 0.0, tokens / ranks
    calibrated = plan.assignment.calibrated
    for block in adapter.blocks:
        if calibrated:
            # Each linear is computed once for each window (`calibration.capture`); where a block runs several
            # times, once for each run, and as often before it is solved.
            runs = 1 if block.applications == 1 else 2 * block.applications
            runs += plan.assignment.beside + (plan.shared is not None)
            total += runs * 2.0 * share * sum(ref.weights * ref.share for ref in block.linears) / rates.forward
            total += runs * LANE_STOP * lanes * (1 + len(block.stages))
        total += _learning(block, plan, share, max(length, share / max(1, lanes)), length / ranks, rates)
        for stage in block.stages:
            wanted = [tasks[ref.name] for ref in stage if ref.name in tasks]
            if wanted:
                solving = _stage(wanted, plan, block.applications * share if calibrated else 0, rates, ranks)
                # Some rows at several sparsities take about as long as all rows at one.
                total += solving * (2 if plan.shared == "sparsity" else 1)
    for ref in (adapter.embeddings, adapter.head):
        if ref is not None and ref.name in tasks:
            task = tasks[ref.name]
            total += _stage([task], plan, share if task.calibrated else 0, rates, ranks)
    state = adapter.model.state_dict()
    return total + sum(value.numel() * value.element_size() for value in state.values()) / STORED_BYTES


def _learning(block: Block, plan: Plan, tokens: float, lane: float, length: float, rates: Rates) -> float:
    """Tuning a block as a whole, 0 where nothing is. tokens, lane, length: this rank's share of all, of one batch of
    calibration, of a window in a step's batch."""
    tasks = [plan.assignment.tasks[ref.name] for ref in block.linears if ref.name in plan.assignment.tasks]
    tuned = [task for task in tasks if task.tune is not None]
    if not tuned:
        return 0.0
    options = plan.recipe.quantizing.options if plan.recipe.quantizing is not None else {}
    config = method_config(tuned[0].method, options if method_has(tuned[0].method, options) else {})
    computed = sum(ref.weights * ref.share for ref in block.linears)
    batch = min(float(tokens), max(lane, float(config.batch_size * length)))
    return (
        2.0 * computed * (3 * batch * config.iterations + _LEARNING_FORWARDS * tokens) / rates.exact
        + sum(float(task.ref.weights) for task in tuned) * _LEARNING_PASSES * config.iterations / rates.elements
    )


def _stage(stage: list[Task], plan: Plan, tokens: float, rates: Rates, ranks: int) -> float:
    """Statistics of this rank's tokens, its rows of the weights, and what it exchanges."""
    columns = stage[0].ref.in_features
    weights = sum(task.ref.weights for task in stage) / ranks
    # The upper half of 2 · tokens · in².
    halves = 1 + max(task.source + 2 * task.crossed for task in stage)
    total = halves * tokens * stage[0].ref.share * float(columns) ** 2 / rates.exact
    for task in stage:
        share = task.ref.weights / ranks
        if task.pruning is not None:
            total += share * _SEARCH_PASSES / rates.elements  # scores, and the least of each group
            total += _removing(task.pruning.method, plan, share / columns, columns) / rates.exact
        if task.factoring is not None:
            total += _factoring(task) / (rates.exact / 2)  # float64
        if task.crossed:
            total += _updating(task) / (rates.exact / 2)
        if task.scheme is None:
            continue
        shrinks, refinements = SEARCH[task.scheme.bits] if task.calibrated else ((1.0,), 0)
        candidates = len(shrinks) * (2 if task.scheme.symmetric else 1) + 2 * refinements
        total += share * candidates * _SEARCH_PASSES / rates.elements
    if stage[0].factorizes:
        total += float(columns) ** 3 / 3 / (rates.exact / 2)  # small blocks run at half the rate
        sweeps = 2 if stage[0].one_sweep else 1  # weights are removed once more to find their scales
        total += 3 * sweeps * weights * columns / rates.exact  # the sweep's products and two quadratic forms
        total += sweeps * weights * _COLUMN_PASSES / rates.elements
    elif stage[0].calibrated:
        total += 4 * weights * columns / rates.exact  # e'He and w'Hw
    if ranks > 1:  # half of the float32 Gram matrix goes round twice, integers once
        total += ((4.0 * columns**2 if tokens else 0) + weights * ranks) / _LINK
    return total


def _factoring(task: Task) -> float:
    """Operations of making factors, which each rank does for itself."""
    ref, factoring = task.ref, task.factoring
    assert factoring is not None
    narrow, wide = sorted((ref.out_features, ref.in_features))
    return 2.0 * ref.weights * ref.in_features + 2.0 * narrow**2 * wide + _EIGENVECTORS * float(narrow) ** 3


def _updating(task: Task) -> float:
    """Operations of fitting to the inputs of now, which each rank does for itself."""
    return float(task.ref.in_features) ** 3 / 3 + 4.0 * task.ref.weights * task.ref.in_features


def _removing(method: str, plan: Plan, rows: float, columns: float) -> float:
    """Operations of a method that removes weights, with the recipe's settings where they are its own."""
    entry, step = SPARSE[method], plan.recipe.sparsifying
    own = step.options if step is not None and step.method == method else {}
    return entry.flops(entry.config(**own), rows, columns)


def _rate(kernel: Callable[[], object]) -> float:
    """Runs a second of the fastest of several tries."""
    kernel()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < _BUDGET:
        start = time.perf_counter()
        kernel()
        best = min(best, time.perf_counter() - start)
    return 1 / best
