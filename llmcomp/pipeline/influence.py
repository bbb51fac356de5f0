"""How much each block does to what goes through it: 1 - cos of what it reads and what it gives, the mean over tokens.

Block influence of ShortGPT (arXiv:2403.03853, eq. 1). The blocks of least influence go at once, as there; the model is
computed once, as it is, block by block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llmcomp.adapters.base import Adapter
from llmcomp.calibration.capture import Lane, Stop, advance_all, stopping, watching
from llmcomp.calibration.parking import Parking
from llmcomp.devices import computing_on
from llmcomp.errors import NumericalError, RunError
from llmcomp.pipeline.residency import Residency, Values


def influences(
    adapter: Adapter, values: Values, batches: Sequence[Mapping[str, Tensor]], spill: Path, activation_memory: int,
    device: torch.device,
) -> list[float]:
    """The influence of each block, 0 where its output has the direction of its input.

    Args:
        adapter: whose model's parameters are on meta, before and after. values: what they are.
        spill: a directory for waiting activations beyond `activation_memory` bytes.

    Raises:
        NumericalError: NaN or Inf in weights or activations.
        RunError: a block that no window reaches.
    """
    model, params = adapter.model, Residency(adapter, values, device)
    blocks = {block.name: model.get_submodule(block.name) for block in adapter.blocks}
    parking, last = Parking(spill, activation_memory, device), adapter.blocks[-1].name
    lanes = [Lane(model, batch, device=device) for batch in batches]
    sums, tokens = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0)
    running: list[Lane] = []

    def leave(lane: Lane) -> None:
        running[:] = [lane]
        parking.fetch(lane.waiting())

    def seen(name: str, read: Tensor, given: Tensor) -> None:
        one, other = (running[0].tokens(tensor).double() for tensor in (read, given))
        sums[name] += float((1 - torch.cosine_similarity(one, other, dim=1)).sum())
        tokens[name] += len(one)

    def visit(lane: Lane, stop: Stop) -> None:
        parking.park(lane.held())

    try:
        with (
            torch.no_grad(),
            computing_on(device),
            watching(blocks, seen),
            stopping(model, blocks, {}, lambda name: False, last.__eq__),  # lanes end behind the last block
        ):
            params.settle()
            params.read(params.outside)
            advance_all(lanes, visit, leave)
            for block in adapter.blocks:
                names = params.inside(block.name)
                params.read(names)
                advance_all(lanes, visit, leave)
                params.release(names)
    finally:
        for lane in lanes:
            lane.close()
        params.release(params.outside)
    if unseen := [name for name, count in tokens.items() if not count]:
        raise RunError(f"{unseen[0]} was never computed in the calibration run; prune without --layers.")
    found = [sums[name] / tokens[name] for name in blocks]
    if not all(value == value for value in found):  # NaN
        raise NumericalError("The calibration activations between blocks hold NaN or Inf.")
    return found
