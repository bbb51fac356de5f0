"""Activations in 8 bits, as readers of a W8A8 checkpoint compute them: each token scaled by its own largest entry.

Plain transformers simulates this on a CPU (compressed-tensors quantizes and dequantizes each input); vLLM
multiplies integers. What is computed here is the reader's own arithmetic, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def quantized(inputs: Tensor) -> Tensor:
    """Inputs rounded to int8 and back: scale = max|x| / 127.5 of each token, in the inputs' own dtype.

    Args:
        inputs: floating [batch, tokens, features]. Of a tensor of two dimensions compressed-tensors takes one
            scale for all, so this does too.
    """
    features = tuple(range(2, inputs.ndim)) or tuple(range(inputs.ndim))
    scale = inputs.abs().amax(features, keepdim=True).div_(127.5)
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return (inputs / scale).clamp_(-128, 127).round_().mul_(scale)


def quantize_inputs(module: nn.Module) -> RemovableHandle:
    """Let a linear compute with quantized inputs until the handle is removed."""

    def hook(_: nn.Module, positional: tuple[Any, ...]) -> tuple[Any, ...]:
        return (quantized(positional[0]), *positional[1:])

    return module.register_forward_pre_hook(hook)


@contextmanager
def quantizing_inputs(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let linears compute with quantized inputs while it lasts."""
    handles = [quantize_inputs(module) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
