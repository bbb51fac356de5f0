"""Attention scores beside SDPA against eager attention: masks of padding, causality and windows, groups of heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PICTURE, VOCABULARY, build, tiny
from torch import Tensor

from llmcomp.adapters.discover import discover, skeleton
from llmcomp.errors import BadRecipe
from llmcomp.feeds import around
from llmcomp.training.taps import EMBEDDINGS, NAME, Taps, listening

LENGTH = 20  # longer than the windows of tiny models
MODELS = ["bert", "roberta", "distilbert", "modernbert", "gpt2", "llama", "mistral", "qwen3", "gemma3", "opt", "phi3"]


def opened(name: str, directory: Path) -> tuple[Any, list[str]]:
    directory = tiny(name, directory)
    return build(name), [block.name for block in discover(skeleton(directory)).blocks]


def batch(side: str | None) -> dict[str, Tensor]:
    ids = torch.randint(5, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    if side is None:
        return {"input_ids": ids}
    there = torch.arange(LENGTH) < torch.tensor([LENGTH, 13, 4])[:, None]
    return {"input_ids": ids, "attention_mask": (there.flip(1) if side == "left" else there).long()}


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, PICTURE, PICTURE, generator=torch.Generator().manual_seed(0))}


def probabilities(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What eager attention says of all layers [B, H, L, L]."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found: tuple[Tensor, ...] = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return found


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_eager_attention(name: str, side: str | None, tmp_path: Path) -> None:
    """Their softmax over the keys that are seen, in float64, is what eager attention's probabilities are; where those
    are zero is where nothing is seen."""
    model, blocks = opened(name, tmp_path)
    inputs = batch(side)
    there = inputs.get("attention_mask", torch.ones(3, LENGTH)).bool()
    slow = probabilities(model, inputs)
    layers = range(len(blocks))
    plain = model(**inputs).logits
    with listening(model, blocks, attention=layers) as taps:
        logits = model(**inputs).logits
        inside = taps.take()
    assert torch.equal(logits[there], plain[there])
    for layer in layers:
        attended = inside.attended[layer]
        seen = attended.seen.expand(3, 1, LENGTH, LENGTH)
        scores = attended.scores().double().masked_fill(~seen, -torch.inf)
        rows = there[:, None, :].expand(3, scores.shape[1], LENGTH)
        wanted = slow[layer].double()[rows]
        assert torch.allclose(scores.softmax(-1)[rows], wanted, atol=1e-5)
        assert torch.equal(seen.expand_as(scores)[rows], wanted > 0)
    assert model.config._attn_implementation == "sdpa"


def test_scores_of_images_are_products_of_queries_and_keys(tmp_path: Path) -> None:
    """Of a ViT, to which no mask is given: q·k/√d one by one in float64, from what its projections read, and the
    probabilities of eager attention."""
    model, blocks = opened("vit-classifier", tmp_path)
    slow = probabilities(model, pictures())
    reads: dict[int, Tensor] = {}
    for layer, block in enumerate(blocks):
        attention = model.get_submodule(block).attention
        attention.q_proj.register_forward_pre_hook(lambda module, given, layer=layer: reads.update({layer: given[0]}))
    with torch.no_grad(), listening(model, blocks, hidden=[EMBEDDINGS, 0, 1], attention=[0, 1]) as taps:
        plain = model(**pictures()).logits
        inside = taps.take()
    states = model(**pictures(), output_hidden_states=True).hidden_states
    assert all(torch.equal(inside.hidden[layer], states[layer + 1]) for layer in (EMBEDDINGS, 0))
    assert model.config._attn_implementation == "sdpa" and torch.equal(plain, model(**pictures()).logits)
    for layer, block in enumerate(blocks):
        attention, attended = model.get_submodule(block).attention, inside.attended[layer]
        found = attended.scores().double()
        rows, heads, length, _ = found.shape
        size = model.config.hidden_size // heads
        query, key = ((reads[layer].double() @ one.weight.double().T + one.bias.double()).unflatten(-1, (heads, size))
                      for one in (attention.q_proj, attention.k_proj))  # fmt: skip
        for row in range(rows):
            for head in range(heads):
                wanted = torch.stack([query[row, one, head] @ key[row, :, head].T for one in range(length)]) / size**0.5
                assert torch.allclose(found[row, head], wanted, atol=1e-5)
        assert attended.seen.all() and attended.seen.shape[-2:] == (length, length) == (17, 17)
        assert torch.allclose(found.softmax(-1), slow[layer].double(), atol=1e-5)


def test_a_window_hides_what_is_far(tmp_path: Path) -> None:
    model, blocks = opened("mistral", tmp_path)
    with listening(model, blocks, attention=[0]) as taps:
        model(**batch(None))
        seen = taps.take().attended[0].seen[0, 0]
    assert seen.sum(-1).tolist() == [min(query + 1, 8) for query in range(LENGTH)]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "modernbert"])
def test_hidden_states_are_transformers_own(name: str, tmp_path: Path) -> None:
    """But for the last one, which transformers gives after the last norm."""
    model, blocks = opened(name, tmp_path)
    inputs = batch("right")
    known = model(**inputs, output_hidden_states=True).hidden_states
    with listening(model, blocks, hidden=[EMBEDDINGS, *range(len(blocks))]) as taps:
        model(**inputs)
        inside = taps.take()
    assert torch.equal(inside.hidden[EMBEDDINGS], known[0])
    for layer in range(len(blocks) - (name != "bert")):
        assert torch.equal(inside.hidden[layer], known[layer + 1])


def test_only_what_is_asked_for_is_kept(tmp_path: Path) -> None:
    model, blocks = opened("modernbert", tmp_path)
    taps = Taps(model, blocks, hidden=[1], attention=[2])
    model(**batch(None))
    inside = taps.take()
    assert list(inside.hidden) == [1] and list(inside.attended) == [2] and model.config._attn_implementation == NAME
    assert not taps._kept.hidden
    taps.close()
    model(**batch(None))
    assert not taps._kept.hidden and not taps._kept.attended


def test_two_models_do_not_hear_each_other(tmp_path: Path) -> None:
    """A teacher and a student of one class, both in one step, and gradients go through the scores."""
    model, blocks = opened("llama", tmp_path / "one")
    other, _ = opened("llama", tmp_path / "other")
    with listening(model, blocks, attention=[0]) as one, listening(other, blocks, attention=[1]) as two:
        model(**batch(None))
        other(**batch(None))
        mine, its = one.take(), two.take()
    assert list(mine.attended) == [0] and list(its.attended) == [1]
    mine.attended[0].scores().square().mean().backward()
    attention = model.get_submodule(blocks[0]).self_attn
    assert attention.q_proj.weight.grad.abs().sum() > 0 and attention.k_proj.weight.grad.abs().sum() > 0
    assert all(value.grad is None for value in other.parameters())


@pytest.mark.parametrize("name", ["deberta-v2", "bloom"])
def test_attention_of_another_way_is_refused(name: str, tmp_path: Path) -> None:
    model, blocks = opened(name, tmp_path)
    inputs = around(model, torch.ones(1, 4, dtype=torch.long))
    with (
        pytest.raises(BadRecipe, match="its scores cannot be learned from"),
        listening(model, blocks, attention=[0]) as taps,
    ):
        model(**inputs)
        taps.take()
    assert model(**inputs).logits.isfinite().all()
