"""AWQ: input channels that carry more are given a finer grid, by scales that cost nothing (arXiv:2306.00978).

W x = (W diag(s)) (x / s): a column of W that is multiplied before rounding is rounded more finely, and the division
is taken over by the operation that makes x (`llmcomp.adapters.folds` finds it). The paper's family s = r^a is
searched, r the size of each channel; here

* scales are powers of two, so folding changes no bit of what an unquantized model computes (`_scale`);
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
from llmcomp.methods._scale import of_least_error, pooled, rounding_error, sampled
from llmcomp.methods.gptq import GPTQConfig, gptq
from llmcomp.methods.rtn import rtn_clip
from llmcomp.methods.solution import Solution
from llmcomp.schemes import Scheme


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
    samples, sizes = sampled(weights), _sizes(stats, channels)
    candidates = (sizes * (step / config.steps) for step in range(config.steps + 1))
    return of_least_error(candidates, lambda scale: rounding_error(samples, schemes, stats, scale))


def _sizes(stats: InputStats, channels: Tensor) -> Tensor:
    """log2 of the root mean square of each input, pooled over those that share a scale, less the mean; float32 [in]."""
    power = pooled(stats.diagonal, channels, "mean")
    floor = power.max() * 2.0**-40
    if floor == 0:
        return torch.zeros_like(stats.diagonal)
    sizes = power.clamp_min(floor).log2() / 2
    return (sizes - sizes.mean()).float()
