"""What is kept of a distribution, against sums in float64, and the loss over it against the whole one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcomp import losses
from llmcomp.kept import BITS, Kept, alike, decode, encode, keep, over

DIVERGENCES = {"forward": losses.soft_targets, "reverse": losses.reverse_targets, "jsd": losses.jensen_shannon}
shapes = st.tuples(st.integers(1, 4), st.integers(2, 9))


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def coarse64(row: torch.Tensor, kept: list[int], temperature: float) -> list[float]:
    """Probabilities of the kept classes and of all others, by the definition."""
    powers = [math.exp(float(value) / temperature) for value in row]
    whole = math.fsum(powers)
    others = math.fsum(power for number, power in enumerate(powers) if number not in kept)
    return [powers[number] / whole for number in kept] + [others / whole]


def loss64(name: str, logits: torch.Tensor, targets: torch.Tensor, count: int, temperature: float) -> float:
    terms = []
    for student, teacher in zip(logits, targets, strict=True):
        kept = sorted(range(len(teacher)), key=lambda number: -float(teacher[number]))[:count]
        p, q = coarse64(teacher, kept, temperature), coarse64(student, kept, temperature)
        for a, b in zip(p, q, strict=True):
            mean = (a + b) / 2
            terms.append({"forward": a * math.log(a / b), "reverse": b * math.log(b / a),
                          "jsd": (a * math.log(a / mean) + b * math.log(b / mean)) / 2}[name])  # fmt: skip
    return temperature**2 * math.fsum(terms) / len(logits)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 1000), st.floats(0.5, 5), st.sampled_from(sorted(DIVERGENCES)), st.data())
def test_losses_over_what_is_kept_are_their_equations(
    shape: tuple[int, int], seed: int, temperature: float, name: str, data: st.DataObject
) -> None:
    logits, targets = drawn(shape, seed), drawn(shape, seed + 1)
    count = data.draw(st.integers(1, shape[1] - 1))
    kept, scored = keep(targets, count, temperature), torch.ones(shape[0], dtype=torch.bool)
    found = float(DIVERGENCES[name](logits, kept, scored, temperature))
    assert found == pytest.approx(loss64(name, logits, targets, count, temperature), rel=1e-3, abs=1e-5)
    whole = float(DIVERGENCES[name](logits, targets, scored, temperature))
    assert -1e-5 <= found <= whole + 1e-4 * (1 + whole)  # what happens among the others is not seen
    full = float(DIVERGENCES[name](logits, keep(targets, shape[1], temperature), scored, temperature))
    assert full == pytest.approx(whole, rel=1e-5, abs=1e-6)
    same = float(DIVERGENCES[name](targets, kept, scored, temperature))
    assert same == pytest.approx(0, abs=1e-5)


def test_the_tail_has_a_gradient() -> None:
    """Mass that a student has among the others, and its teacher has not, is taken away; in proportion."""
    targets = torch.tensor([[5.0, 4.0, -5.0, -5.0]])
    logits = torch.zeros(1, 4, requires_grad=True)
    losses.soft_targets(logits, keep(targets, 2, 1.0), torch.tensor([True])).backward()
    rest = float(targets.softmax(-1)[0, 2:].sum())
    assert logits.grad is not None
    wanted = torch.tensor([0.25, 0.25]) - rest / 2  # q_i - r q_i / s of a class among the others
    assert torch.allclose(logits.grad[0, 2:], wanted, atol=1e-6)
    assert torch.allclose(logits.grad[0, :2], 0.25 - targets.softmax(-1)[0, :2], atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(0, 1000), st.floats(0.5, 5), st.floats(0, 1), st.data())
def test_gradients_are_those_of_sums_written_out(
    shape: tuple[int, int], seed: int, temperature: float, share: float, data: st.DataObject
) -> None:
    """In float64 by autograd; of some of the positions or of nearly all, of classes that a student has alone, too."""
    logits, targets = drawn((shape[0], shape[1] + 2), seed), drawn(shape, seed + 1)
    scored = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) < share
    count = data.draw(st.integers(1, shape[1] - 1))
    kept = keep(targets[scored], count, temperature)
    one, other = logits.clone().requires_grad_(True), logits.double().requires_grad_(True)
    losses.soft_targets(one[None], kept, scored[None], temperature).backward()
    q, p = ((value[:, : shape[1]] / temperature).softmax(-1)[scored] for value in (other, targets.double()))
    mask = torch.zeros_like(q, dtype=torch.bool)
    mask[torch.arange(len(q))[:, None], kept.indices] = True
    tail = [value.masked_fill(mask, 0).sum(-1) for value in (p, q)]
    inside = torch.where(mask, p * (p / q).log(), 0).sum()
    total = (inside + (tail[0] * (tail[0] / tail[1]).log()).sum()) * temperature**2 / max(1, int(scored.sum()))
    (total + 0 * other.sum()).backward()
    assert one.grad is not None and other.grad is not None
    assert torch.allclose(one.grad.double(), other.grad, atol=1e-5, rtol=1e-4)


def test_a_small_tail_is_not_lost() -> None:
    """1 - Σ in float32 would be 0 here, and its logarithm infinite."""
    logits = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True)
    logs = alike(logits, Kept(torch.zeros(1, 2), torch.tensor([[0]]), 3), 1.0, torch.tensor([True]))
    assert float(logs[0, 1].detach()) == pytest.approx(math.log(2) - 30, rel=1e-6)
    logs[0, 1].backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(BITS), st.integers(1, 12))
def test_stored_and_read_again(seed: int, bits: int, count: int) -> None:
    kept = keep(drawn((5, 12), seed), count, 2.0)
    arrays = encode(kept, bits)
    again = decode({name: value.clone() for name, value in arrays.items()}, 12)
    assert (kept.indices is None) == (again.indices is None) == (count == 12)
    if kept.indices is not None and again.indices is not None:
        assert torch.equal(again.indices, kept.indices)
        spread = float((kept.logs[:, 0] - kept.logs[:, -2]).max())
        # half a step of 8 bits, or of float16, and what scaling to 1 moves all by
        bound = 2 * (spread / 255 / 2 if bits == 8 else 2**-11 * float(kept.logs.abs().max())) + 1e-5
        assert float((again.logs - kept.logs).abs().max()) <= bound
    assert torch.allclose(again.logs.exp().sum(-1), torch.ones(5), atol=1e-5)


def test_vocabularies_that_are_padded_are_cut() -> None:
    """Of a student with more classes than were known when a teacher was remembered, the first ones count."""
    targets, logits = drawn((3, 6), 0), drawn((3, 8), 1)
    scored = torch.ones(3, dtype=torch.bool)
    one = losses.soft_targets(logits, keep(targets, 2, 2.0), scored, 2.0)
    assert torch.equal(one, losses.soft_targets(logits[:, :6], keep(targets, 2, 2.0), scored, 2.0))


def test_classes_without_any_mass() -> None:
    """A teacher's logits of padding are -inf, which says nothing of them, and breaks nothing."""
    targets = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]])
    for bits in BITS:
        kept = decode(encode(keep(targets, 2, 1.0), bits), 4)
        found = losses.soft_targets(torch.zeros(1, 4), kept, torch.tensor([True]))
        assert bool(found.isfinite()) and float(found) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_blocks_of_rows_are_the_plain_definition(
    dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, of blocks of three rows and a last one of one, in float64 by autograd."""
    monkeypatch.setattr("llmcomp.kept._BLOCK", 3 * 40)
    logits = torch.randn(10, 40, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    indices = logits.detach().float().topk(5).indices
    found = over(logits, indices, temperature)
    found.square().sum().backward()  # type: ignore[no-untyped-call]
    wide = logits.detach().double().requires_grad_()
    logs = (wide / temperature).log_softmax(-1)
    others = logs.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    wanted = torch.cat([logs.gather(-1, indices), others], dim=-1)
    wanted.square().sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and wide.grad is not None
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=rounding, atol=rounding)
