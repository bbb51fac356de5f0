"""Losses of what lies inside against slow loops in float64; layer maps and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcomp import inner_losses
from llmcomp.errors import BadRecipe
from llmcomp.inner_losses import (
    attention_scores,
    attention_transfer,
    cosine,
    head_map,
    layer_map,
    relations,
    states,
)

ROWS, LENGTH, HEADS, DEPTH = 3, 5, 4, 6
SEEDS = st.integers(0, 10_000)


def drawn(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padded(seed: int) -> Tensor:
    """Which tokens are there: at least one of each row, padding on the right or on the left."""
    lengths = torch.randint(1, LENGTH + 1, (ROWS,), generator=torch.Generator().manual_seed(seed))
    tokens = torch.arange(LENGTH) < lengths[:, None]
    return tokens.flip(1) if seed % 2 else tokens


def window(width: int) -> Tensor:
    """bool [1, 1, L, L]: the last `width` tokens up to a query."""
    at = torch.arange(LENGTH)
    return ((at[None] <= at[:, None]) & (at[None] > at[:, None] - width))[None, None]


def dot64(one: Tensor, other: Tensor) -> float:
    return math.fsum(float(a) * float(b) for a, b in zip(one, other, strict=True))


def products(seed: int, depth: int) -> tuple[Tensor, Tensor]:
    """Queries and keys."""
    return drawn(ROWS, HEADS, LENGTH, depth, seed=seed), drawn(ROWS, HEADS, LENGTH, depth, seed=seed + 7)


def mean64(terms: list[float]) -> float:
    return math.fsum(terms) / max(1, len(terms))


def cosine64(one: Tensor, other: Tensor, tokens: Tensor) -> float:
    return mean64([
        1 - dot64(one[b, t], other[b, t]) / math.sqrt(dot64(one[b, t], one[b, t]) * dot64(other[b, t], other[b, t]))
        for b, t in tokens.nonzero().tolist()
    ])  # fmt: skip


def states64(one: Tensor, other: Tensor, tokens: Tensor) -> float:
    return mean64([
        mean64([float(a - c) ** 2 for a, c in zip(one[b, t].double(), other[b, t].double(), strict=True)])
        for b, t in tokens.nonzero().tolist()
    ])  # fmt: skip


def attention64(one: Tensor, other: Tensor, seen: Tensor, tokens: Tensor) -> float:
    found = []
    for b, query in tokens.nonzero().tolist():
        keys = [key for key in range(LENGTH) if tokens[b, key] and seen[0, 0, query, key]]
        found.append(mean64([
            mean64([float(one[b, h, query, key].double() - other[b, h, query, key].double()) ** 2 for key in keys])
            for h in range(HEADS)
        ]))  # fmt: skip
    return mean64(found)


def softmax64(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / math.fsum(powers) for power in powers]


def relations64(one: Tensor, other: Tensor, tokens: Tensor, heads: int, seen: Tensor) -> float:
    def split(value: Tensor, b: int, t: int, head: int) -> Tensor:
        whole = torch.cat([value[b, h, t] for h in range(value.shape[1])])
        size = len(whole) // heads
        return whole[head * size : (head + 1) * size]

    def spread(value: Tensor, b: int, query: int, head: int, keys: list[int]) -> list[float]:
        own = split(value, b, query, head)
        return softmax64([dot64(own, split(value, b, key, head)) / math.sqrt(len(own)) for key in keys])

    found = []
    for b, query in tokens.nonzero().tolist():
        keys = [key for key in range(LENGTH) if tokens[b, key] and seen[0, 0, query, key]]
        for head in range(heads):
            q, p = (spread(value, b, query, head, keys) for value in (one, other))
            found.append(math.fsum(a * (math.log(a) - math.log(c)) for a, c in zip(p, q, strict=True)))
    return mean64(found)


def transfer64(one: Tensor, other: Tensor, tokens: Tensor) -> float:
    def where(value: Tensor, b: int) -> list[float]:
        sizes = [mean64([float(c) ** 2 for c in value[b, t].double()]) if tokens[b, t] else 0.0 for t in range(LENGTH)]
        return [size / math.sqrt(math.fsum(s * s for s in sizes)) for size in sizes]

    return mean64([
        math.fsum((a - c) ** 2 for a, c in zip(where(one, b), where(other, b), strict=True)) for b in range(ROWS)
    ])  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(1, LENGTH))
def test_they_are_their_equations(seed: int, width: int) -> None:
    tokens, seen = padded(seed), window(width)
    h, other = drawn(ROWS, LENGTH, DEPTH, seed=seed), drawn(ROWS, LENGTH, DEPTH, seed=seed + 1)
    assert float(cosine(h, other, tokens)) == pytest.approx(cosine64(h, other, tokens), rel=1e-4, abs=1e-6)
    assert float(states(h, other, tokens)) == pytest.approx(states64(h, other, tokens), rel=1e-4)
    wide = drawn(ROWS, LENGTH, DEPTH + 3, seed=seed + 2)
    assert float(attention_transfer(h, wide, tokens)) == pytest.approx(transfer64(h, wide, tokens), rel=1e-4, abs=1e-6)
    one, two = products(seed, DEPTH), products(seed + 1, 8)
    scores = [query @ key.transpose(-1, -2) for query, key in (one, two)]
    wanted = attention64(*scores, seen, tokens)
    assert float(attention_scores(one, two, seen, tokens)) == pytest.approx(wanted, rel=1e-4)
    x, y = drawn(ROWS, HEADS, LENGTH, DEPTH, seed=seed), drawn(ROWS, 2, LENGTH, 8, seed=seed + 1)
    found = float(relations(x, y, tokens, 2, seen=seen))
    assert found == pytest.approx(relations64(x, y, tokens, 2, seen), rel=1e-3, abs=1e-5)


def dense_scores(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], seen: Tensor, tokens: Tensor) -> Tensor:
    """`attention_scores` of all scores at once, for autograd."""
    counted = seen & tokens[:, None, None, :] & tokens[:, None, :, None]
    error = (one[0] @ one[1].transpose(-1, -2) - two[0] @ two[1].transpose(-1, -2)).square() * counted
    return (error.sum(-1) / counted.sum(-1).clamp_min(1)).sum() / (HEADS * tokens.sum())


def dense_relations(one: Tensor, two: Tensor, seen: Tensor, tokens: Tensor) -> Tensor:
    """`relations` likewise, of two heads; cross entropy less entropy, query by query."""
    total = torch.zeros((), dtype=torch.float64)
    for b, query in tokens.nonzero().tolist():
        keys = (seen[0, 0, query] & tokens[b]).nonzero()[:, 0]
        shares = []
        for value in (one, two):
            split = value[b].transpose(0, 1).reshape(LENGTH, 2, -1)
            shares.append(torch.einsum("hd,khd->hk", split[query], split[keys]) / split.shape[-1] ** 0.5)
        q, p = (share.softmax(-1) for share in shares)
        total = total + (p * (p.log() - q.log())).sum()
    return total / (2 * tokens.sum())


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(1, LENGTH), st.sampled_from([1, 2, 3 * HEADS]))
def test_gradients_by_blocks_are_autograds(seed: int, width: int, heads: int) -> None:
    """Whatever fits into a block, of dense equations in float64."""
    tokens, seen = padded(seed), window(width)
    one, two = products(seed, DEPTH), products(seed + 1, 8)
    x, y = drawn(ROWS, HEADS, LENGTH, DEPTH, seed=seed), drawn(ROWS, 2, LENGTH, 8, seed=seed + 1)
    given_, slow = [[value.to(dtype, copy=True).requires_grad_() for value in (*one, x)]
                    for dtype in (torch.float32, torch.float64)]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(inner_losses._BLOCK, "cpu", heads * LENGTH**2)
        found = attention_scores((given_[0], given_[1]), two, seen, tokens)
        found = found + 3 * relations(given_[2], y, tokens, 2, seen=seen)
    wide = [value.double() for value in (*two, y)]
    wanted = dense_scores((slow[0], slow[1]), (wide[0], wide[1]), seen, tokens)
    wanted = wanted + 3 * dense_relations(slow[2], wide[2], seen, tokens)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    found.backward()
    wanted.backward()
    for mine, its in zip(given_, slow, strict=True):
        assert mine.grad is not None and its.grad is not None
        assert torch.allclose(mine.grad.double(), its.grad, rtol=1e-4, atol=1e-5)


def test_what_padding_holds_does_no_harm() -> None:
    """Attention may leave anything at tokens that are not there, even no numbers."""
    tokens = torch.tensor([[True, True, False]])
    value = torch.where(tokens[:, None, :, None], torch.ones(1, 2, 3, 4), torch.nan).requires_grad_()
    seen = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    loss = attention_scores((value, value), (2 * value, value), seen, tokens)
    (loss + relations(value, 2 * value, tokens, 2, seen=seen)).backward()
    assert float(loss.detach()) == 16 and value.grad is not None and bool(value.grad.isfinite().all())


every = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
LOSSES: dict[str, tuple[tuple[int, ...], Callable[..., Tensor]]] = {
    "cosine": ((LENGTH, DEPTH), cosine),
    "states": ((LENGTH, DEPTH), states),
    "scores": ((HEADS, LENGTH, DEPTH), lambda one, other, tokens, n=None: attention_scores((one, one), (other, other),
                                                                                           every, tokens, n)),
    "relations": ((HEADS, LENGTH, DEPTH), lambda one, other, tokens, n=None: relations(one, other, tokens, 3, n)),
    "transfer": ((LENGTH, DEPTH), attention_transfer),
}  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(LOSSES)), SEEDS)
def test_what_holds_of_each(name: str, seed: int) -> None:
    """Zero for equals, never below, parts of a step add up to it, padding counts nowhere."""
    shape, loss = LOSSES[name]
    one, other, tokens = drawn(ROWS, *shape, seed=seed), drawn(ROWS, *shape, seed=seed + 1), padded(seed)
    assert float(loss(one, one, tokens)) == pytest.approx(0, abs=1e-5)
    whole = float(loss(one, other, tokens))
    assert whole >= 0
    n = torch.tensor(ROWS) if name == "transfer" else tokens.sum()
    parts = [float(loss(one[part], other[part], tokens[part], n)) for part in (slice(0, 1), slice(1, None))]
    assert sum(parts) == pytest.approx(whole, rel=1e-4, abs=1e-6)
    student, teacher = one.clone().requires_grad_(), other.clone().requires_grad_()
    loss(student, teacher, tokens).backward()
    assert teacher.grad is None and student.grad is not None and bool(student.grad.isfinite().all())
    if name in ("cosine", "states", "transfer"):
        assert not bool(student.grad[~tokens].any())
        noise = torch.where(tokens[..., None], one, 1e3)
        assert float(loss(noise, other, tokens)) == pytest.approx(whole, rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 12), st.sampled_from(["uniform", "last", "skip"]))
def test_maps_keep_order_and_range(student: int, more: int, rule: str) -> None:
    teacher = student + more
    pairs = layer_map(rule, student, teacher)
    assert [own for own, _ in pairs] == list(range(student - (rule == "skip")))
    layers = [its for _, its in pairs]
    assert layers == sorted(set(layers)) and all(0 <= one < teacher for one in layers)
    if rule != "skip":
        assert layers[-1] == teacher - 1


def test_given_pairs() -> None:
    assert layer_map("0:3, 2:5", 3, 6) == ((0, 3), (2, 5))
    assert layer_map("uniform", 6, 12) == tuple((one, 2 * one + 1) for one in range(6))  # as TinyBERT has it


@pytest.mark.parametrize(
    ("rule", "student", "teacher", "said"),
    [
        ("0:6", 3, 6, "has 0:6, which is out of range: the student has layers 0 to 2 and the teacher 0 to 5"),
        ("3:1", 3, 6, "out of range"),
        ("first", 3, 6, "give uniform, last, skip or pairs"),
        ("0:1,0:2", 3, 6, "names a layer of the student twice"),
        ("uniform", 7, 6, "at most its teacher's 6 layers"),
    ],
)
def test_maps_that_cannot_be(rule: str, student: int, teacher: int, said: str) -> None:
    with pytest.raises(BadRecipe, match=said):
        layer_map(rule, student, teacher)


def test_heads() -> None:
    assert head_map((), 4, 4) == [0, 1, 2, 3] and head_map((0, 5), 2, 8) == [0, 5]
    with pytest.raises(BadRecipe, match="the student has 2 heads where the teacher has 8: give --head-map"):
        head_map((), 2, 8)
    with pytest.raises(BadRecipe, match="give 2 numbers from 0 to 7"):
        head_map((0, 8), 2, 8)
    value, tokens = torch.zeros(1, 2, 3, 5), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(BadRecipe, match="--relation-heads 4 does not divide 10 channels"):
        relations(value, value, tokens, 4)
