"""Activations in 8 bits, as readers of a W8A8 checkpoint compute them.

`int8-dynamic`: each token is scaled by its own largest entry. `int8-static`: one scale for everything that a linear
will ever read, found in calibration and stored beside its weight as `input_scale`.

Plain transformers simulates this on a CPU (compressed-tensors quantizes and dequantizes each input); vLLM
multiplies integers. What is computed here is the reader's own arithmetic, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

STEPS = 127.5  # from zero to the largest entry, as compressed-tensors counts them


def integers_of(inputs: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Inputs rounded to int8, and what one step of them is.

    Args:
        inputs: floating [batch, tokens, features].
        scale: [1]; None for max|x| / 127.5 of each token, in the inputs' own dtype. Of a tensor of two dimensions
            compressed-tensors then takes one scale for all, so this does too.

    Returns:
        Integers in [-128, 127], in the inputs' dtype, and the scale, which broadcasts to them.
    """
    if scale is None:
        features = tuple(range(2, inputs.ndim)) or tuple(range(inputs.ndim))
        scale = _above_zero(inputs.abs().amax(features, keepdim=True).div_(STEPS))
    return (inputs / scale).clamp_(-128, 127).round_(), scale


def quantized(inputs: Tensor, scale: Tensor | None = None) -> Tensor:
    """Inputs rounded to int8 and back, in the scale's dtype; arguments as of `integers_of`."""
    integers, scale = integers_of(inputs, scale)
    return integers.to(scale.dtype).mul_(scale)


def static_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale [1], in the dtype it is stored in, that serves inputs up to max(`largest`)."""
    return _above_zero((largest.amax().float() / STEPS).to(dtype).reshape(1))


def _above_zero(scale: Tensor) -> Tensor:
    """compressed-tensors' own way with inputs that are all zero."""
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def quantize_inputs(module: nn.Module, rounded: Callable[[Tensor], Tensor] = quantized) -> RemovableHandle:
    """Let a linear compute with rounded inputs until the handle is removed."""

    def hook(_: nn.Module, positional: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded(positional[0]), *positional[1:])

    return module.register_forward_pre_hook(hook)
