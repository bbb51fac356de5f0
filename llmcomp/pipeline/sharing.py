"""One budget shared out between linears by what a pass over the source model has measured: of ranks, or of weights that
an unstructured pattern removes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcomp.adapters.base import LinearRef
from llmcomp.building import build
from llmcomp.calibration.stats import InputStats
from llmcomp.formats.save import writing
from llmcomp.methods import SPARSE, allocation, rank_budget
from llmcomp.methods.lowrank import spectrum
from llmcomp.methods.rank_budget import Spectrum
from llmcomp.methods.solution import Solution
from llmcomp.patterns import Pattern
from llmcomp.pipeline.factorizing import shares_budget
from llmcomp.pipeline.job import Plan, Source
from llmcomp.pipeline.sparsifying import shares_removal
from llmcomp.pipeline.surveying import Pass
from llmcomp.progress import Progress
from llmcomp.ranks import World
from llmcomp.recipe import pattern_for, size_for

# By what removes weights a sensitivity is measured where the method itself takes too long for many sparsities.
_INSTEAD = {"alps": "sparsegpt"}


class Sharing:
    """What a plan still leaves open, settled before the loop begins.

    What is found is kept beside the journal of the run, so that a resumed run goes by the same numbers.

    Args:
        plan: with equal shares. batches: this rank's. partial: directory of unfinished work.
        activation_memory: bytes.
    """

    def __init__(
        self, source: Source, plan: Plan, batches: Sequence[Mapping[str, Tensor]], partial: Path,
        activation_memory: int, device: torch.device, world: World, progress: Progress,
    ) -> None:
        self._source, self._batches, self._partial, self._memory = source, batches, partial, activation_memory
        self._recipe, self._tasks = plan.recipe, plan.assignment.tasks
        self._device, self._world, self._progress = device, world, progress

    def ranks(self) -> dict[str, int | None]:
        """The ranks that one budget pays for, from what each takes off the loss in the source model.

        Returns:
            {linear: its rank, or None where it stays dense}, of those that have no ratio or rank of their own.

        Raises:
            BadRecipe: a budget that the smallest ranks overstep.
            NumericalError: NaN or Inf in weights or activations.
        """
        step = self._recipe.factorizing
        assert step is not None  # else no plan wants ranks
        ratio, _ = size_for(step, None)
        assert ratio is not None  # as `recipe.check` has it
        share = ratio

        def look(ref: LinearRef, weight: Tensor, stats: InputStats | None) -> Spectrum:
            return spectrum(weight, stats)

        def find() -> dict[str, int | None]:
            wanted = [
                name for name, task in self._tasks.items()
                if task.factoring is not None and shares_budget(step, task.ref)
            ]  # fmt: skip
            found = self._pass(wanted).run(wanted, look, "share out ranks")
            sizes = {name: one.shape[0] * one.shape[1] for name, one in found.items()}
            scaled = {name: rank_budget.balanced(one, share) for name, one in found.items()}
            return rank_budget.allocate(scaled, int(share * sum(sizes.values())), 1)

        ranks: dict[str, int | None] = self._once("ranks.json", find)
        return ranks

    def sparsities(self) -> dict[str, float]:
        """How much of each weight is removed, all together as much as with one sparsity for all, from what removing
        costs in the source model.

        Returns:
            {linear: share removed}, of those that have no pattern or sparsity of their own. Where a method removes as
            many weights of each row, these are whole numbers of them, and the budget is kept to half a weight a row of
            one matrix; else exactly.

        Raises:
            NumericalError: NaN or Inf in weights or activations.
        """
        step = self._recipe.sparsifying
        assert step is not None  # else no plan wants sparsities
        sparsity = pattern_for(step, None).sparsity
        points = allocation.around(sparsity)

        def look(ref: LinearRef, weight: Tensor, stats: InputStats | None) -> allocation.Curve:
            pruning = self._tasks[ref.name].pruning
            assert pruning is not None
            name = "magnitude" if stats is None else _INSTEAD.get(pruning.method, pruning.method)
            method = SPARSE[name]
            config = build(method.config, step.options if name == step.method else {}, f"options of {name}")

            def remove(rows: Tensor, pattern: Pattern) -> Solution:
                return method.function(rows, stats, pattern, rows.dtype, config)

            return allocation.balanced(allocation.measured(weight, points, remove), ref.weights)

        def find() -> dict[str, float]:
            shared = {
                name: task for name, task in self._tasks.items()
                if task.pruning is not None and shares_removal(step, task.ref)
            }  # fmt: skip
            curves = self._pass(list(shared)).run(list(shared), look, "share out sparsity")
            sizes = {name: shared[name].ref.weights for name in curves}
            budget = sum(Pattern(removed=sparsity).removes(size) for size in sizes.values())
            found = allocation.allocate(curves, sizes, budget, points[0], points[-1])
            by_row = {
                name: shared[name].ref.in_features for name in curves
                if (pruning := shared[name].pruning) is not None and SPARSE[pruning.method].by_row
            }  # fmt: skip
            return allocation.by_whole_columns(found, sizes, by_row)

        sparsities: dict[str, float] = self._once("sparsities.json", find)
        return sparsities

    def _pass(self, wanted: Sequence[str]) -> Pass[Any]:
        calibrated = any(self._tasks[name].calibrated for name in wanted)
        return Pass(
            self._source, self._batches if calibrated else (), self._partial, self._memory, self._device, self._world,
            self._progress,
        )

    def _once(self, name: str, find: Callable[[], Any]) -> Any:
        """What is found, or the first rank has kept from an earlier run, as the first rank has it."""
        known = self._partial / name
        told = self._world.message((known.read_bytes() if known.is_file() else b"") if self._world.first else None)
        if not told:
            found = find()
            told = self._world.message(json.dumps(found).encode() if self._world.first else None)
            if self._world.first:
                with writing(known):
                    known.with_suffix(".tmp").write_bytes(told)
                    known.with_suffix(".tmp").replace(known)
        return json.loads(told)
