"""AWQ's scales against a slow search in float64 over the inputs themselves; what they must be, and must not cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loud_inputs import inputs, own, slow_error, stats_of, weights
from torch import Tensor

from llmcomp.errors import BadRecipe
from llmcomp.methods.awq import AWQConfig, AWQGPTQConfig, awq, awq_gptq, search_scale
from llmcomp.methods.gptq import gptq
from llmcomp.methods.rtn import rtn_clip
from llmcomp.schemes import Scheme

G32 = Scheme(3, 32)


def slow_search(
    parts: list[Tensor], schemes: list[Scheme], x: Tensor, channels: Tensor, steps: int
) -> tuple[Tensor, float]:
    """The paper's family r^a, rounded to powers of two, channel by channel in plain Python."""
    members = {c: [k for k, other in enumerate(channels.tolist()) if other == c] for c in channels.tolist()}
    sizes = []
    for channel in channels.tolist():
        power = sum(float(x[:, k].double().square().sum()) for k in members[channel]) / len(members[channel])
        sizes.append(torch.tensor(power, dtype=torch.float64).log2().item() / 2)
    middle = sum(sizes) / len(sizes)
    best, least = torch.ones(len(sizes)), slow_error(parts, schemes, x, torch.ones(len(sizes)))
    for step in range(1, steps + 1):
        exponents = [max(-6, min(6, round((size - middle) * step / steps))) for size in sizes]
        scale = torch.tensor([2.0**e for e in exponents])
        error = slow_error(parts, schemes, x, scale)
        if error < least:
            best, least = scale, error
    return best, least


@pytest.mark.parametrize("scheme", [G32, Scheme(4, None), Scheme(2, 32, False)], ids=lambda s: s.label)
@pytest.mark.parametrize("seed", range(3))
def test_it_finds_what_a_slow_search_finds(scheme: Scheme, seed: int) -> None:
    x, parts = inputs(200, 64, seed), [weights(40, 64, seed), weights(24, 64, seed + 7)]
    schemes = [scheme, scheme]
    found = search_scale(parts, schemes, stats_of(x), own(64), AWQConfig())
    expected, least = slow_search(parts, schemes, x, own(64), 10)
    assert slow_error(parts, schemes, x, found) <= least * (1 + 1e-4)
    assert torch.equal(found, expected)
    assert not bool((found == 1).all())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16), width=st.sampled_from((32, 64)), rows=st.integers(1, 300),
    loud=st.integers(2, 40), shared=st.booleans(), bits=st.sampled_from((2, 3, 4, 8)),
)  # fmt: skip
def test_scales_are_powers_of_two_shared_and_never_worse(
    seed: int, width: int, rows: int, loud: int, shared: bool, bits: int
) -> None:
    x, weight = inputs(50, width, seed, loud), weights(rows, width, seed)
    channels = own(width) % (width // 2) if shared else own(width)
    scheme = Scheme(bits, 32)
    scale = search_scale([weight], [scheme], stats_of(x), channels, AWQConfig(4))
    assert torch.equal(scale.log2(), scale.log2().round()) and float(scale.log2().abs().max()) <= 6
    if shared:
        assert torch.equal(scale[: width // 2], scale[width // 2 :])
    if rows <= 256:  # beyond, the error is that of evenly spaced rows
        plain = slow_error([weight], [scheme], x, torch.ones(width))
        assert slow_error([weight], [scheme], x, scale) <= plain * (1 + 1e-4)


def test_silent_inputs_are_not_scaled() -> None:
    x = torch.zeros(10, 32)
    assert torch.equal(search_scale([weights(8, 32, 0)], [G32], stats_of(x), own(32), AWQConfig()), torch.ones(32))


def test_one_silent_channel_does_not_spoil_the_others() -> None:
    x = inputs(100, 32, 0)
    x[:, 5] = 0
    scale = search_scale([weights(8, 32, 0)], [G32], stats_of(x), own(32), AWQConfig())
    assert bool(torch.isfinite(scale).all()) and float(scale[::8].min()) >= float(scale[1:5].max())


@pytest.mark.parametrize(("method", "plain"), [(awq, rtn_clip), (awq_gptq, gptq)])
def test_scaling_lowers_the_error_where_channels_differ(method: object, plain: object) -> None:
    """Both read a weight and statistics that are scaled already, and measure the error that remains."""
    x, weight = inputs(400, 64, 3), weights(48, 64, 3)
    stats = stats_of(x)
    scale = search_scale([weight], [G32], stats, own(64), AWQConfig())
    stats.scale_(scale)
    scaled = method(weight * scale, stats, G32, torch.float32)  # type: ignore[operator]
    before = plain(weight, stats_of(x), G32, torch.float32)  # type: ignore[operator]
    exact = (x.double() @ (weight.double() - scaled.weight.dense().double() / scale.double()).T).square().sum(0)
    assert torch.allclose(scaled.row_error, exact, rtol=1e-3)
    assert float(scaled.row_error.sum()) < 0.9 * float(before.row_error.sum())


def test_statistics_are_those_of_the_divided_inputs() -> None:
    x = inputs(100, 32, 1)
    scale = torch.exp2(torch.arange(32).float() % 5 - 2)
    stats, divided = stats_of(x), stats_of(x / scale)
    stats.scale_(scale)
    assert stats.gram is not None and divided.gram is not None
    assert torch.equal(stats.gram, divided.gram)
    assert torch.equal(stats.diagonal, divided.diagonal) and torch.equal(stats.absmax, divided.absmax)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(BadRecipe, match="AWQ's steps must be 1 or more, got 0"):
        AWQConfig(0)
    with pytest.raises(BadRecipe, match="AWQ's steps"):
        AWQGPTQConfig(steps=0)
    with pytest.raises(BadRecipe, match="GPTQ's damping"):
        AWQGPTQConfig(damping=0)
