"""The head on chunks gives what the whole forward gives, whatever the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny import PAD, VOCABULARY, build
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from llmcomp.measure import forward as split

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": PAD,
}  # fmt: skip
LANGUAGE = ("llama", "mistral", "gpt2", "opt", "bert", "roberta", "distilbert", "modernbert", "mpnet")


def _scaled_head(name: str) -> Any:
    """Models whose head does more than a product: Cohere scales the logits, Gemma 2 caps them."""
    torch.manual_seed(0)
    if name == "cohere":
        return transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL, logit_scale=0.25)).eval()
    config = transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.01)
    return transformers.Gemma2ForCausalLM(config).eval()


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask


@pytest.mark.parametrize("name", [*LANGUAGE, "cohere", "gemma2"])
def test_chunks_equal_the_whole(name: str) -> None:
    model = build(name) if name in LANGUAGE else _scaled_head(name)
    ids, mask = _batch()
    before = set(model.state_dict())
    with torch.inference_mode():
        whole = model(input_ids=ids, attention_mask=mask).logits
    runner = split.SplitModel(model)
    hidden = runner.hidden(ids, mask)
    assert runner.splits, "this family's head was not found to be separable"
    rows, columns = mask.nonzero(as_tuple=True)
    places = zip(rows.split(5), columns.split(5), strict=True)
    parts = [runner.logits(hidden[r, c], ids[r, c]) for r, c in places]
    torch.testing.assert_close(torch.cat(parts), whole[rows, columns], rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        again = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(again, whole), "the model must be left as it was"
    assert set(model.state_dict()) == before
    assert not any("forward" in module.__dict__ for module in model.modules())


class _Mixing(nn.Module):
    """A model without a base model, whose head mixes positions: nothing to split."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.embed(input_ids).cumsum(1)))


def test_what_cannot_be_split_runs_whole() -> None:
    model = _Mixing().eval()
    ids, _ = _batch()
    runner = split.SplitModel(model)
    hidden = runner.hidden(ids, None)
    assert not runner.splits
    torch.testing.assert_close(runner.logits(hidden[0], ids[0]), model(ids).logits[0])


def test_a_first_forward_that_wraps_every_module_finds_them_as_they_were() -> None:
    """A hook of compressed-tensors takes `forward.__func__` of each module on the first forward."""
    model = build("llama")
    ids, mask = _batch()
    whole = model(input_ids=ids, attention_mask=mask).logits
    wrapped: list[Any] = []

    def wrap(*_: Any) -> None:
        hook.remove()
        wrapped.extend(module.forward.__func__ for module in model.modules() if module is not model)

    hook = model.register_forward_pre_hook(wrap)
    runner = split.SplitModel(model)
    hidden = runner.hidden(ids, mask)
    assert wrapped and runner.splits
    torch.testing.assert_close(runner.logits(hidden[0], ids[0]), whole[0], rtol=1e-4, atol=1e-5)


def test_the_largest_logits_are_bounded() -> None:
    """With 200,000 tokens in the vocabulary, no head output holds more than `BYTES_AT_ONCE` in fp32."""
    model = build("llama-untied", vocab_size=200_000)
    shapes: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _i, output: shapes.append(output.numel() * 4))
    ids = torch.randint(0, 200_000, (2, 128), generator=torch.Generator().manual_seed(0))
    runner = split.SplitModel(model)
    hidden = runner.hidden(ids, None).flatten(0, 1)
    at_once = runner.positions_at_once
    for start in range(0, len(hidden), at_once):
        runner.logits(hidden[start : start + at_once], ids.flatten()[start : start + at_once])
    assert at_once == split.BYTES_AT_ONCE // (4 * 200_000)
    assert max(shapes) <= split.BYTES_AT_ONCE < 256 * 200_000 * 4
    # One of the first forward, one a row to see the head's shape, then every position once.
    assert sum(shapes) == (1 + 2 + 256) * 200_000 * 4
