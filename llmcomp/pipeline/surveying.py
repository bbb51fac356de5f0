"""What the source model's linears read, before anything is compressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from llmcomp.calibration.capture import Lane
from llmcomp.calibration.stats import GramAccumulator


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
