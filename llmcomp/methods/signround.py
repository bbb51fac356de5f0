"""SignRound: rounding and ranges learned by signed gradients of a whole block's output error (arXiv:2309.05516).

Each weight gets an offset V in [-1/2, 1/2] added before it is rounded, each group a factor of its scale and, where
there are zero points, a shift of its own; the sign of the gradient moves them by a step that falls linearly to
zero. What this one does beyond the paper:

* it goes on from any solution (`gptq`, `rtn-clip`): the first iterate is that solution to the bit (`Rounding`);
* the gradient of the weights is all that is asked of autograd; that of offsets, scales and zero points follows from
  it in closed form, so that rounding is no part of any graph;
* scales are rounded to the dtype in which they are stored before integers are chosen: what is tuned is what is read;
* iterates are compared by their loss over the same windows, the start included, not by those of different batches:
  there the result is never worse than what it started from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.errors import BadRecipe, NumericalError
from llmcomp.methods._grid import stored_scale
from llmcomp.methods.gptq import GPTQConfig, gptq
from llmcomp.methods.rtn import rtn_clip
from llmcomp.methods.solution import Solution
from llmcomp.schemes import Scheme
from llmcomp.weights import QuantizedWeight

# How near to the edge between two integers a start may lie, in steps of the grid: a float32 on the edge could
# be rounded to either.
_EDGE = 0.499

# Length of the whole way in steps of the grid, were all signs alike (twice what it decays to: linear decay). Twice as
# much, which auto-round 0.16 takes below 4 bits, lowers the error on calibration windows further (a trained decoder at
# 2 bits, first block: 0.302 for 0.323) and not the perplexity.
_REACH = 1.0

# How far a scale may move from the start's, and a zero point.
_SCALES = (0.5, 1.5)
_SHIFT = 2.0

# Shares of the iterations after which an iterate is compared with the best.
_CHECKS = (0.5, 0.75, 1.0)


@dataclass(frozen=True)
class SignRoundConfig:
    """Settings of SignRound.

    Attributes:
        iterations: steps of the descent in each block.
        batch_size: calibration windows of a step, rounded up to whole batches of calibration (about 512 tokens).
            8, which auto-round takes, makes four times the products of a step; the same decoder at 2 bits was no
            better with it.
        learning_rate: of the first step, in steps of the grid; 0 takes 1 / iterations.
        damping: of GPTQ, where it is the start.
    """

    iterations: int = 200
    batch_size: int = 2
    learning_rate: float = 0.0
    damping: float = GPTQConfig.damping

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch_size < 1:
            raise BadRecipe(
                "SignRound needs at least 1 iteration over batches of at least 1 window, got "
                f"{self.iterations} over {self.batch_size}."
            )
        if not 0 <= self.learning_rate <= 1:
            raise BadRecipe(
                f"SignRound's learning_rate must lie in [0, 1], 0 for its own choice, got {self.learning_rate}."
            )
        GPTQConfig(damping=self.damping)

    @property
    def first_step(self) -> float:
        """Of the descent, in steps of the grid."""
        return self.learning_rate or _REACH / self.iterations


def clip_start(
    weight: Tensor, stats: InputStats, scheme: Scheme, dtype: torch.dtype, config: SignRoundConfig = SignRoundConfig()
) -> Solution:
    """Where `signround` starts: `rtn-clip`."""
    return rtn_clip(weight, stats, scheme, dtype)


def gptq_start(
    weight: Tensor, stats: InputStats, scheme: Scheme, dtype: torch.dtype, config: SignRoundConfig = SignRoundConfig()
) -> Solution:
    """Where `gptq-signround` starts: `gptq`."""
    return gptq(weight, stats, scheme, dtype, GPTQConfig(damping=config.damping))


class Rounding:
    """One weight on its way: integers on a grid that learns.

    With u = latent / scale, the integers are clamp(round(u + offset + zero)) and the weight (integers - zero) scale.
    The latent is the weight itself where the start has rounded it to the nearest point, and else the value closest
    to it that the start's integer is nearest to: so offsets 0 and factors 1 are the start.

    Args:
        weight: floating [out, in], what is to be compressed.
        start: a solution of it.
    """

    def __init__(self, weight: Tensor, start: QuantizedWeight) -> None:
        self.scheme, self._dtype, self._shape = start.scheme, start.scale.dtype, start.values.shape
        rows, groups = start.scale.shape
        values = start.values.reshape(rows, groups, -1).float()
        self._scale0 = start.scale.float().unsqueeze(-1)
        self._zero0 = None if start.zero_point is None else start.zero_point.float().unsqueeze(-1)
        centre = values if self._zero0 is None else values - self._zero0
        distance = weight.reshape(values.shape).float() / self._scale0 - centre
        # What lies beyond the grid's end stays there.
        low = torch.where(values > self.scheme.qmin, -_EDGE, -torch.inf)
        high = torch.where(values < self.scheme.qmax, _EDGE, torch.inf)
        self._latent = (centre + distance.clamp(low, high)) * self._scale0
        self._offset = torch.zeros_like(self._latent)
        self._factor = torch.ones_like(self._scale0)
        self._shift = None if self._zero0 is None else torch.zeros_like(self._zero0)

    def quantized(self) -> QuantizedWeight:
        """The present iterate, as it would be stored."""
        scale, zero = self._grid()
        rounded = self._rounded(scale, zero).clamp_(self.scheme.qmin, self.scheme.qmax)
        stored = None if zero is None else zero.squeeze(-1).to(torch.int8)
        values = rounded.reshape(self._shape).to(torch.int8)
        return QuantizedWeight(values, scale.squeeze(-1), stored, self.scheme)

    def dense(self) -> Tensor:
        """The present iterate as a reader decodes it, float32 [out, in]."""
        scale, zero = self._grid()
        points = self._rounded(scale, zero).clamp_(self.scheme.qmin, self.scheme.qmax)
        if zero is not None:
            points -= zero
        if self._dtype == torch.float32:
            return points.mul_(scale).reshape(self._shape)
        return (points.to(self._dtype) * scale).float().reshape(self._shape)

    def step(self, gradient: Tensor, length: float) -> None:
        """Move against the sign of the loss's gradient.

        Args:
            gradient: of the loss by `dense()`, float32 [out, in].
            length: of the step, in steps of the grid (a share, for factors of scales).
        """
        rounding, factor, shift = self.gradients(gradient)
        self._offset.sub_(rounding.sign_(), alpha=length).clamp_(-0.5, 0.5)
        self._factor.sub_(factor.sign_(), alpha=length).clamp_(*_SCALES)
        if self._shift is not None and shift is not None:
            self._shift.sub_(shift.sign_(), alpha=length).clamp_(-_SHIFT, _SHIFT)

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the loss by offsets [out, groups, size], factors and shifts [out, groups, 1], rounding passed straight
        through (equations 3 to 5 of the paper, carried through the scale as in arXiv:1902.08153)."""
        scale, zero = self._grid()
        wide = scale.float()
        rounded = self._rounded(scale, zero)
        points = rounded.clamp(self.scheme.qmin, self.scheme.qmax)
        inside = rounded == points
        by_weight = gradient.reshape(self._latent.shape)
        by_offset = by_weight * inside * wide
        by_zero = None
        if zero is not None:
            points -= zero
            by_zero = -(by_weight * ~inside).sum(-1, keepdim=True) * wide
        # d weight / d scale = points + scale d points / d scale, and where nothing clips, scale d points / d scale = -u
        slope = points.sub_(self._latent.div(wide).mul_(inside))
        by_factor = (by_weight * slope).sum(-1, keepdim=True) * self._scale0
        return by_offset, by_factor, by_zero

    def _grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale in the stored dtype and whole zero points, [out, groups, 1]."""
        scale = stored_scale(self._scale0 * self._factor, self._dtype)
        if self._zero0 is None or self._shift is None:
            return scale, None
        return scale, (self._zero0 + self._shift).round_().clamp_(self.scheme.qmin, self.scheme.qmax)

    def _rounded(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        points = self._latent / scale.float()
        points += self._offset
        if zero is not None:
            points += zero
        return points.round_()


@dataclass(frozen=True)
class Tuned:
    """The best iterate, and the loss (over the windows that `loss` looks at) before and with it."""

    weights: dict[str, QuantizedWeight]
    before: float
    after: float


def tune(
    starts: Mapping[str, tuple[Tensor, QuantizedWeight]],
    descend: Callable[[Mapping[str, Tensor], Sequence[int]], Mapping[str, Tensor]],
    loss: Callable[[Mapping[str, Tensor]], float],
    batches: Sequence[Sequence[int]],
    config: SignRoundConfig,
    seed: int,
) -> Tuned:
    """Tune the weights of one block together.

    Args:
        starts: {name: (the weight [out, in], a solution of it)}.
        descend: (dense weights float32 [out, in], batch) → gradients of the loss on that batch by them.
        loss: of dense weights, always over the same windows.
        batches: what `descend` takes, one after the other, in a new order each time around.
        config: settings. seed: of that order.

    Raises:
        NumericalError: the loss is NaN or Inf.
    """
    roundings = {name: Rounding(*start) for name, start in starts.items()}

    def dense() -> dict[str, Tensor]:
        return {name: rounding.dense() for name, rounding in roundings.items()}

    def finite_loss() -> float:
        found = loss(dense())
        if not found < float("inf"):
            raise NumericalError(f"The loss of learned rounding is {found}; take another method for this model.")
        return found

    before = best = finite_loss()
    kept = {name: start for name, (_, start) in starts.items()}
    checks = {max(1, round(share * config.iterations)) for share in _CHECKS}
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for iteration in range(config.iterations):
        if not order:
            order = torch.randperm(len(batches), generator=generator).tolist()
        gradients = descend(dense(), batches[order.pop()])
        for name, rounding in roundings.items():
            length = config.first_step * (1 - iteration / config.iterations)
            rounding.step(gradients[name], length)
        if iteration + 1 in checks:
            found = finite_loss()
            if found < best:
                best, kept = found, {name: rounding.quantized() for name, rounding in roundings.items()}
    return Tuned(kept, before, best)
