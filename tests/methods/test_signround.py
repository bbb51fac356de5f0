"""SignRound: against autograd of the plain definition in float64, and what must hold of any start and any loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from reference.layers import inputs, stats_of, weights
from reference.signround import fake_quantized
from torch import Tensor

from llmcomp.errors import BadRecipe, NumericalError
from llmcomp.methods.gptq import GPTQConfig, gptq
from llmcomp.methods.rtn import rtn, rtn_clip
from llmcomp.methods.signround import Rounding, SignRoundConfig, Tuned, clip_start, gptq_start, tune
from llmcomp.schemes import BITS, Scheme
from llmcomp.weights import QuantizedWeight

schemes = st.builds(Scheme, st.sampled_from(BITS), st.sampled_from((None, 32)), st.booleans())
dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
STARTS = {"rtn-clip": clip_start, "gptq": gptq_start}


class Linear:
    """A 'block' of one linear: its loss is that of X W', over four windows of 32 tokens."""

    def __init__(self, weight: Tensor, seed: int) -> None:
        self.x = inputs(128, weight.shape[1], seed, spread=0.4)
        self.target = self.x @ weight.float().t()
        self.calls = 0

    def loss(self, dense: Mapping[str, Tensor]) -> float:
        return float((self.x @ dense["w"].t() - self.target).square().sum(dtype=torch.float64))

    def descend(self, dense: Mapping[str, Tensor], batch: Sequence[int]) -> dict[str, Tensor]:
        self.calls += 1
        rows = torch.cat([torch.arange(32 * one, 32 * one + 32) for one in batch])
        x, target = self.x[rows], self.target[rows]
        return {"w": (x @ dense["w"].t() - target).t() @ x}

    def tuned(self, weight: Tensor, start: QuantizedWeight, config: SignRoundConfig, seed: int = 0) -> Tuned:
        return tune({"w": (weight, start)}, self.descend, self.loss, [[0, 1], [2, 3]], config, seed)


@given(schemes, dtypes, st.sampled_from(sorted(STARTS)), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_first_iterate_is_the_start_to_the_bit(scheme: Scheme, dtype: torch.dtype, start: str, seed: int) -> None:
    weight, x = weights(8, 64, seed, dtype), inputs(200, 64, seed)
    found = STARTS[start](weight, stats_of(x), scheme, dtype).weight
    rounding = Rounding(weight, found)
    again = rounding.quantized()
    assert torch.equal(again.values, found.values)
    assert torch.equal(again.scale, found.scale)
    assert (again.zero_point is None) == (found.zero_point is None)
    if again.zero_point is not None and found.zero_point is not None:
        assert torch.equal(again.zero_point, found.zero_point)
    assert torch.equal(rounding.dense(), found.dense().float())


def near_half(x: Tensor) -> bool:
    """Whether float32 may round one of some numbers to the other side."""
    return bool(((x - x.floor() - 0.5).abs() < 1e-5).any())


@given(schemes, st.integers(0, 1000), st.integers(0, 30))
@settings(max_examples=40, deadline=None)
@example(Scheme(3, 32, False), 588, 20)
def test_gradients_are_autograds_of_the_plain_definition(scheme: Scheme, seed: int, steps: int) -> None:
    weight = weights(6, 64, seed)
    rounding = Rounding(weight, rtn(weight, None, scheme, torch.float32).weight)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):  # somewhere on its way
        rounding.step(torch.randn(6, 64, generator=generator), 0.02)
    gradient = torch.randn(6, 64, generator=generator)
    offset = rounding._offset.double().requires_grad_()
    factor = rounding._factor.double().requires_grad_()
    zero = torch.zeros_like(factor) if rounding._zero0 is None else rounding._zero0.double()
    shift = (torch.zeros_like(factor) if rounding._shift is None else rounding._shift.double()).requires_grad_()
    scale = rounding._scale0.double() * factor
    points = rounding._latent.double() / scale + offset + (zero + shift).round()
    assume(not near_half(points) and not near_half(zero + shift))
    dense = fake_quantized(rounding._latent.double(), offset, scale, zero, shift, scheme.qmin, scheme.qmax)
    (dense * gradient.reshape(dense.shape).double()).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(rounding.dense().double(), dense.detach().reshape(6, 64), rtol=1e-5, atol=1e-7)
    by_offset, by_factor, by_shift = rounding.gradients(gradient)
    torch.testing.assert_close(by_offset.double(), offset.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(by_factor.double(), factor.grad, rtol=1e-4, atol=1e-5)
    if by_shift is not None:
        torch.testing.assert_close(by_shift.double(), shift.grad, rtol=1e-4, atol=1e-5)


@given(schemes, dtypes, st.integers(0, 1000), st.integers(1, 12), st.sampled_from((0.0, 0.003, 0.3, 1.0)))
@settings(max_examples=40, deadline=None)
def test_never_worse_than_the_start_and_always_on_the_grid(
    scheme: Scheme, dtype: torch.dtype, seed: int, iterations: int, rate: float
) -> None:
    weight = weights(8, 64, seed, dtype)
    start, block = rtn(weight, None, scheme, dtype).weight, Linear(weight, seed)
    config = SignRoundConfig(iterations, learning_rate=rate)
    tuned = block.tuned(weight, start, config)
    found = tuned.weights["w"]
    before = block.loss({"w": start.dense().float()})
    assert tuned.before == before
    assert tuned.after == block.loss({"w": found.dense().float()}) <= before
    assert block.calls == iterations
    assert int(found.values.min()) >= scheme.qmin
    assert int(found.values.max()) <= scheme.qmax
    assert found.scale.dtype == dtype  # so it is stored as it was tuned
    assert bool(found.scale.isfinite().all()) and bool((found.scale != 0).all())
    if found.zero_point is not None:
        assert int(found.zero_point.min()) >= scheme.qmin
        assert int(found.zero_point.max()) <= scheme.qmax


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "rate", "share"), [(2, 0.01, 0.8), (3, 0.002, 0.9), (4, 0.002, 0.95)])
def test_it_learns(bits: int, rate: float, share: float, symmetric: bool) -> None:
    """One ill-conditioned linear wants smaller steps than a block does."""
    weight, scheme = weights(32, 64, 3), Scheme(bits, 32, symmetric)
    block = Linear(weight, 3)
    start = rtn_clip(weight, stats_of(block.x), scheme, torch.float32).weight
    tuned = block.tuned(weight, start, SignRoundConfig(100, learning_rate=rate))
    assert tuned.after < share * tuned.before


def test_one_seed_gives_one_result_and_another_another() -> None:
    weight, scheme = weights(16, 64, 5), Scheme(3, 32)
    start, block = rtn(weight, None, scheme, torch.float32).weight, Linear(weight, 5)
    first, same, other = (block.tuned(weight, start, SignRoundConfig(20), seed).weights["w"] for seed in (0, 0, 1))
    assert torch.equal(first.values, same.values) and torch.equal(first.scale, same.scale)
    assert not torch.equal(first.values, other.values)


def test_starts_are_the_methods_of_their_names() -> None:
    weight, x, scheme = weights(16, 64, 1), inputs(200, 64, 1), Scheme(3, 32)
    clip = clip_start(weight, stats_of(x), scheme, torch.float32)
    assert torch.equal(clip.weight.values, rtn_clip(weight, stats_of(x), scheme, torch.float32).weight.values)
    damped = gptq_start(weight, stats_of(x), scheme, torch.float32, SignRoundConfig(damping=0.1))
    wanted = gptq(weight, stats_of(x), scheme, torch.float32, GPTQConfig(damping=0.1))
    assert torch.equal(damped.weight.values, wanted.weight.values)
    assert damped.damping == wanted.damping == 0.1


def test_a_loss_that_is_no_number_is_an_error() -> None:
    weight = weights(8, 64, 0)
    start, block = rtn(weight, None, Scheme(4, 32), torch.float32).weight, Linear(weight, 0)
    block.target[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="loss of learned rounding is nan"):
        block.tuned(weight, start, SignRoundConfig(2))


@pytest.mark.parametrize(
    "setting", [{"iterations": 0}, {"batch_size": 0}, {"learning_rate": -0.1}, {"learning_rate": 2.0}, {"damping": 0.0}]
)
def test_impossible_settings_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(BadRecipe, match=r"must lie in|at least"):
        SignRoundConfig(**setting)  # type: ignore[arg-type]
