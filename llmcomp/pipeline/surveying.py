"""What the source model's linears read, before anything is compressed: of a block that runs several times, and of all
where one budget is to be shared out (`pipeline.sharing`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from llmcomp.adapters.base import LinearRef
from llmcomp.calibration.capture import Lane, Stop, advance_all, stopping
from llmcomp.calibration.parking import Parking
from llmcomp.calibration.stats import GramAccumulator, InputStats
from llmcomp.devices import computing_on
from llmcomp.errors import RunError
from llmcomp.formats.save import writing
from llmcomp.pipeline.job import Source
from llmcomp.pipeline.residency import Residency
from llmcomp.progress import Progress
from llmcomp.ranks import World

Found = TypeVar("Found")


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


class Pass(Generic[Found]):
    """The source model, computed once as it is, its blocks read and let go one after the other.

    Memory holds one block and one Gram matrix, and waiting activations go to files as they do later.

    Args:
        batches: this rank's; none where weights are looked at without statistics. partial: directory of unfinished
            work. activation_memory: bytes.
    """

    def __init__(
        self, source: Source, batches: Sequence[Mapping[str, Tensor]], partial: Path, activation_memory: int,
        device: torch.device, world: World, progress: Progress,
    ) -> None:
        self._adapter, self._world, self._progress, self._device = source.adapter, world, progress, device
        self._params = Residency(source.adapter, source.binding, device)
        spill = partial / "activations"
        with writing(partial):
            spill.mkdir(parents=True, exist_ok=True)
        self._parking = Parking(spill, activation_memory, device)
        self._lanes = [Lane(source.adapter.model, batch, device=device) for batch in batches]
        self._pending: set[str] = set()
        self._found: dict[str, Found] = {}

    def run(
        self, wanted: Collection[str], look: Callable[[LinearRef, Tensor, InputStats | None], Found], phase: str
    ) -> dict[str, Found]:
        """{linear: what `look` makes of it, its weight [out, in] and its statistics}.

        Args:
            wanted: names of linears. phase: what this is for, as progress calls it.

        Raises:
            NumericalError: NaN or Inf in weights or activations.
        """
        self._wanted, self._look_at = frozenset(wanted), look
        adapter, model = self._adapter, self._adapter.model
        self._progress.phase(phase, len(adapter.blocks))
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
        if not self._lanes:
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
        """Of experts that few tokens reach the weights alone count, as those are what they are compressed by."""
        self._pending.discard(ref.name)
        few = stats is None or (ref.share < 1 and stats.tokens < ref.in_features)
        self._found[ref.name] = self._look_at(ref, self._params.weight(ref), None if few else stats)

    def _advance(self, accumulator: GramAccumulator | None) -> Stop | None:
        def visit(lane: Lane, stop: Stop) -> None:
            if accumulator is not None and stop.inputs is not None:
                accumulator.add(lane.tokens(stop.inputs))
            self._parking.park(lane.held())

        with torch.no_grad():
            return advance_all(self._lanes, visit, lambda lane: self._parking.fetch(lane.waiting()))
