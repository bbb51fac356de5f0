"""GPTAQ's objective: GPTQ that moves some way towards what the source model gives (arXiv:2504.02692).

Behind compressed blocks GPTQ makes the outputs of its own inputs X' least wrong, as if those were right. GPTAQ asks for
the outputs that the source's inputs X gave. Its paper carries the difference along in the sweep, column by column;
here it is taken into the weights first (`retarget`, in closed form, over all columns at once), and the sweep is GPTQ's.

`alpha` is how far the weights move: 0 is GPTQ to the bit, 1 the least squares of the source's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.errors import BadRecipe
from llmcomp.methods.gptq import GPTQConfig, gptq
from llmcomp.methods.retarget import retarget
from llmcomp.methods.solution import Solution
from llmcomp.schemes import Scheme


@dataclass(frozen=True)
class GPTAQConfig:
    """Settings of GPTAQ.

    Attributes:
        damping, act_order: as of GPTQ. The same damping keeps weights near the source's.
        alpha: share of the way to the source's outputs; 0.25 as the paper's code has it.
    """

    damping: float = GPTQConfig.damping
    act_order: bool = GPTQConfig.act_order
    alpha: float = 0.25

    def __post_init__(self) -> None:
        GPTQConfig(self.damping, self.act_order)
        if not 0 <= self.alpha <= 1:
            raise BadRecipe(f"GPTAQ's alpha must lie in [0, 1], got {self.alpha}.")


def aim(weight: Tensor, gram: Tensor, cross: Tensor, config: GPTAQConfig) -> Tensor:
    """What `gptaq` quantizes in the place of a weight [out, in].

    Args:
        gram, cross: float32 [in, in], X'' X' and X' X'' as `retarget` takes them; only read.

    Raises:
        NumericalError: a matrix with NaN or Inf.
    """
    return retarget(weight, gram, cross, config.damping, config.alpha)


def gptaq(
    weight: Tensor, stats: InputStats, scheme: Scheme, dtype: torch.dtype, config: GPTAQConfig = GPTAQConfig()
) -> Solution:
    """GPTQ of a weight [rows, in] that `aim` has given; arguments are those of `gptq`."""
    return gptq(weight, stats, scheme, dtype, GPTQConfig(config.damping, config.act_order))
