"""Scores of the source's blocks and units, measured before anything is cut, and kept for a run that is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcomp.formats.save import writing
from llmcomp.pipeline.influence import influences
from llmcomp.pipeline.job import Source
from llmcomp.pipeline.pruning import Reduction
from llmcomp.pipeline.sensitivity import Scores, sensitivities

_BLOCKS, _TAYLOR = "blocks.json", "taylor.json"


@dataclass(frozen=True)
class Scoring:
    """By the method of a step that prunes.

    Attributes:
        batches: of calibration; labels: of a classifier, [rows] for each batch.
        partial: where scores are kept; activation_memory: bytes that waiting activations take before they go to files.
    """

    source: Source
    reduction: Reduction
    batches: Sequence[Mapping[str, Tensor]]
    labels: Sequence[Tensor] | None
    partial: Path
    activation_memory: int
    device: torch.device

    def of_blocks(self) -> list[float]:
        """The higher, the more a block matters."""
        if self.reduction.taylor:
            return [self.taylor[block.name][0] for block in self.source.adapter.blocks]
        found: list[float] = self._kept(_BLOCKS, self._influences if self.reduction.calibrated else self._sizes)
        return found

    def of_units(self, output: str) -> Tensor | None:
        """float64 [units] of the projection `output` by the source's name, where they are known beforehand."""
        if not self.reduction.taylor:
            return None
        return torch.tensor(self.taylor[output], dtype=torch.float64)

    @cached_property
    def taylor(self) -> Scores:
        """Of all units and blocks. The model must be as it is, with nothing in it resident, when it is asked first."""
        found: Scores = self._kept(_TAYLOR, self._sensitivities)
        return found

    def _sensitivities(self) -> Scores:
        adapter, checkpoint = self.source.adapter, self.source.checkpoint
        parts = [part for block in adapter.blocks for part in self.reduction.parts(block)]
        return sensitivities(
            adapter, self.source.binding, self.batches, self.labels, parts, self.device, checkpoint.release
        )

    def _influences(self) -> list[float]:
        adapter, spill = self.source.adapter, self.partial / "activations"
        return influences(adapter, self.source.binding, self.batches, spill, self.activation_memory, self.device)

    def _sizes(self) -> list[float]:
        """The sum of squares of all weights of each block."""
        found = []
        for block in self.source.adapter.blocks:
            weights = (self.source.binding.tensor(f"{ref.name}.weight") for ref in block.linears)
            found.append(sum(float(weight.double().square().sum()) for weight in weights))
            self.source.checkpoint.release()
        return found

    def _kept(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, or has given to an earlier run."""
        known = self.partial / name
        if not known.is_file():
            scores = measure()
            with writing(known):
                known.with_suffix(".tmp").write_text(json.dumps(scores), encoding="utf-8")
                known.with_suffix(".tmp").replace(known)
        return json.loads(known.read_text(encoding="utf-8"))
