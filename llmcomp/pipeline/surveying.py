"""What the source model's linears read, before anything is compressed: of a block that runs several times, and of all
where one budget of ranks is to be shared out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from llmcomp.adapters.base import LinearRef
from llmcomp.calibration.capture import Lane, Stop, advance_all, stopping
from llmcomp.calibration.parking import Parking
from llmcomp.calibration.stats import GramAccumulator, InputStats
from llmcomp.devices import computing_on
from llmcomp.errors import RunError
from llmcomp.formats.save import writing
from llmcomp.methods.lowrank import spectrum
from llmcomp.methods.rank_budget import Spectrum, allocate, balanced
from llmcomp.pipeline.factorizing import shares_budget
from llmcomp.pipeline.job import Plan, Source
from llmcomp.pipeline.residency import Residency
from llmcomp.progress import Progress
from llmcomp.ranks import World
from llmcomp.recipe import size_for

_RANKS = "ranks.json"


def survey(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], device: torch.device,
    found: Mapping[str, GramAccumulator], applications: int,
) -> bool:
    """Gather what linears of one block read in all of its runs, by lanes that start where the model does.

    Args:
        found: {linear: where its inputs are added}; lanes stop there. applications: runs of the block.

    Returns:
        Whether every lane has come to each of them in each run.
    """
    for batch in batches:
        lane = Lane(model, batch, device=device)
        due = applications * len(found)
        while due and (stop := lane.advance()) is not None:
            if stop.kind == "linear" and stop.inputs is not None:
                found[stop.name].add(lane.tokens(stop.inputs))
                due -= 1
        lane.close()
        if due:
            return False
    return True


def ranks_of(
    source: Source, plan: Plan, batches: Sequence[Mapping[str, Tensor]], partial: Path, activation_memory: int,
    device: torch.device, world: World, progress: Progress,
) -> dict[str, int | None]:
    """The ranks that one budget pays for, from what each takes off the loss in the source model.

    The model is computed once, block by block, as it is; memory holds one block and one Gram matrix, and waiting
    activations go to files as they do later. What this finds is kept beside the journal of the run.

    Args:
        plan: with ranks of one ratio for all. batches: this rank's. partial: directory of unfinished work.
        activation_memory: bytes.

    Returns:
        {linear: its rank, or None where it stays dense}, of those that have no ratio or rank of their own.

    Raises:
        BadRecipe: a budget that the smallest ranks overstep.
        NumericalError: NaN or Inf in weights or activations.
    """
    step = plan.recipe.factorizing
    assert step is not None  # else no plan wants ranks
    known = partial / _RANKS
    told = world.message((known.read_bytes() if known.is_file() else b"") if world.first else None)
    if not told:
        found = _Pass(source, plan, batches, partial, activation_memory, device, world, progress).spectra()
        ratio, _ = size_for(step, None)
        assert ratio is not None  # as `recipe.check` has it
        sizes = {name: spectrum.shape[0] * spectrum.shape[1] for name, spectrum in found.items()}
        scaled = {name: balanced(spectrum, ratio) for name, spectrum in found.items()}
        ranks = allocate(scaled, int(ratio * sum(sizes.values())), 1)
        told = world.message(json.dumps(ranks).encode() if world.first else None)
        if world.first:
            with writing(known):
                known.with_suffix(".tmp").write_bytes(told)
                known.with_suffix(".tmp").replace(known)
    shared: dict[str, int | None] = json.loads(told)
    return shared


class _Pass:
    """The source model, computed once, its blocks read and let go one after the other."""

    def __init__(
        self, source: Source, plan: Plan, batches: Sequence[Mapping[str, Tensor]], partial: Path,
        activation_memory: int, device: torch.device, world: World, progress: Progress,
    ) -> None:
        self._adapter, self._world, self._progress, self._device = source.adapter, world, progress, device
        step = plan.recipe.factorizing
        assert step is not None
        tasks = {name: task for name, task in plan.assignment.tasks.items() if task.factoring is not None}
        self._wanted = {name for name, task in tasks.items() if shares_budget(step, task.ref)}
        self._calibrated = any(tasks[name].calibrated for name in self._wanted)
        self._params = Residency(source.adapter, source.binding, device)
        spill = partial / "activations"
        with writing(partial):
            spill.mkdir(parents=True, exist_ok=True)
        self._parking = Parking(spill, activation_memory, device)
        model = source.adapter.model
        self._lanes = [Lane(model, batch, device=device) for batch in (batches if self._calibrated else ())]
        self._pending: set[str] = set()
        self._found: dict[str, Spectrum] = {}

    def spectra(self) -> dict[str, Spectrum]:
        """{linear: what each of its ranks takes off the loss}."""
        adapter, model = self._adapter, self._adapter.model
        self._progress.phase("share out ranks", len(adapter.blocks))
        linears = {name: model.get_submodule(name) for name in self._wanted}
        blocks = {block.name: model.get_submodule(block.name) for block in adapter.blocks}
        try:
            with computing_on(self._device), stopping(model, blocks, linears, self._pending.__contains__):
                self._params.settle()
                self._params.read(self._params.outside)
                self._advance(None)
                for block in adapter.blocks:
                    inside = self._params.inside(block.name)
                    self._params.read(inside)
                    self._stages(block.stages)
                    if block is not adapter.blocks[-1]:
                        self._advance(None)
                        self._params.release(inside)
                    self._progress.step()
                self._stages(((adapter.head,),) if adapter.head is not None else ())
        finally:
            for lane in self._lanes:
                lane.close()
        self._params.release([*self._params.outside, *self._params.inside(adapter.blocks[-1].name)])
        return self._found

    def _stages(self, stages: Sequence[Sequence[LinearRef]]) -> None:
        wanted = [[ref for ref in stage if ref.name in self._wanted] for stage in stages]
        if not self._calibrated:
            for ref in (ref for stage in wanted for ref in stage):
                self._look(ref, None)
            return
        self._pending.update(ref.name for stage in wanted for ref in stage)
        while self._pending:
            accumulator = GramAccumulator()
            reached = self._advance(accumulator)
            if reached is None or reached.name not in self._pending:
                raise RunError(
                    f"{next(iter(self._pending))} was never computed in the calibration run; leave it out of the "
                    "recipe by an override with 'skip: true'."
                )
            stats = accumulator.finish(reached.name, self._world)
            for ref in next(stage for stage in wanted if any(ref.name == reached.name for ref in stage)):
                self._look(ref, stats)

    def _look(self, ref: LinearRef, stats: InputStats | None) -> None:
        """Of experts that few tokens reach the weights alone count, as those are what their factors are made of."""
        self._pending.discard(ref.name)
        few = stats is None or (ref.share < 1 and stats.tokens < ref.in_features)
        self._found[ref.name] = spectrum(self._params.weight(ref), None if few else stats)

    def _advance(self, accumulator: GramAccumulator | None) -> Stop | None:
        def visit(lane: Lane, stop: Stop) -> None:
            if accumulator is not None and stop.inputs is not None:
                accumulator.add(lane.tokens(stop.inputs))
            self._parking.park(lane.held())

        with torch.no_grad():
            return advance_all(self._lanes, visit, lambda lane: self._parking.fetch(lane.waiting()))
