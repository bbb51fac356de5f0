"""Schedules, scores and masks of pruning in training, each held against a slow one in float64."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmcomp.patterns import Pattern, holds
from llmcomp.training.pruning import (
    Masked,
    Movement,
    Span,
    above,
    cubic_sparsity,
    fold,
    lowest,
    mask_buffers,
    masks_of,
    penalty,
    put_masks,
    ticket_sparsity,
    under_masks,
)

QUICK = settings(max_examples=60, deadline=None)
PATTERNS = st.sampled_from([*(Pattern.parse("unstructured", s) for s in (0.1, 0.5, 0.77, 0.95)),
                            *map(Pattern.parse, ("2:4", "1:4", "4:8", "1:2", "3:4"))])  # fmt: skip


# --- schedules ---


def test_the_cubic_schedule_is_the_papers() -> None:
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Δt))³ with t_0 = 10, n Δt = 60."""
    for step in range(100):
        t = min(max(step, 10), 70)
        wanted = 0.9 + (0.2 - 0.9) * (1 - (t - 10) / 60) ** 3
        assert cubic_sparsity(step, begin=10, end=70, final=0.9, initial=0.2) == pytest.approx(wanted, abs=1e-12)
    assert cubic_sparsity(70, begin=10, end=70, final=0.9) == 0.9  # exactly, so that counts are


@given(begin=st.integers(0, 50), length=st.integers(1, 50), final=st.floats(0.01, 0.99), share=st.floats(0, 1))
@QUICK
def test_the_cubic_schedule_rises(begin: int, length: int, final: float, share: float) -> None:
    initial = share * final
    found = [cubic_sparsity(step, begin=begin, end=begin + length, final=final, initial=initial) for step in range(120)]
    assert all(one <= other + 1e-12 for one, other in itertools.pairwise(found))
    assert found[0] == pytest.approx(initial) and found[-1] == final


def test_each_round_removes_the_same_share_of_what_is_left() -> None:
    left = [1 - ticket_sparsity(n, 4, 0.9) for n in range(5)]
    assert left[0] == 1 and ticket_sparsity(4, 4, 0.9) == 0.9
    assert [b / a for a, b in itertools.pairwise(left)] == pytest.approx([0.1**0.25] * 4)


@given(total=st.integers(1, 300), begin=st.floats(0, 0.9), length=st.floats(0.01, 1), every=st.integers(1, 20))
@QUICK
def test_the_last_mask_always_comes(total: int, begin: float, length: float, every: int) -> None:
    """Whatever the numbers, some step that is due has the last share, and none after it changes it."""
    span = Span(begin, min(1.0, begin + length), every)
    due = [step for step in range(total + 1) if span.due(step, total, after=False)]
    assert due and span.share(due[-1], total, 0.8) == 0.8
    assert all(span.due(step, total, after=True) for step in range(due[-1], total + 1))
    assert not any(span.due(step, total, after=False) for step in range(due[-1] + 1, total + 1))


# --- masks ---


def slow_masks(
    scores: dict[str, Tensor], pattern: Pattern, sparsity: float, held: dict[str, Tensor] | None, together: bool
) -> dict[str, Tensor]:
    """By sorting tuples of Python's own numbers."""
    masks = {name: torch.ones(own.shape, dtype=torch.bool) for name, own in scores.items()}
    pools: list[list[tuple[float, int, str, int, int]]] = []
    for name, own in scores.items():
        rows, columns = own.shape
        places = []
        for row in range(rows):
            group = pattern.group or columns
            for start in range(0, columns, group):
                ranked = sorted(
                    (-math.inf if held is not None and not held[name][row, start + n] else float(own[row, start + n]),
                     -n)
                    for n in range(group)
                )  # fmt: skip
                removable = group if pattern.kept is None else group - pattern.kept
                places += [(score, -(row * columns + start - n), name, row, start - n) for score, n in
                           ranked[:removable]]  # fmt: skip
        pools.append(places)
    for pool in [list(itertools.chain(*pools))] if together else pools:
        names = list(scores)
        numel = sum(own.numel() for own in scores.values()) if together else scores[pool[0][2]].numel()
        pool.sort(key=lambda one: (one[0], -names.index(one[2]), one[1]))
        for _, _, name, row, column in pool[: math.floor(sparsity * numel + 0.5)]:
            masks[name][row, column] = False
    return masks


def some_scores(seed: int, ties: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {"a": torch.randn(3, 8, generator=generator), "b": torch.randn(2, 16, generator=generator) + 0.3}
    return {name: own.mul(2).round() if ties else own for name, own in made.items()}


@given(seed=st.integers(0, 10_000), ties=st.booleans(), pattern=PATTERNS, reach=st.floats(0, 1),
       together=st.booleans(), earlier=st.floats(0, 1))  # fmt: skip
@QUICK
def test_masks_are_those_of_sorting(
    seed: int, ties: bool, pattern: Pattern, reach: float, together: bool, earlier: float
) -> None:
    scores = some_scores(seed, ties)
    share = reach * pattern.sparsity
    assert_same(masks_of(scores, pattern, share, None, together), slow_masks(scores, pattern, share, None, together))
    held = masks_of(some_scores(seed + 1, ties), pattern, earlier * share, None, together)
    assert_same(masks_of(scores, pattern, share, held, together), slow_masks(scores, pattern, share, held, together))


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


@given(seed=st.integers(0, 10_000), pattern=PATTERNS, together=st.booleans(),
       shares=st.lists(st.floats(0, 1), min_size=1, max_size=5))  # fmt: skip
@QUICK
def test_held_masks_only_grow_and_end_exact(
    seed: int, pattern: Pattern, together: bool, shares: list[float]
) -> None:
    """Weights that move between changes of the mask do not bring back what was removed, and N:M is exact at the end."""
    held = None
    for number, share in enumerate([*sorted(shares), 1.0]):
        scores = {name: own.abs() for name, own in some_scores(seed + number, False).items()}
        masks = masks_of(scores, pattern, share * pattern.sparsity, held, together)
        if held is not None:
            assert not any(bool((masks[name] & ~held[name]).any()) for name in masks)
        held = masks
    assert held is not None and all(holds(pattern, mask) for mask in held.values())
    sizes = [sum(mask.numel() for mask in held.values())] if together else [mask.numel() for mask in held.values()]
    gone = [int((~mask).sum()) for mask in held.values()]
    wanted = [math.floor(pattern.sparsity * size + 0.5) for size in sizes]
    assert ([sum(gone)] if together else gone) == wanted


def test_of_equal_scores_the_last_goes() -> None:
    assert lowest(torch.tensor([1.0, 0.0, 0.0, 0.0]), 2).tolist() == [False, False, True, True]
    assert not lowest(torch.zeros(2, 2), 0).any() and lowest(torch.zeros(2, 2), 4).all()


# --- what acts under a mask ---


def small(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def test_scores_learn_as_the_paper_says() -> None:
    """dL/dS = dL/dW' W and dL/dW = dL/dW' M, with dL/dW' from float64 autograd of the masked weight itself."""
    torch.manual_seed(1)
    weight, scores = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask, x = torch.rand(5, 7) > 0.5, torch.randn(4, 7, dtype=torch.float64)
    made = Movement.apply(weight, scores, mask)
    (made @ x.t()).tanh().square().sum().backward()
    plain = (weight.detach() * mask).requires_grad_()
    assert torch.equal(made, plain)
    (plain @ x.t()).tanh().square().sum().backward()
    assert weight.grad is not None and scores.grad is not None and plain.grad is not None
    torch.testing.assert_close(scores.grad, plain.grad * weight.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(weight.grad, plain.grad * mask, rtol=1e-12, atol=0)
    assert bool((scores.grad[~mask] != 0).any())  # a removed weight's score learns, so it may come back


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "optimizer",
    [lambda own: torch.optim.SGD(own, lr=0.1, momentum=0.9, weight_decay=0.1),
     lambda own: torch.optim.AdamW(own, lr=0.05, weight_decay=0.1)],
    ids=["sgd with momentum", "adamw"],
)  # fmt: skip
def test_no_optimizer_revives_a_weight(
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], learned: bool
) -> None:
    """Moments are full when the mask comes, and go on moving what lies under it."""
    model = small()
    put_masks(model, {"0": False, "2": False}, learned=learned)
    steps = optimizer(list(model.parameters()))
    x, y = torch.randn(16, 8), torch.randn(16, 3)

    def train(count: int) -> None:
        for _ in range(count):
            steps.zero_grad()
            (model(x) - y).square().mean().backward()
            steps.step()

    train(5)
    found = under_masks(model)
    masks = masks_of({name: under.weight.abs() for name, under in found.items()}, Pattern.parse("1:2"), 0.5)
    for name, mask in masks.items():
        found[name].put(mask)
    before = found["0"].weight.clone()
    train(5)
    assert not torch.equal(found["0"].weight[~masks["0"]], before[~masks["0"]])  # it has tried to
    output, folded = model(x), fold(model)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(folded[name], mask) and isinstance(weight, nn.Parameter)
        assert bool((weight[~mask] == 0).all()) and not bool(weight[~mask].signbit().any())
        assert bool((weight[mask] != 0).all())
    torch.testing.assert_close(model(x), output, rtol=0, atol=0)
    assert {name for name, _ in model.named_parameters()} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert not list(mask_buffers(model)) and type(model[0]) is nn.Linear


def test_a_transposed_weight_is_masked_along_its_inputs() -> None:
    """GPT-2's Conv1D holds [in, out]; N:M is of a row of [out, in]."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(6, 8))
    put_masks(model, {"0": True}, learned=True)
    under = under_masks(model)["0"]
    assert under.weight.shape == under.mask.shape == under.scores.shape == (6, 8)
    pattern = Pattern.parse("2:4")
    under.put(masks_of({"0": under.weight.abs()}, pattern, 0.5)["0"])
    assert holds(pattern, under.mask)
    fold(model)
    weight = model[0].weight
    assert weight.shape == (8, 6) and holds(pattern, weight.t() != 0) and type(model[0]) is Conv1D


def test_a_copy_has_its_own_masks() -> None:
    model = small()
    put_masks(model, {"0": False}, learned=False)
    other = copy.deepcopy(model)
    under_masks(other)["0"].put(torch.zeros(6, 8, dtype=torch.bool))
    assert bool(under_masks(model)["0"].mask.all()) and not bool(model(torch.randn(2, 8)).isnan().any())
    assert [name for name, _ in mask_buffers(model)] == ["0.parametrizations.weight.0.mask"]


# --- soft movement ---


@given(seed=st.integers(0, 1000), threshold=st.floats(0.01, 0.99))
@QUICK
def test_soft_masks_and_their_penalty(seed: int, threshold: float) -> None:
    scores = {name: own.double().requires_grad_() for name, own in some_scores(seed, False).items()}
    masks = above(scores, threshold)
    total, count = 0.0, 0
    for name, own in scores.items():
        for row, kept in zip(own.tolist(), masks[name].tolist(), strict=True):
            for score, stays in zip(row, kept, strict=True):
                value = 1 / (1 + math.exp(-score))
                assert stays == (value > threshold) or abs(value - threshold) < 1e-12
                total, count = total + value, count + 1
    found = penalty(scores)
    assert float(found.detach()) == pytest.approx(total / count, rel=1e-9)
    found.backward()
    for own in scores.values():
        value = own.detach().sigmoid()
        assert own.grad is not None
        torch.testing.assert_close(own.grad, value * (1 - value) / count, rtol=1e-9, atol=0)


def test_scores_are_float32_beside_weights_of_any_dtype() -> None:
    assert Masked(torch.zeros(2, 2, dtype=torch.bfloat16), True).scores is not None
    scores = Masked(torch.zeros(2, 2, dtype=torch.bfloat16), True).scores
    assert scores is not None and scores.dtype == torch.float32
