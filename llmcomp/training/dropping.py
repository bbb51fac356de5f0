"""Attention whose shares are dropped out, on a CPU, a block of heads at a time.

PyTorch's fused attention on a CPU knows no dropout, and what it falls back on is slower than eager attention. Here the
shares of a block stay in the cache, and are computed again on the way back: what is held is which of them were kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 2**18  # shares at a time, which stay in a core's cache


def drop_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float, dropout: float) -> Tensor:
    """Σ_key keep / (1 - p) softmax(q·k · scaling) v, over the keys that a query sees; a query that sees none gets what
    is of no use.

    Args:
        query, key, value: [B, H, L, D], keys and values perhaps of fewer heads, which groups of queries share.
        seen: bool [B or 1, 1, L, L]. dropout: p, below 1.

    Returns:
        [B, H, L, D].
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    rows, heads, length, _ = query.shape
    kept = keep((rows, heads, length, key.shape[2]), dropout)
    made: Tensor = _Dropped.apply(query * scaling, key, value / (1 - dropout), seen.expand(rows, -1, -1, -1), kept)
    return made


def keep(shape: tuple[int, ...], dropout: float) -> Tensor:
    """bool, True with the probability 1 - p, to 1/65536: four to a number of torch's generator, which is what costs."""
    count = torch.Size(shape).numel()
    drawn = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return (drawn.view(torch.int16) >= round(dropout * 2**16) - 2**15)[:count].view(shape)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        query, _, value, *_ = given
        ctx.save_for_backward(*given)
        out = torch.empty(*query.shape[:3], value.shape[-1], dtype=value.dtype)
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(given[-1]):
                out[block] = _attend(block, *given)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, seen, kept = ctx.saved_tensors
        gradients = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in tensors]
        whole = slice(None), slice(None)
        for block in _blocks(kept):
            parts = [one[block].detach().requires_grad_() for one in tensors]
            with torch.enable_grad(), torch.autocast("cpu", enabled=False):
                again = _attend(whole, parts[0], parts[1], parts[2], seen[block[0]], kept[block])
            for gradient, part in zip(gradients, torch.autograd.grad(again, parts, above[block]), strict=True):
                gradient[block] = part
        return (*gradients, None, None)


def _attend(
    block: tuple[slice, slice], query: Tensor, key: Tensor, value: Tensor, seen: Tensor, kept: Tensor
) -> Tensor:
    scores = query[block] @ key[block].transpose(-1, -2)
    scores = scores.masked_fill(~seen[block[0]], torch.finfo(scores.dtype).min)
    shares = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (shares * kept[block]) @ value[block]


def _blocks(shares: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and heads that fit."""
    rows, heads, queries, keys = shares.shape
    at_once = max(1, _BLOCK // (queries * keys))
    few, many = min(heads, at_once), max(1, at_once // heads)
    for row in range(0, rows, many):
        for head in range(0, heads, few):
            yield slice(row, row + many), slice(head, head + few)
