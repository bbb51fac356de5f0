"""What to aim at behind compressed blocks, against least squares written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcomp.errors import NumericalError
from llmcomp.methods.retarget import retarget


def inputs(tokens: int, width: int, seed: int, noise: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """(weight [5, width], the source's inputs [tokens, width], those of now), float64."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator, dtype=torch.float64)
    source = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixed
    now = source + noise * torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixed
    return torch.randn(5, width, generator=generator, dtype=torch.float64), source, now


def written_out(weight: Tensor, source: Tensor, now: Tensor, damping: float) -> np.ndarray:
    """Row by row: outputs of the source, and sqrt(d) times the weight itself, by numpy's least squares."""
    d = damping * float((now.T @ now).diagonal().mean())
    left = np.vstack([now.numpy(), np.sqrt(d) * np.eye(now.shape[1])])
    rows = []
    for row in weight.numpy():
        wanted = np.concatenate([source.numpy() @ row, np.sqrt(d) * row])
        rows.append(np.linalg.lstsq(left, wanted, rcond=None)[0])
    return np.stack(rows)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("tokens", [7, 40])  # fewer than columns, and more
def test_it_is_least_squares(tokens: int, damping: float) -> None:
    weight, source, now = inputs(tokens, 12, 0)
    found = retarget(weight, now.T @ now, source.T @ now, damping)
    assert found.numpy() == pytest.approx(written_out(weight, source, now, damping), rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_equal_inputs_nothing_moves(dtype: torch.dtype) -> None:
    weight, source, _ = inputs(30, 16, 1)
    gram = (source.T @ source).float()
    assert torch.equal(retarget(weight.to(dtype), gram, gram), weight.to(dtype))


def test_inputs_that_were_never_seen() -> None:
    weight = inputs(3, 8, 2)[0]
    assert torch.equal(retarget(weight, torch.zeros(8, 8), torch.zeros(8, 8)), weight)


def test_nan_is_an_error() -> None:
    weight = inputs(3, 8, 2)[0]
    with pytest.raises(NumericalError):
        retarget(weight, torch.full((8, 8), torch.nan), torch.zeros(8, 8))


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 99), st.floats(0, 2))
@settings(max_examples=40, deadline=None)
def test_outputs_are_nearer_to_the_sources(tokens: int, width: int, seed: int, noise: float) -> None:
    weight, source, now = inputs(tokens, width, seed, noise)
    moved, wanted = retarget(weight, now.T @ now, source.T @ now), source @ weight.T
    before, after = (now @ weight.T - wanted).norm(), (now @ moved.T - wanted).norm()
    assert float(after) <= float(before) * (1 + 1e-9) + 1e-9 * float(wanted.norm())
