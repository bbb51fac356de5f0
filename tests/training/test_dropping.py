"""Attention with dropout by blocks against dense attention in float64 that drops the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, build

from llmcomp.training import dropping, taps
from llmcomp.training.dropping import drop_attention, keep

ROWS, HEADS, LENGTH, DEPTH = 3, 4, 6, 5


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3 * HEADS]), st.sampled_from([1, 2, 4]), st.booleans())
def test_it_is_dense_attention(seed: int, heads: int, groups: int, causal: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(ROWS, HEADS, LENGTH, DEPTH), *[(ROWS, HEADS // groups, LENGTH, DEPTH)] * 2]
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    lengths = torch.randint(1, LENGTH + 1, (ROWS,), generator=generator)
    seen = (torch.arange(LENGTH) < lengths[:, None])[:, None, None, :].expand(-1, 1, LENGTH, -1)
    seen = seen & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() if causal else seen
    above = torch.randn(ROWS, HEADS, LENGTH, DEPTH, generator=generator)

    fast = [one.clone().requires_grad_() for one in drawn]
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropping, "_BLOCK", heads * LENGTH**2)
        found = drop_attention(*fast, seen, 0.3, 0.25)
        found.backward(above)

    torch.manual_seed(seed)
    kept = keep((ROWS, HEADS, LENGTH, LENGTH), 0.25)
    slow = [one.double().requires_grad_() for one in drawn]
    key, value = (one.repeat_interleave(groups, 1) for one in slow[1:])
    shares = (0.3 * torch.einsum("bhqd,bhkd->bhqk", slow[0], key)).masked_fill(~seen, -torch.inf).softmax(-1)
    wanted = torch.einsum("bhqk,bhkd->bhqd", torch.where(kept, shares / 0.75, 0), value)
    wanted.backward(above.double())
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    for one, two in zip(fast, slow, strict=True):
        assert one.grad is not None and two.grad is not None
        assert torch.allclose(one.grad.double(), two.grad, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 0.9])
def test_as_many_are_kept_as_is_said(dropout: float) -> None:
    torch.manual_seed(0)
    share = float(keep((7, 11, 101, 13), dropout).float().mean())
    assert share == pytest.approx(1 - dropout, abs=0.006)  # 6 standard deviations at most


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_models_that_are_listened_to_drop_by_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training alone; a share of next to nothing gives what SDPA gives, under padding and causality."""
    asked: list[float] = []

    def attend(*given: Any) -> Any:
        asked.append(given[-1])
        return drop_attention(*given)

    monkeypatch.setattr(taps, "drop_attention", attend)
    which = {"bert": "attention_probs_dropout_prob", "llama": "attention_dropout"}[name]
    model = build(name, **{which: 1e-9}, **({"hidden_dropout_prob": 0.0} if name == "bert" else {}))
    ids = torch.randint(5, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    there = torch.arange(9) < torch.tensor([9, 4, 2])[:, None]
    inputs = {"input_ids": ids, "attention_mask": there.long()}
    plain = model.eval()(**inputs).logits
    blocks = {"bert": "bert.encoder.layer.{}", "llama": "model.layers.{}"}[name]
    with taps.listening(model, [blocks.format(number) for number in range(2)], attention=[0]):
        assert torch.equal(model(**inputs).logits[there], plain[there]) and not asked
        found = model.train()(**inputs).logits
        assert torch.allclose(found[there], plain[there], atol=1e-5) and set(asked) == {1e-9}
        assert len(asked) == model.config.num_hidden_layers
