"""The source model's activations, which go through the model beside the lanes of the compressed one.

Factors are the best for what a linear reads in the source model, and one of them is then fitted anew to what it reads
now; weights of which some are removed aim at the source's outputs where that is asked (`methods.retarget`). That wants
both inputs of the same tokens at a time. So each batch has a second lane, which is computed with the source's weights
and stops where the first one stops:

    lanes reach a stage → what each of them reads is noted (`note`)
    → the source's weights take the places of compressed ones, their lanes come to the same stage (`advance`)
    → Gram matrix of the source's inputs, and cross-Gram of both (`finish`)

Source weights are mapped from their files, so exchanging them costs nothing on a CPU; on a GPU a block's are held
twice. What waits in these lanes goes to files as that of the others does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcomp.adapters.base import LinearRef
from llmcomp.calibration.capture import Lane, Stop, advance_all
from llmcomp.calibration.parking import Parking
from llmcomp.calibration.stats import CrossAccumulator, GramAccumulator, InputStats
from llmcomp.errors import RunError
from llmcomp.pipeline.assign import Task
from llmcomp.pipeline.residency import Residency
from llmcomp.ranks import World


@dataclass
class SourceStats:
    """What is known of a linear's input in the source model.

    Attributes:
        inputs: its statistics there.
        cross: float32 [in, in], X' X̃ of the inputs there with those of now; None where no task asks for it.
    """

    inputs: InputStats
    cross: Tensor | None


class Beside:
    """The source model's lanes of one run; none where no task wants them.

    Args:
        tasks: what is done with each linear. batches: inputs of the model for calibration.
        params: the model's values. parking: where waiting activations go.
    """

    def __init__(
        self, model: nn.Module, tasks: Mapping[str, Task], batches: Sequence[Mapping[str, Tensor]],
        params: Residency, parking: Parking,
    ) -> None:
        self._params, self._parking, self._device = params, parking, params.device
        self._crossed = {name: task.crossed for name, task in tasks.items() if task.source}
        batches = batches if self._crossed else ()
        self._lanes = [Lane(model, batch, device=params.device) for batch in batches]
        self._replaced: dict[str, Tensor] = {}  # the source's values of parameters that lanes compute with
        self._read: dict[Lane, Tensor] = {}  # what the other lane of the batch reads at its stop
        self._partners: dict[Lane, Lane] = {}
        self._gathered: tuple[GramAccumulator, CrossAccumulator | None] | None = None

    def pair(self, lanes: Sequence[Lane]) -> None:
        """Take the lanes of the compressed model, in the order of batches."""
        self._partners = dict(zip(self._lanes, lanes, strict=False))

    def keep(self, name: str) -> None:
        """Remember a parameter's source value, which is about to be replaced."""
        if self._lanes:
            self._replaced.setdefault(name, self._params.value(name))

    def forget(self, names: Iterable[str]) -> None:
        """Let source values go that no lane will compute with again."""
        for name in names:
            self._replaced.pop(name, None)

    def note(self, lane: Lane, stop: Stop) -> None:
        """Keep what a lane reads where it has stopped."""
        if self._lanes and lane.counted and stop.kind == "linear" and stop.inputs is not None:
            self._read[lane] = stop.inputs

    def advance(self, reached: Stop | None, stages: Sequence[Sequence[LinearRef]]) -> None:
        """Move the source's lanes to where the others have come; gather statistics if one of the linears there wants
        them.

        Args:
            stages: linears that read the same; it may be that the stop is one of them.

        Raises:
            RunError: they take another way through the model.
        """
        if not self._lanes:
            return
        stage = next((refs for refs in stages if reached is not None and reached.name in [r.name for r in refs]), ())
        wanted = [self._crossed[ref.name] for ref in stage if ref.name in self._crossed]
        self._gathered = (GramAccumulator(), CrossAccumulator() if any(wanted) else None) if wanted else None

        def visit(lane: Lane, stop: Stop) -> None:
            if self._gathered is not None and stop.inputs is not None:
                gram, cross = self._gathered
                inputs = lane.tokens(stop.inputs)
                gram.add(inputs)
                if cross is not None:
                    now = self._read.pop(self._partners[lane])
                    cross.add(inputs, lane.tokens(now.to(self._device)))
            self._parking.park(lane.held())

        with self._source_weights():
            found = advance_all(self._lanes, visit, lambda lane: self._parking.fetch(lane.waiting()))
        self._read.clear()
        places = [None if stop is None else (stop.kind, stop.name) for stop in (reached, found)]
        if places[0] != places[1]:
            raise RunError(
                "Calibration windows take another way through the source model than through the compressed one; "
                "compress it without the update ('update: false')."
            )

    def finish(self, name: str, world: World) -> SourceStats | None:
        """What the module `name` reads in the source model, over all ranks; None where nothing asks for it.

        Raises:
            NumericalError: NaN or Inf among the inputs, or none at all.
        """
        gathered, self._gathered = self._gathered, None
        if gathered is None:
            return None
        gram, cross = gathered
        return SourceStats(gram.finish(name, world), None if cross is None else cross.finish(name, world))

    def close(self) -> None:
        """Leave the forward passes where they are and free what they hold."""
        for lane in self._lanes:
            lane.close()
        self._lanes, self._replaced, self._partners = [], {}, {}
        self._read.clear()

    @contextmanager
    def _source_weights(self) -> Iterator[None]:
        compressed = {name: self._params.value(name) for name in self._replaced}
        for name, value in self._replaced.items():
            self._params.put(name, value)
        try:
            with torch.no_grad():
                yield
        finally:
            for name, value in compressed.items():
                self._params.put(name, value)
