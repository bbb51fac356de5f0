"""Rounded activations: the reader's own arithmetic to the bit, and near a slow float64 reference."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from llmcomp.activations import quantize_inputs, quantized, static_scale

READER = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
STATIC = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="tensor", dynamic=False)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Tokens of very different size, one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(*shape, generator=generator) * torch.logspace(-3, 2, shape[-2])[:, None]
    made[..., 1, :] = 0
    return made.to(dtype)


def as_the_reader(x: Tensor, scale: Tensor | None = None) -> Tensor:
    module = nn.Linear(x.shape[-1], 1)
    module.quantization_status = None
    module.input_scale = scale
    return forward_quantize(module, x, "input", READER if scale is None else STATIC)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 16), (3, 8), (2, 4, 3, 8)], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.3], ids=["all of the range", "clipped"])
def test_by_a_fixed_scale_too(shape: tuple[int, ...], dtype: torch.dtype, share: float) -> None:
    x = inputs(*shape, dtype=dtype)
    scale = static_scale(x.abs().amax().float() * share, dtype)
    assert scale.shape == (1,) and scale.dtype == dtype
    assert torch.equal(quantized(x, scale), as_the_reader(x, scale))
    assert quantized(x, scale).dtype == dtype and not torch.equal(quantized(x, scale), x)


def test_the_fixed_scale_is_the_readers_own() -> None:
    largest = torch.tensor([0.5, 3.0, 2.0])
    for dtype in DTYPES:
        wanted, _ = calculate_qparams(-torch.ones(1), largest.amax().reshape(1), STATIC)
        assert torch.equal(static_scale(largest, dtype), wanted.to(dtype))
        zeros = torch.zeros(1, dtype=dtype)
        assert torch.equal(static_scale(zeros.float(), dtype), calculate_qparams(zeros, zeros, STATIC)[0])


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**16), st.sampled_from(DTYPES))
def test_a_fixed_scale_covers_what_it_was_made_of(tokens: int, width: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) * torch.logspace(-2, 1, width)
    x = x.to(dtype)
    assume(float(x.abs().max()) > 0.05)  # else the scale is among fp16's smallest numbers, which have fewer digits
    scale = static_scale(x.abs().amax(0).float(), dtype)
    found, step = quantized(x, scale).double(), float(scale)
    exact = (x.double() / step).round().clamp(-128, 127) * step
    # In bf16 quotient, scale and product have eight bits each: the largest entry may be half a step further away.
    slack = {torch.float32: 1e-3, torch.float16: 0.12, torch.bfloat16: 0.6}[dtype]
    assert ((found - x.double()).abs() <= step * (0.5 + slack)).all()
    assert ((found - exact).abs() <= step * (1 + slack)).all()
    assert (found.abs() <= 128 * step * (1 + slack / 10)).all()


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
