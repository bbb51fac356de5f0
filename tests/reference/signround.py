"""Fake quantization as the SignRound paper defines it, in float64, with autograd's own straight-through rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    """round(x), whose gradient is taken as 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def fake_quantized(
    latent: Tensor, offset: Tensor, scale: Tensor, zero: Tensor, shift: Tensor, qmin: int, qmax: int
) -> Tensor:
    """(clamp(round(latent / scale + offset + z)) - z) scale, z = round(zero + shift).

    Args:
        latent, offset: [rows, groups, size]; scale, zero, shift: [rows, groups, 1]; all float64.
    """
    whole = _StraightThrough.apply(zero + shift)
    points = _StraightThrough.apply(latent / scale + offset + whole).clamp(qmin, qmax)
    return (points - whole) * scale
