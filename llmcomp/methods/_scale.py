"""What every search for a scale of a stage's input shares: rows that stand for all, channels that share a scale, the
rounding error of the scaled weights.

W x = (W diag(s)) (x / s) for weights [rows, in] that read one input. Scales are powers of two: multiplying and
dividing by them is exact in every floating dtype, so folding changes no bit of what an unquantized model computes,
bf16 and fp16 included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.methods._grid import SEARCH, round_to, search_grid
from llmcomp.methods.solution import quadratics
from llmcomp.schemes import Scheme
from llmcomp.weights import dequantize

_ROWS = 256  # of all weights with one input, evenly spaced, whose error stands for all
_LARGEST = 6  # exponent of a scale: keeps scales of fp16 weights away from their smallest numbers


def sampled(weights: Sequence[Tensor]) -> list[Tensor]:
    """Evenly spaced rows of each weight, in proportion to its rows; float32."""
    step = max(1, sum(weight.shape[0] for weight in weights) // _ROWS)
    return [weight[::step].float() for weight in weights]


def exponents(wanted: Tensor) -> Tensor:
    """Whole exponents near those `wanted`, within bounds; float32 [in]."""
    return wanted.round().clamp(-_LARGEST, _LARGEST).float()


def of_least_error(candidates: Iterable[Tensor], error: Callable[[Tensor], float]) -> Tensor:
    """The scale float32 [in] whose error is least, the first one of equals.

    Args:
        candidates: exponents as wanted, floating [in]; those that round to the same are tried once.
        error: of a scale.
    """
    tried: dict[tuple[float, ...], tuple[float, Tensor]] = {}
    for wanted in candidates:
        whole = exponents(wanted)
        key = tuple(whole.tolist())
        if key not in tried:
            scale = torch.exp2(whole)
            tried[key] = error(scale), scale
    return min(tried.values(), key=lambda found: found[0])[1]


def pooled(values: Tensor, channels: Tensor, reduce: str) -> Tensor:
    """Each of float64 [in] replaced by the 'mean' or 'amax' over the inputs that share its channel, int64 [in].

    On the CPU, whatever `values` lie on: a GPU adds up in whatever order its threads come, so not twice the same.
    """
    channels = channels.cpu()
    empty = torch.zeros(int(channels.max()) + 1, dtype=torch.float64)
    found = empty.scatter_reduce(0, channels, values.cpu().double(), reduce, include_self=False)
    return found[channels].to(values.device)


def rounding_error(samples: Sequence[Tensor], schemes: Sequence[Scheme], stats: InputStats, scale: Tensor) -> float:
    """tr(E G E') of the sampled rows, E = W - Q(W diag(s)) diag(s)^-1.

    Args:
        stats: of the input as it is; its Gram matrix must be there. scale: float32 [in].
    """
    assert stats.gram is not None  # no method has used it up yet
    importance = stats.diagonal / scale.square()
    total = 0.0
    for rows, scheme in zip(samples, schemes, strict=True):
        grid = search_grid(rows * scale, scheme, torch.float32, importance, *SEARCH[scheme.bits])
        rounded = dequantize(round_to(rows * scale, grid), grid.scale, grid.zero_point)
        total += float(quadratics(rows - rounded / scale, stats.gram).sum())
    return total
