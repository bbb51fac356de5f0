"""GPTAQ: least squares towards the source's outputs in float64, and GPTQ where nothing is to be made up for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcomp.calibration.stats import GramAccumulator, InputStats
from llmcomp.errors import BadRecipe
from llmcomp.methods.gptaq import GPTAQConfig, aim, gptaq
from llmcomp.methods.gptq import gptq
from llmcomp.schemes import Scheme


def case(width: int, seed: int, noise: float, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """(weight [24, width], the source's inputs [tokens, width], those of now), float32."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    source = torch.randn(tokens, width, generator=generator) @ mixed
    now = source + noise * torch.randn(tokens, width, generator=generator) @ mixed
    return torch.randn(24, width, generator=generator), source, now


def seen(inputs: Tensor) -> InputStats:
    stats = GramAccumulator()
    stats.add(inputs)
    return stats.finish("linear")


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_what_it_aims_at(alpha: float) -> None:
    weight, source, now = case(32, 0, 0.3)
    config = GPTAQConfig(alpha=alpha)
    found = aim(weight, now.T @ now, source.T @ now, config)
    far, near, wide = source.double().numpy(), now.double().numpy(), weight.double().numpy()
    ridge = np.sqrt(config.damping * (near**2).sum(0).mean()) * np.eye(32)
    step = np.linalg.lstsq(np.vstack([near, ridge]), np.vstack([(far - near) @ wide.T, np.zeros((32, 24))]), rcond=None)
    assert found.numpy() == pytest.approx(wide + alpha * step[0].T, abs=2e-4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), alpha=st.floats(0, 1), bits=st.sampled_from([2, 3, 4, 8]))
def test_with_the_source_s_inputs_it_is_gptq(seed: int, alpha: float, bits: int) -> None:
    weight, source, _ = case(32, seed, 0.0)
    gram, scheme = source.T @ source, Scheme(bits, 32)
    aimed = aim(weight, gram, gram.clone(), GPTAQConfig(alpha=alpha))
    found, plain = (method(weight, seen(source), scheme, torch.float32).weight.dense() for method in (gptaq, gptq))
    assert torch.equal(aimed, weight) and torch.equal(found, plain)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([4, 8]))
def test_outputs_come_nearer_to_the_source_s_the_farther_it_goes(seed: int, bits: int) -> None:
    weight, source, now = case(32, seed, 0.4)
    wanted = source.double() @ weight.double().T

    def apart(alpha: float) -> float:
        aimed = aim(weight, now.T @ now, source.T @ now, GPTAQConfig(alpha=alpha))
        found = gptaq(aimed, seen(now), Scheme(bits, 32), torch.float32).weight.dense().double()
        return float((now.double() @ found.T - wanted).norm())

    assert apart(1.0) < apart(0.25) < apart(0.0)


@pytest.mark.parametrize("wrong", [{"alpha": -0.1}, {"alpha": 1.5}, {"alpha": float("nan")}, {"damping": 0.0}])
def test_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadRecipe, match="must lie in"):
        GPTAQConfig(**wrong)  # type: ignore[arg-type]
