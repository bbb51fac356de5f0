"""SmoothQuant: where inputs are rounded by one scale, loud channels hand their range to the weights (arXiv:2211.10438).

One scale for all that a linear reads leaves few steps to quiet channels where a few are loud. W x =
(W diag(s)) (x / s): what is divided from the input is multiplied into the weight, which has a scale of its own for
each row, and the operation that makes x takes the division over (`llmcomp.adapters.folds` finds it). The paper's
family s_j = max|x_j|^a / max|w_j|^(1-a) (equation 4) is searched. Here, beside scales being powers of two,

* the strength a is chosen for each stage, by the error that it leaves: that of the rounded weights, tr(E G E') with
  the Gram matrix G, and that of the rounded inputs, whose expectation is known: rounding to steps of size d is noise
  of variance d²/12, spread over the outputs by ||W diag(s)||². The paper sets one a for a whole model by hand;
* no scale at all is a candidate, too.

It is no method of rounding weights, but what `--activations int8-static` does before any of them; the method's own
scales (AWQ's) give way to it, whose error has the weights' in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcomp.activations import STEPS
from llmcomp.calibration.stats import InputStats
from llmcomp.methods._scale import of_least_error, pooled, rounding_error, sampled
from llmcomp.schemes import Scheme

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_FLOOR = 2.0**-20  # of the largest: what is quieter counts as this


def search_migration(
    weights: Sequence[Tensor], schemes: Sequence[Scheme], stats: InputStats, channels: Tensor
) -> Tensor:
    """The scale of least error for weights whose common input is rounded by one scale for all tokens and channels.

    Args:
        weights: floating [rows, in] each. schemes: theirs.
        stats: of the input as it is; its Gram matrix must be there.
        channels: int64 [in]; inputs of the same number get the same scale.

    Returns:
        float32 [in], powers of two; ones where no scale lowers the error.
    """
    samples = sampled(weights)

    def error(scale: Tensor) -> float:
        return rounding_error(samples, schemes, stats, scale) + input_noise(samples, stats, scale)

    return of_least_error(_candidates(weights, stats, channels), error)


def input_noise(weights: Sequence[Tensor], stats: InputStats, scale: Tensor) -> float:
    """What rounding x / s adds to the squared outputs of W diag(s), summed over tokens, in expectation.

    A channel that is quieter than the noise of its own rounding is rounded to zero, and loses no more than it has.
    """
    step = (stats.absmax / scale).amax().double() / STEPS
    lost = (stats.diagonal.double() / scale.double().square()).clamp_max(stats.tokens * float(step) ** 2 / 12)
    energy = sum(rows.double().square().sum(0) for rows in weights) * scale.double().square()
    return float((lost * energy).sum())


def _candidates(weights: Sequence[Tensor], stats: InputStats, channels: Tensor) -> list[Tensor]:
    """Exponents, none first; float64 [in] each. A factor common to all channels changes nothing, so their mean is 0."""
    widest = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)
    inputs, outputs = (_log_of(pooled(values, channels, "amax")) for values in (stats.absmax, widest))
    found = [torch.zeros_like(inputs)]
    for strength in STRENGTHS:
        wanted = strength * inputs - (1 - strength) * outputs
        found.append(wanted - wanted.mean())
    return found


def _log_of(sizes: Tensor) -> Tensor:
    largest = sizes.max()
    return torch.zeros_like(sizes) if largest == 0 else sizes.clamp_min(largest * _FLOOR).log2()
