"""A distribution of which the largest classes are kept, and the mass of all others in one number: what a cache of a
teacher's logits holds, and what two vocabularies share.

Two distributions are compared over S, the classes that are kept, and one outcome more, "any other":

    KL = Σ_{i in S} p_i log(p_i / q_i) + r log(r / s),   r = 1 - Σ_S p_i,   s = 1 - Σ_S q_i

By the chain rule this is the whole KL but for r KL(p(·|not S) || q(·|not S)): never above it, equal to it where S is
all classes, zero where p and q agree on S. To leave the tail out, or to scale the kept classes up to 1, would instead
teach a student that nothing else can come next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arrays = dict[str, Tensor]
BITS = (16, 8)  # of a kept logarithm
_LEAST = -60000.0  # of no mass, as float16 can say it
_BLOCK = 1 << 17  # numbers of a block: half a megabyte in float32


@dataclass(frozen=True)
class Kept:
    """n distributions at one temperature.

    Attributes:
        logs: log p [n, k + 1], the mass of all other classes last; [n, classes] without `indices`.
        indices: int64 [n, k], the classes that are kept; [k] where they are the same everywhere; None for all of them.
        classes: how many there are, of which the others are a part.
    """

    logs: Tensor
    indices: Tensor | None
    classes: int


def keep(logits: Tensor, count: int, temperature: float) -> Kept:
    """The `count` largest classes of softmax(t/T); all of them where there are no more.

    Args:
        logits: t [n, classes].

    >>> keep(torch.tensor([[0.0, 2.0, 1.0]]), 1, 1.0).indices
    tensor([[1]])
    """
    if logits.shape[-1] <= count:
        return Kept((logits.float() / temperature).log_softmax(-1), None, logits.shape[-1])
    indices = logits.topk(count, dim=-1).indices
    return Kept(over(logits, indices, temperature).clamp_min(_LEAST), indices, logits.shape[-1])


def fewer(kept: Kept, count: int) -> Kept:
    """The `count` largest of what is kept; the mass of those that are left out goes to the others.

    >>> fewer(keep(torch.tensor([[0.0, 2.0, 1.0]]), 2, 1.0), 1).indices
    tensor([[1]])
    """
    if kept.indices is None or kept.logs.shape[-1] - 1 <= count:
        whole = kept.indices is not None or kept.logs.shape[-1] <= count
        indices = None if kept.indices is None else kept.indices.expand(len(kept.logs), -1)
        return Kept(kept.logs, indices, kept.classes) if whole else keep(kept.logs, count, 1.0)
    inside, rest = kept.logs[:, :-1], kept.logs[:, -1:]
    places = inside.topk(count, dim=-1).indices
    outside = torch.cat([inside.scatter(-1, places, -torch.inf), rest], dim=-1).logsumexp(-1, keepdim=True)
    logs = torch.cat([inside.gather(-1, places), outside], dim=-1).clamp_min(_LEAST)
    return Kept(logs, kept.indices.expand(len(logs), -1).gather(-1, places), kept.classes)


def over(logits: Tensor, indices: Tensor, temperature: float = 1.0) -> Tensor:
    """Logarithms of softmax(z/T) over some classes, and of the mass of the others, [n, k + 1].

    The others' mass is summed up by itself: 1 - Σ_S would cancel where it is small, and so would its gradient.

    Args:
        logits: z [n, classes]. indices: [n, k] or [k], not all classes.
    """
    found: Tensor = _Outcomes.apply(logits, indices.expand(len(logits), -1), temperature)  # type: ignore[no-untyped-call]
    return found.log_softmax(-1)


class _Outcomes(torch.autograd.Function):
    """z_S/T, and log Σ exp(z/T) over the others. By itself, a block of rows after the other, so that the thousands of
    classes are passed over a few times and not a dozen, and nothing of their size is held for the way back."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, indices: Tensor, temperature: float) -> Tensor:
        outcomes = torch.empty(len(logits), indices.shape[1] + 1, device=logits.device)
        for rows in _blocks(logits):
            rest = logits[rows].to(torch.float32, copy=True)
            if temperature != 1:
                rest.div_(temperature)
            outcomes[rows, :-1] = rest.gather(-1, indices[rows])
            rest.scatter_(-1, indices[rows], -torch.inf)
            high = rest.amax(-1, keepdim=True).clamp_min(_LEAST)
            outcomes[rows, -1:] = high + rest.sub_(high).exp_().sum(-1, keepdim=True).log()
        ctx.save_for_backward(logits, indices, outcomes[:, -1:])
        ctx.temperature = temperature
        return outcomes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, indices, mass = ctx.saved_tensors
        scaled, low = gradients[0] / ctx.temperature, mass.clamp_min(_LEAST)
        found = torch.empty(logits.shape, device=logits.device)
        for rows in _blocks(logits):
            share, wide = found[rows], logits[rows].float()
            wide = wide if ctx.temperature == 1 else wide / ctx.temperature
            torch.sub(wide, low[rows], out=share)  # becomes each class' part of the others' mass, times its gradient
            share.exp_().mul_(scaled[rows, -1:]).scatter_(-1, indices[rows], scaled[rows, :-1])
        return found.to(logits.dtype), None, None


def _blocks(logits: Tensor) -> list[slice]:
    """Rows that are looked at together: few on a CPU, whose cache is small, and all elsewhere."""
    size = max(1, _BLOCK // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def alike(logits: Tensor, kept: Kept, temperature: float, scored: Tensor) -> Tensor:
    """log q of softmax(z/T) at the scored positions, over the outcomes that `kept` has there.

    Args:
        logits: z [..., classes or more], of which the further ones are left out. scored: bool [...].
    """
    rows, indices = scored.flatten().nonzero()[:, 0], kept.indices
    flat = logits.flatten(0, -2)[:, : kept.classes]
    if indices is None:
        return (flat.index_select(0, rows).float() / temperature).log_softmax(-1)
    if 2 * len(rows) < len(flat):
        return over(flat.index_select(0, rows), indices, temperature)
    if indices.dim() == 2:  # all positions, whose further ones are cheaper to compute than to leave out
        indices = indices.new_zeros(len(flat), indices.shape[1]).index_copy(0, rows, indices)
    return over(flat, indices, temperature).index_select(0, rows)


def encode(kept: Kept, bits: int) -> Arrays:
    """As tensors to be stored, equally long: logarithms in float16, or in 8 bits between the largest and the smallest
    of a position; indices in 16 or 32 bits; the others' mass in float32. A few classes that are all there stay float32.

    >>> sorted(encode(keep(torch.randn(2, 9), 4, 1.0), 8))
    ['codes', 'indices', 'range', 'rest']
    """
    if kept.indices is None:
        return {"logs": kept.logs.float()}
    logs, rest = kept.logs[:, :-1], kept.logs[:, -1]
    indices = kept.indices.to(torch.uint16 if kept.classes <= 1 << 16 else torch.int32)
    found = {"indices": indices, "rest": rest.float()}
    if bits == 16:
        return {**found, "logs": logs.half()}
    high, low = logs.amax(-1, keepdim=True), logs.amin(-1, keepdim=True)
    step = (high - low).clamp_min(1e-6) / 255
    codes = ((high - logs) / step).round().to(torch.uint8)
    return {**found, "codes": codes, "range": torch.cat([high, step], dim=-1).float()}


def decode(arrays: Arrays, classes: int) -> Kept:
    """The inverse of `encode`, up to rounding; what is rounded is scaled to sum up to 1 again."""
    if "indices" not in arrays:
        return Kept(arrays["logs"].float(), None, classes)
    if "codes" in arrays:
        high, step = arrays["range"].split(1, dim=-1)
        logs = high - step * arrays["codes"].float()
    else:
        logs = arrays["logs"].float()
    both = torch.cat([logs, arrays["rest"][:, None]], dim=-1)
    return Kept(both.log_softmax(-1), arrays["indices"].long(), classes)
