"""Inputs of which some channels are louder than others, and the rounding error of scaled weights in slow float64."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcomp.calibration.stats import GramAccumulator, InputStats
from llmcomp.methods._grid import SEARCH, round_to, search_grid
from llmcomp.schemes import Scheme
from llmcomp.weights import dequantize


def inputs(tokens: int, width: int, seed: int, loud: int = 8) -> Tensor:
    """Correlated inputs of which every `loud`th channel is sixteen times the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    x = x + 0.5 * x.roll(1, 1)
    x[:, ::loud] *= 16
    return x


def weights(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 1)) * 0.05


def stats_of(x: Tensor) -> InputStats:
    accumulator = GramAccumulator()
    accumulator.add(x)
    return accumulator.finish("x")


def own(width: int) -> Tensor:
    return torch.arange(width)


def slow_error(parts: list[Tensor], schemes: list[Scheme], x: Tensor, scale: Tensor) -> float:
    """||X (W - Q(W diag(s)) diag(s)^-1)'||² in float64, from the inputs."""
    importance = x.double().square().sum(0) / scale.double().square()
    total = 0.0
    for weight, scheme in zip(parts, schemes, strict=True):
        grid = search_grid(weight * scale, scheme, torch.float32, importance.float(), *SEARCH[scheme.bits])
        rounded = dequantize(round_to(weight * scale, grid), grid.scale, grid.zero_point).double() / scale.double()
        total += float((x.double() @ (weight.double() - rounded).T).square().sum())
    return total
