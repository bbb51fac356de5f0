"""AWQ: input channels that carry more are given a finer grid, by scales that cost nothing (arXiv:2306.00978).

W x = (W diag(s)) (x / s): a column of W that is multiplied before rounding is rounded more finely, and the division
is taken over by the operation that makes x (`llmcomp.adapters.folds` finds it). The paper's family s = r^a is
searched, r the size of each channel; here

* scales are powers of two. Multiplying and dividing by them is exact in every floating dtype, so folding changes
  no bit of what an unquantized model computes, bf16 and fp16 included;
* the error of each candidate is the exact one, tr(E G E') with the Gram matrix G, instead of a run of the module.

`awq` rounds the scaled weight with searched clipping (`rtn-clip`; the paper's section 3.2 with `AutoAWQ`'s
clipping), `awq-gptq` runs GPTQ on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.errors import BadRecipe
from llmcomp.methods._grid import SEARCH, round_to, search_grid
from llmcomp.methods.gptq import GPTQConfig, gptq
from llmcomp.methods.rtn import rtn_clip
from llmcomp.methods.solution import Solution, quadratics
from llmcomp.schemes import Scheme
from llmcomp.weights import dequantize

_ROWS = 256  # of all weights with one input, evenly spaced, whose error stands for all
_LARGEST = 6  # exponent of a scale: keeps scales of fp16 weights away from their smallest numbers


@dataclass(frozen=True)
class AWQConfig:
    """Settings of AWQ.

    Attributes:
        steps: how many exponents a between 0 and 1 are tried, beside 0.
    """

    steps: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BadRecipe(f"AWQ's steps must be 1 or more, got {self.steps}.")


@dataclass(frozen=True)
class AWQGPTQConfig:
    """Settings of AWQ's scales with GPTQ's rounding.

    Attributes:
        steps: as in AWQ. damping, act_order: as in GPTQ.
    """

    steps: int = 10
    damping: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        AWQConfig(self.steps)
        GPTQConfig(self.damping, self.act_order)


def awq(
    weight: Tensor, stats: InputStats, scheme: Scheme, dtype: torch.dtype, config: AWQConfig = AWQConfig()
) -> Solution:
    """Round weight [rows, in], already scaled as its statistics are, with searched clipping."""
    return rtn_clip(weight, stats, scheme, dtype)


def awq_gptq(
    weight: Tensor, stats: InputStats, scheme: Scheme, dtype: torch.dtype, config: AWQGPTQConfig = AWQGPTQConfig()
) -> Solution:
    """Quantize weight [rows, in], already scaled as its statistics are, by GPTQ."""
    return gptq(weight, stats, scheme, dtype, GPTQConfig(config.damping, config.act_order))


def search_scale(
    weights: Sequence[Tensor], schemes: Sequence[Scheme], stats: InputStats, channels: Tensor,
    config: AWQConfig | AWQGPTQConfig,
) -> Tensor:
    """The scale of least rounding error for weights that share an input.

    Args:
        weights: floating [rows, in] each. schemes: theirs.
        stats: of the input as it is; its Gram matrix must be there.
        channels: int64 [in]; inputs of the same number get the same scale.

    Returns:
        float32 [in], powers of two; ones where no scale lowers the error.
    """
    assert stats.gram is not None  # no method has used it up yet
    samples = _sampled(weights)
    sizes = _sizes(stats, channels)
    best = torch.zeros_like(sizes)
    least = _error(samples, schemes, stats, best)
    tried = {tuple(best.tolist())}
    for step in range(1, config.steps + 1):
        exponents = (sizes * (step / config.steps)).round().clamp(-_LARGEST, _LARGEST)
        key = tuple(exponents.tolist())
        if key in tried:
            continue
        tried.add(key)
        error = _error(samples, schemes, stats, exponents)
        if error < least:
            best, least = exponents, error
    return torch.exp2(best)


def _sampled(weights: Sequence[Tensor]) -> list[Tensor]:
    """Evenly spaced rows of each weight, in proportion to its rows."""
    step = max(1, sum(weight.shape[0] for weight in weights) // _ROWS)
    return [weight[::step].float() for weight in weights]


def _sizes(stats: InputStats, channels: Tensor) -> Tensor:
    """log2 of the root mean square of each input, pooled over those that share a scale, less the mean; float32 [in]."""
    count = int(channels.max()) + 1
    power = torch.zeros(count, dtype=torch.float64).index_add_(0, channels, stats.diagonal.double())
    members = torch.zeros(count, dtype=torch.float64).index_add_(0, channels, torch.ones(len(channels)).double())
    pooled = (power / members.clamp_min(1))[channels]
    floor = pooled.max() * 2.0**-40
    if floor == 0:
        return torch.zeros(len(channels))
    sizes = pooled.clamp_min(floor).log2() / 2
    return (sizes - sizes.mean()).float()


def _error(samples: Sequence[Tensor], schemes: Sequence[Scheme], stats: InputStats, exponents: Tensor) -> float:
    """tr(E G E') of the sampled rows, E = W - Q(W diag(s)) diag(s)^-1."""
    scale = torch.exp2(exponents)
    importance = stats.diagonal / scale.square()
    assert stats.gram is not None
    total = 0.0
    for rows, scheme in zip(samples, schemes, strict=True):
        grid = search_grid(rows * scale, scheme, torch.float32, importance, *SEARCH[scheme.bits])
        rounded = dequantize(round_to(rows * scale, grid), grid.scale, grid.zero_point)
        total += float(quadratics(rows - rounded / scale, stats.gram).sum())
    return total
