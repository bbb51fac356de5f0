"""Gram matrices against float64: accurate from bfloat16 inputs, with outliers, for every width; NaN is named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.layers import inputs
from torch import Tensor

from llmcomp.calibration.stats import GramAccumulator, InputStats
from llmcomp.errors import NumericalError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def accumulated(*parts: Tensor) -> InputStats:
    accumulator = GramAccumulator()
    for part in parts:
        accumulator.add(part)
    return accumulator.finish("layer")


def exact_gram(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


def error(found: Tensor, x: Tensor) -> float:
    """Largest error of an entry relative to the sizes of its two channels, so that small ones count as well."""
    exact = exact_gram(x)
    size = exact.diagonal().sqrt().clamp_min(1e-30)
    return float(((found.double() - exact).abs() / torch.outer(size, size)).max())


def gram(stats: InputStats) -> Tensor:
    assert stats.gram is not None
    return stats.gram


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", [False, True])
def test_as_accurate_as_float32_whatever_the_inputs_dtype(dtype: torch.dtype, outliers: bool) -> None:
    x = inputs(5000, 96, 0, spread=0.3)
    if outliers:
        x[:, ::17] *= 1000
    x = x.to(dtype)
    stats = accumulated(x[:2500], x[2500:2501], x[2501:])
    assert gram(stats).dtype == torch.float32
    assert error(gram(stats), x) < 1e-5
    if dtype is torch.bfloat16:
        # The trap: a product of bfloat16 inputs comes back in bfloat16, and sums of such are worse still.
        assert error(x.T @ x, x) > 1e-3


@pytest.mark.parametrize("width", [1, 2, 511, 512, 513, 1024, 1100])
def test_both_triangles_for_every_width(width: int) -> None:
    x = inputs(64, width, width)
    stats = accumulated(x[:40], x[40:])
    assert torch.equal(gram(stats), gram(stats).T)
    assert error(gram(stats), x) < 2e-6
    assert torch.equal(stats.diagonal, gram(stats).diagonal())


def test_more_tokens_than_are_widened_at_a_time() -> None:
    x = inputs(4100, 16, 1)
    assert error(gram(accumulated(x)), x) < 2e-6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 20), st.integers(0, 999))
def test_how_tokens_are_cut_into_batches_does_not_matter(sizes: list[int], width: int, seed: int) -> None:
    x = inputs(sum(sizes) + 1, width, seed)
    parts = x.split([*sizes, 1])
    stats = accumulated(*parts)
    assert stats.tokens == len(x)
    assert error(gram(stats), x) < 2e-6
    assert torch.equal(stats.absmax, x.abs().amax(0))
    assert torch.allclose(stats.norms.double(), x.double().norm(dim=0), rtol=1e-5)


def test_maxima_see_both_signs_and_dead_channels() -> None:
    x = torch.tensor([[1.0, -5.0, 0.0], [-2.0, 4.0, 0.0]])
    stats = accumulated(x.bfloat16())
    assert stats.absmax.tolist() == [2.0, 5.0, 0.0]
    assert stats.absmax.dtype == torch.float32
    assert gram(stats).tolist() == [[5.0, -13.0, 0.0], [-13.0, 41.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 600])
def test_what_is_not_finite_is_an_error_that_names_the_layer(value: float, column: int) -> None:
    x = inputs(20, 700, 2)
    x[7, column] = value
    accumulator = GramAccumulator()
    accumulator.add(x[:5])
    accumulator.add(x[5:])
    with pytest.raises(NumericalError, match=r"inputs of model\.layers\.3\.mlp\.down_proj hold NaN or Inf"):
        accumulator.finish("model.layers.3.mlp.down_proj")


def test_no_token_at_all_is_an_error_that_names_the_layer() -> None:
    with pytest.raises(NumericalError, match=r"No calibration token has reached lm_head\."):
        GramAccumulator().finish("lm_head")


def test_inputs_are_left_as_they_were() -> None:
    x = inputs(30, 8, 3)
    before = x.clone()
    accumulated(x)
    assert torch.equal(x, before)
