"""SmoothQuant's scales against a slow search in float64 over the inputs themselves; what they are, and gain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loud_inputs import inputs, own, slow_error, stats_of, weights
from torch import Tensor

from llmcomp.activations import quantized, static_scale
from llmcomp.methods.smoothquant import STRENGTHS, input_noise, search_migration
from llmcomp.schemes import Scheme

A8 = Scheme(8, activations="int8-static")


def slow_noise(parts: list[Tensor], x: Tensor, scale: Tensor) -> float:
    """d²/12 for each entry of x / s, or all of it where that is less, times what the weights make of it."""
    divided = x.double() / scale.double()
    step = 2 * float(divided.abs().max()) / 255
    total = 0.0
    for channel in range(x.shape[1]):
        lost = min(len(x) * step**2 / 12, float(divided[:, channel].square().sum()))
        total += lost * sum(float((part[:, channel].double() * scale[channel]).square().sum()) for part in parts)
    return total


def slow_search(parts: list[Tensor], x: Tensor, channels: Tensor) -> tuple[Tensor, float]:
    """The paper's family max|x|^a / max|w|^(1-a), rounded to powers of two, channel by channel in plain Python."""
    width, numbers = x.shape[1], channels.tolist()
    loudest, widest = [0.0] * width, [0.0] * width
    for channel in range(width):
        for other in range(width):
            if numbers[other] == numbers[channel]:
                loudest[channel] = max(loudest[channel], float(x[:, other].double().abs().max()))
                widest[channel] = max(widest[channel], *(float(part[:, other].double().abs().max()) for part in parts))
    candidates = [torch.ones(width)]
    for strength in STRENGTHS:
        sizes = torch.tensor([x**strength / w ** (1 - strength) for x, w in zip(loudest, widest, strict=True)]).log2()
        candidates.append(torch.tensor([2.0 ** max(-6, min(6, round(float(e)))) for e in sizes - sizes.mean()]))
    errors = [slow_error(parts, [A8] * len(parts), x, scale) + slow_noise(parts, x, scale) for scale in candidates]
    least = min(range(len(errors)), key=errors.__getitem__)
    return candidates[least], errors[least]


def rounded_output_error(weight: Tensor, x: Tensor, scale: Tensor) -> float:
    """||X W' - Q(X / s) (W s)'||², of inputs that are really rounded."""
    divided = x / scale
    read = quantized(divided, static_scale(divided.abs(), torch.float32))
    return float(((read - divided).double() @ (weight * scale).double().T).square().sum())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_it_finds_what_a_slow_search_finds(seed: int, shared: bool) -> None:
    x, parts = inputs(200, 64, seed), [weights(40, 64, seed), weights(24, 64, seed + 7)]
    channels = own(64) % 32 if shared else own(64)
    found = search_migration(parts, [A8, A8], stats_of(x), channels)
    expected, least = slow_search(parts, x, channels)
    assert torch.equal(found, expected) and not bool((found == 1).all())
    assert slow_error(parts, [A8, A8], x, found) + slow_noise(parts, x, found) <= least * (1 + 1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_noise_is_what_rounding_really_adds(seed: int) -> None:
    x, weight = inputs(2000, 48, seed), weights(32, 48, seed)
    x[:, 3] *= 1e-4  # rounded to zero throughout
    scale = torch.exp2(torch.arange(48).float() % 2 - 1)
    for one in (torch.ones(48), scale):
        said = input_noise([weight], stats_of(x), one)
        assert said == pytest.approx(slow_noise([weight], x, one), rel=1e-4)
        assert said == pytest.approx(rounded_output_error(weight, x, one), rel=0.1)


def test_loud_channels_cost_the_quiet_ones_less() -> None:
    x, weight = inputs(400, 64, 3), weights(48, 64, 3)
    scale = search_migration([weight], [A8], stats_of(x), own(64))
    assert rounded_output_error(weight, x, scale) < 0.3 * rounded_output_error(weight, x, torch.ones(64))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16), width=st.sampled_from((32, 64)), rows=st.integers(1, 256), loud=st.integers(2, 40),
    shared=st.booleans(), dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
)  # fmt: skip
def test_scales_fold_without_a_trace_and_are_never_worse(
    seed: int, width: int, rows: int, loud: int, shared: bool, dtype: torch.dtype
) -> None:
    x, weight = inputs(50, width, seed, loud), weights(rows, width, seed).to(dtype)
    channels = own(width) % (width // 2) if shared else own(width)
    scale = search_migration([weight], [A8], stats_of(x), channels)
    assert scale.dtype == torch.float32 and float(scale.log2().abs().max()) <= 6
    gain = weight[0].abs() + 1  # of a norm that takes the division over
    assert torch.equal((gain / scale).to(dtype) * scale, gain.float())
    if shared:
        assert torch.equal(scale[: width // 2], scale[width // 2 :])
    full = weight.float()
    plain = slow_error([full], [A8], x, torch.ones(width)) + slow_noise([full], x, torch.ones(width))
    assert slow_error([full], [A8], x, scale) + slow_noise([full], x, scale) <= plain * (1 + 1e-4)


def test_silent_inputs_are_not_scaled_and_a_silent_channel_does_not_spoil_the_others() -> None:
    weight = weights(8, 32, 0)
    assert torch.equal(search_migration([weight], [A8], stats_of(torch.zeros(10, 32)), own(32)), torch.ones(32))
    x = inputs(100, 32, 0)
    x[:, 5] = 0
    scale = search_migration([weight], [A8], stats_of(x), own(32))
    assert bool(torch.isfinite(scale).all()) and float(scale[::8].min()) >= float(scale[1:5].max())
