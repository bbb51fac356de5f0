"""Teachers as functions from what the student reads to `Targets`, and functions that make one of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmcomp.feeds import in_dtype
from llmcomp.training.distilling import Guide, Targets
from llmcomp.training.taps import Taps


def watched(model: Any, taps: Taps) -> Guide:
    """A model as a teacher, in eval mode and without gradients, with what its taps hear."""
    model.eval().requires_grad_(False)

    def teach(inputs: Mapping[str, Tensor]) -> Targets:
        with torch.no_grad():
            logits: Tensor = model(**in_dtype(model, inputs)).logits
            return Targets(logits, taps.take())

    return teach


def ensemble(guides: Sequence[Guide], temperature: float) -> Guide:
    """Several teachers as one, whose distribution at the temperature is the mean of theirs; the inside is the first's.

    Args:
        temperature: T. The logits are T log(1/n Σ softmax(t_i/T)), so softmax(·/T) is that mean.
    """

    def teach(inputs: Mapping[str, Tensor]) -> Targets:
        said = [guide(inputs) for guide in guides]
        found = [_whole(one) for one in said]
        classes = min(one.shape[-1] for one in found)
        logs = torch.stack([(one[..., :classes].float() / temperature).log_softmax(-1) for one in found])
        mean = logs.logsumexp(0) - torch.tensor(float(len(said)), device=logs.device).log()
        return Targets(temperature * mean, said[0].inside)

    return teach


def mean_scores(guides: Sequence[Guide]) -> Guide:
    """Several regressors as one, whose score is the mean of theirs; the inside is the first's."""

    def teach(inputs: Mapping[str, Tensor]) -> Targets:
        said = [guide(inputs) for guide in guides]
        return Targets(torch.stack([_whole(one).float() for one in said]).mean(0), said[0].inside)

    return teach


def _whole(said: Targets) -> Tensor:
    assert isinstance(said.logits, Tensor)  # a cache stands around teachers, never between them
    return said.logits


def once(guide: Guide) -> Guide:
    """A teacher whose last answer is given again to whoever asks about the same batch."""
    last: list[tuple[Tensor, Targets]] = []

    def teach(inputs: Mapping[str, Tensor]) -> Targets:
        read = next(iter(inputs.values()))
        if not last or last[0][0] is not read:
            last[:] = [(read, guide(inputs))]
        return last[0][1]

    return teach


def together(guides: Sequence[Guide], temperature: float, regression: bool) -> Guide:
    """All of them as one, which of one is that one."""
    if len(guides) == 1:
        return guides[0]
    return mean_scores(guides) if regression else ensemble(guides, temperature)
