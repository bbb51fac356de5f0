"""Rounded activations: the reader's own arithmetic to the bit, and near a slow float64 reference."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from llmcomp.activations import quantize_inputs, quantized

READER = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Tokens of very different size, one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(*shape, generator=generator) * torch.logspace(-3, 2, shape[-2])[:, None]
    made[..., 1, :] = 0
    return made.to(dtype)


def as_the_reader(x: Tensor) -> Tensor:
    module = nn.Linear(x.shape[-1], 1)
    module.quantization_status = None
    return forward_quantize(module, x, "input", READER)


def reference(x: Tensor) -> Tensor:
    """Each token alone, in float64: 255 steps from -max|x| to max|x|."""
    found = torch.empty(x.shape, dtype=torch.float64)
    for batch in range(x.shape[0]):
        for token in range(x.shape[1]):
            row = x[batch, token].double()
            step = 2 * row.abs().max() / 255
            if step == 0:
                found[batch, token] = 0
                continue
            found[batch, token] = torch.tensor([max(-128, min(127, round(v / float(step)))) for v in row.tolist()])
            found[batch, token] *= step
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 16), (1, 2, 7), (3, 8), (2, 4, 3, 8)], ids=str)
def test_it_is_what_the_reader_computes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = inputs(*shape, dtype=dtype)
    assert torch.equal(quantized(x), as_the_reader(x))
    assert quantized(x).dtype == dtype and not torch.equal(quantized(x), x)


@given(st.integers(1, 3), st.integers(2, 6), st.integers(1, 40), st.integers(0, 2**16))
def test_it_is_near_the_reference(batch: int, tokens: int, width: int, seed: int) -> None:
    x = inputs(batch, tokens, width, seed=seed)
    step = (2 * x.double().abs().amax(-1, keepdim=True) / 255).clamp_min(1e-300)
    found, exact = quantized(x).double(), x.double() / step
    # The largest entry is 127.5 steps, so it lies at a half, as may others: float32 may round them the other way.
    halfway = (exact.abs().frac() - 0.5).abs() < 1e-3
    assert ((found - reference(x)).abs() <= step * torch.where(halfway, 1.001, 1e-3)).all()
    assert ((found - x.double()).abs() <= step * 0.502).all()


def test_tokens_do_not_see_each_other() -> None:
    x = inputs(2, 6, 32)
    together = quantized(x)
    for token in range(6):
        assert torch.equal(together[:, token : token + 1], quantized(x[:, token : token + 1]))


def test_a_linear_reads_rounded_inputs_until_told_otherwise() -> None:
    linear, x = nn.Linear(16, 4), inputs(1, 3, 16)
    plain = linear(x)
    handle = quantize_inputs(linear)
    assert torch.equal(linear(x), nn.functional.linear(quantized(x), linear.weight, linear.bias))
    assert not torch.equal(linear(x), plain)
    handle.remove()
    assert torch.equal(linear(x), plain)
