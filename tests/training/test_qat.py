"""Rounding on the way, held against a slow one in float64: the grid, the gradients, where a weight starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcomp.methods._grid import SEARCH, Grid, round_to, search_grid
from llmcomp.schemes import Scheme
from llmcomp.training.grids import narrowed
from llmcomp.training.qat import LatentEmbedding, LatentLinear, OnGrid, in_their_cells
from llmcomp.weights import QuantizedWeight, dequantize

QUICK = settings(max_examples=25, deadline=None)
SCHEMES = st.builds(Scheme, st.sampled_from((2, 3, 4, 8)), st.sampled_from((None, 32, 64)), st.booleans())
DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
FACE: Any = SimpleNamespace(transposed=False, bias=None, embed_scale=None)  # of the module that is replaced


def made(seed: int, scheme: Scheme, dtype: torch.dtype, rows: int = 3) -> tuple[Tensor, QuantizedWeight]:
    """A weight, some of it far beyond its grid, and its integers on a grid that clips."""
    torch.manual_seed(seed)
    weight = torch.randn(rows, 64)
    shrinks, refinements = SEARCH[scheme.bits]
    grid = search_grid(weight, scheme, dtype, None, shrinks, refinements)
    return weight * 1.5, QuantizedWeight(round_to(weight, grid), grid.scale, grid.zero_point, scheme)


def slow(latent: Tensor, weight: QuantizedWeight, stretch: Tensor | None, upstream: Tensor) -> tuple[Tensor, ...]:
    """What products see of a latent weight, and its and the stretch's gradients, entry by entry in float64."""
    scheme, size = weight.scheme, weight.shape[1] // weight.scale.shape[1]
    seen, into = torch.zeros(weight.shape).double(), torch.zeros(weight.shape).double()
    learned = torch.zeros(weight.scale.shape).double()
    for row, column in torch.cartesian_prod(*map(torch.arange, weight.shape)).tolist():
        group = column // size
        scale = float(weight.scale[row, group])
        if stretch is not None:
            scale = float((torch.tensor(scale) * stretch.detach()[row, group].exp()).to(weight.scale.dtype))
        zero = 0 if weight.zero_point is None else int(weight.zero_point[row, group])
        place, gradient = float(latent[row, column]) / scale + zero, float(upstream[row, column])
        nearest = round(place)
        point = min(max(nearest, scheme.qmin), scheme.qmax)
        seen[row, column] = (point - zero) * scale
        if nearest == point:
            into[row, column] = gradient
            learned[row, group] += gradient * scale * (point - place)
        else:
            descends = -gradient / scale  # which way a step of descent moves `place`
            into[row, column] = gradient if (descends > 0) == (nearest < point) and gradient else 0
            learned[row, group] += gradient * scale * (point - zero)
    return seen, into, learned


def away_from_edges(latent: Tensor, weight: QuantizedWeight) -> Tensor:
    """The weight moved off the edges of cells, where float32 and float64 may round to either side."""
    scale = weight.scale.double().repeat_interleave(weight.shape[1] // weight.scale.shape[1], 1)
    steps = latent.double() / scale
    part = steps - steps.floor()
    return torch.where((part - 0.5).abs() < 1e-3, latent.double() + 4e-3 * scale, latent.double()).float()


@given(seed=st.integers(0, 10**6), scheme=SCHEMES, dtype=DTYPES, learned=st.booleans())
@QUICK
def test_grid_and_gradients_are_the_slow_ones(seed: int, scheme: Scheme, dtype: torch.dtype, learned: bool) -> None:
    start, weight = made(seed, scheme, dtype)
    stretch = torch.randn(weight.scale.shape).mul(0.05).requires_grad_() if learned else None
    grid = Grid(weight.scale, weight.zero_point, scheme)
    if stretch is not None:
        moved = (weight.scale.float() * stretch.detach().exp()).to(dtype)
        latent = away_from_edges(start, QuantizedWeight(weight.values, moved, weight.zero_point, scheme))
    else:
        latent = away_from_edges(start, weight)
    latent.requires_grad_()
    upstream = torch.randn(weight.shape)
    found = OnGrid.apply(latent, stretch, grid, None)
    found.backward(upstream)
    seen, into, slopes = slow(latent.detach(), weight, stretch, upstream)
    assert latent.grad is not None
    # A reader decodes in the scale's dtype, which rounds the product once.
    torch.testing.assert_close(found.detach(), seen.to(dtype).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(latent.grad.double(), into, rtol=0, atol=0)
    if stretch is not None:
        assert stretch.grad is not None
        torch.testing.assert_close(stretch.grad.double(), slopes, rtol=1e-3, atol=1e-3)


def test_gradients_of_scales_are_those_of_the_loss_where_integers_stay() -> None:
    """Where rounding is held, Ŵ = (q - z) s, and the straight-through part is what a moved cell would change."""
    start, weight = made(0, Scheme(3, 32), torch.float32)
    stretch = torch.zeros(weight.scale.shape, requires_grad=True)
    far = start.sign() * 100  # all clipped: nothing is straight-through
    OnGrid.apply(far, stretch, Grid(weight.scale, None, weight.scheme), None).square().sum().backward()
    integers = round_to(far, Grid(weight.scale, None, weight.scheme))
    free = torch.zeros(weight.scale.shape, dtype=torch.float64, requires_grad=True)
    dequantize(integers, weight.scale.double() * free.exp(), None).square().sum().backward()
    assert stretch.grad is not None and free.grad is not None
    torch.testing.assert_close(stretch.grad.double(), free.grad)


@given(seed=st.integers(0, 10**6), scheme=SCHEMES, dtype=DTYPES, gone=st.booleans())
@QUICK
def test_training_starts_from_the_checkpoints_integers(
    seed: int, scheme: Scheme, dtype: torch.dtype, gone: bool
) -> None:
    source, weight = made(seed, scheme, dtype)
    module = LatentLinear(weight, FACE, None if gone else source, None, True)
    assert torch.equal(module.quantized().values, weight.values)
    assert torch.equal(module.quantized().scale, weight.scale)
    assert torch.equal(module.weight, weight.dense().float())
    # What lies in the cell of its integer stays where it is.
    scale = weight.scale.float().repeat_interleave(64 // weight.scale.shape[1], 1)
    zero = 0 if weight.zero_point is None else weight.zero_point.repeat_interleave(64 // weight.scale.shape[1], 1)
    inside = (source / scale + zero - weight.values).abs() < 0.49
    torch.testing.assert_close(in_their_cells(source, weight)[inside], source[inside])


@given(seed=st.integers(0, 10**6), scheme=SCHEMES, dtype=DTYPES, learn_scales=st.booleans(), looked_up=st.booleans())
@QUICK
def test_integers_are_what_the_model_was_trained_as(
    seed: int, scheme: Scheme, dtype: torch.dtype, learn_scales: bool, looked_up: bool
) -> None:
    """However far weights and scales have gone, what is written decodes to what products saw, to the bit."""
    source, weight = made(seed, scheme, dtype)
    mask = torch.rand(weight.shape) < 0.7
    kind = LatentEmbedding if looked_up else LatentLinear
    module = kind(weight, FACE, source, mask, learn_scales)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape))
    reads = torch.randint(len(source), (5,)) if looked_up else torch.randn(5, 64)
    with torch.no_grad():
        before, trained = module(reads), module.weight.clone()
    written = module.quantized()
    assert torch.equal(written.dense().float(), trained) and written.scheme == scheme
    assert bool((trained[~mask] == 0).all())
    assert int(written.values.min()) >= scheme.qmin and int(written.values.max()) <= scheme.qmax
    if not learn_scales:
        assert torch.equal(written.scale, weight.scale)
    assert torch.equal(written.scale.sign(), weight.scale.sign())
    module.settle()
    with torch.no_grad():
        after = module(reads if looked_up else reads.to(dtype))
    torch.testing.assert_close(after.float(), before, rtol=0.05, atol=0.05)
    assert not list(module.parameters()) and torch.equal(module.quantized().values, written.values)


def test_what_a_mask_removes_gets_no_gradient() -> None:
    source, weight = made(3, Scheme(2, 32, symmetric=False), torch.bfloat16)
    mask = torch.rand(weight.shape) < 0.5
    module = LatentLinear(weight, FACE, source, mask, True)
    module(torch.randn(4, 64)).square().sum().backward()
    assert module.latent is not None and module.latent.grad is not None
    assert bool((module.latent.grad[~mask] == 0).all()) and bool((module.latent.grad[mask] != 0).any())


def test_weights_beyond_their_grid_find_back() -> None:
    """Descent towards a target inside of the grid, from far outside of both ends, on scales of both signs."""
    scale = torch.tensor([[0.5], [-0.5]])
    weight = QuantizedWeight(torch.zeros(2, 32, dtype=torch.int8), scale, None, Scheme(3))
    module = LatentLinear(weight, FACE, torch.zeros(2, 32), None, False)
    assert module.latent is not None
    with torch.no_grad():
        module.latent.copy_(torch.where(torch.arange(32) % 2 == 0, 9.0, -9.0).expand(2, 32))
    target = torch.full((2, 32), 0.5)
    optimizer = torch.optim.SGD([module.latent], lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        (module.weight - target).square().sum().backward()
        optimizer.step()
    assert torch.equal(module.weight, target)


@pytest.mark.parametrize("activations", ["int8-dynamic", "int8-static"])
def test_inputs_are_rounded_as_readers_round_them(activations: str) -> None:
    from llmcomp.activations import quantized

    source, weight = made(1, Scheme(8), torch.float32)
    static = torch.tensor([0.02]) if activations == "int8-static" else None
    scheme = Scheme(8, activations=activations)
    weight = QuantizedWeight(weight.values, weight.scale, None, scheme, static)
    module = LatentLinear(weight, FACE, source, None, False)
    x = torch.randn(2, 3, 64, requires_grad=True)
    out = module(x)
    torch.testing.assert_close(out, quantized(x.detach(), static) @ weight.dense().t())
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.dense().sum(0).expand(2, 3, 64))


# --- files that hold a weight wider than it was made ---


@given(seed=st.integers(0, 10**6), bits=st.sampled_from((2, 3, 4)), symmetric=st.booleans())
@QUICK
def test_a_wider_weight_is_brought_back(seed: int, bits: int, symmetric: bool) -> None:
    scheme = Scheme(bits, 64, symmetric)
    _, weight = made(seed, scheme, torch.bfloat16)
    zero = torch.zeros(weight.scale.shape, dtype=torch.int8) if weight.zero_point is None else weight.zero_point
    wide = QuantizedWeight(
        weight.values, weight.scale.repeat_interleave(2, 1), zero.repeat_interleave(2, 1), Scheme(8, 32, False)
    )
    found = narrowed(wide, scheme)
    assert found is not None and torch.equal(found.dense(), weight.dense()) and found.scheme == scheme
    assert (found.zero_point is None) == symmetric and found.scale.shape == weight.scale.shape


def test_a_weight_off_the_grid_is_not_brought_back() -> None:
    _, weight = made(0, Scheme(4, 32), torch.float32)
    assert narrowed(weight, Scheme(2, 32)) is None  # integers out of range
    assert narrowed(weight, Scheme(4, 64)) is None  # scales that differ within a group
    zero = torch.ones(weight.scale.shape, dtype=torch.int8)
    assert narrowed(QuantizedWeight(weight.values, weight.scale, zero, Scheme(4, 32, False)), Scheme(4, 32)) is None
