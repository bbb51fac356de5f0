"""Which samples a step reads: rows of like length together, so that little of a batch is padding.

    A = a random order of all samples; of each window of A the samples by length; of those, steps; steps in random order

Within a window of 50 steps a step's samples are neighbours in length; windows, ties and the order of steps are drawn
anew each epoch, from the seed and the epoch alone, so that a resumed run, and each of several processes, sees the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

_WINDOW = 50  # steps: as transformers' own sampler has it, which neither draws steps anew nor by epoch


class GroupedByLength(Sampler[int]):
    """Every sample once an epoch.

    Args:
        lengths: tokens of each sample.
        step: samples of an optimizer step, of all processes.
    """

    def __init__(self, lengths: Sequence[int], step: int, seed: int) -> None:
        self.lengths, self.step, self.seed, self.epoch = torch.tensor(lengths), step, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Accelerate's loader says which."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        mixed = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0])
        drawn = torch.Generator().manual_seed(mixed >> 1)
        order = torch.randperm(len(self), generator=drawn)
        sorted_windows = [one[self.lengths[one].argsort(stable=True, descending=True)]
                          for one in order.split(_WINDOW * self.step)]  # fmt: skip
        steps = list(torch.cat(sorted_windows).split(self.step))
        short = [steps.pop()] if len(self) % self.step else []  # the loader cuts by count: it comes last
        shuffled = [steps[number] for number in torch.randperm(len(steps), generator=drawn).tolist()]
        # The longest first, so that what does not fit into memory says so at once.
        first = max(range(len(shuffled)), key=lambda number: int(self.lengths[shuffled[number]].max()), default=0)
        if shuffled:
            shuffled[0], shuffled[first] = shuffled[first], shuffled[0]
        yield from torch.cat(shuffled + short).tolist()
