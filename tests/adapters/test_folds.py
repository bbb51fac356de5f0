"""What can take over a scale of a stage's input: folded without quantizing, no model's logits change."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scales import apply_fold
from tiny import DECODERS, TINY, VOCABULARY, build
from torch import Tensor, nn

from llmcomp.adapters.base import Adapter
from llmcomp.adapters.discover import discover
from llmcomp.adapters.folds import Fold, folds, norm_form
from llmcomp.experts import split_experts
from llmcomp.feeds import around

BODIES = tuple(name for name in TINY if not name.endswith("-classifier"))
IDS = torch.randint(8, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
NORM, LINEAR, RESIDUAL, UNKNOWN = "norm", "linear", "is also read by add", "is not the output of one norm or linear"

# Verdicts on a block's stages, in order: the kind of producer, or a part of the reason why there is none.
LLAMA = (NORM, LINEAR, NORM, LINEAR)
POST_NORM = (UNKNOWN, LINEAR, RESIDUAL, UNKNOWN)  # BERT's: the norm's output is the residual stream, too
PARALLEL = (NORM, LINEAR, LINEAR)
EXPECTED = {
    **dict.fromkeys(
        ("llama", "llama-untied", "mistral", "qwen2", "qwen3", "phi3", "stablelm", "smollm3", "granite"), LLAMA
    ),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3-vision"), ("norm+1", LINEAR, "norm+1", LINEAR)),
    "olmo2": (UNKNOWN, LINEAR, UNKNOWN, LINEAR),
    "cohere": PARALLEL,
    "gptj": (NORM, LINEAR, "fc_in is also read by pow"),
    "gpt-neox": (NORM, LINEAR, NORM, UNKNOWN),
    "bloom": (NORM, LINEAR, NORM, "is also read by mul"),
    "falcon": (NORM, UNKNOWN, UNKNOWN),  # its values are picked by an index, which nobody follows
    "falcon-alibi": (NORM, UNKNOWN, NORM, UNKNOWN),
    "gpt2": (NORM, LINEAR, NORM, "is also read by pow"),
    "opt": (NORM, LINEAR, NORM, UNKNOWN),
    "albert": (UNKNOWN, LINEAR, RESIDUAL, "ffn is also read by pow"),
    "modernbert": LLAMA,
    # What an expert reads is picked from among the norm's tokens, which nobody follows.
    **dict.fromkeys(("mixtral", "qwen3-moe"), (NORM, LINEAR, *(UNKNOWN, LINEAR) * 4)),
    "deepseek-v3": (NORM, NORM, NORM, LINEAR, *(UNKNOWN, LINEAR) * 8, "is also read by index", LINEAR),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "distilbert", "mpnet"), POST_NORM),
    "t5": (NORM, LINEAR, NORM, UNKNOWN),
    "flan-t5": LLAMA,
    "bart": POST_NORM,
    "whisper": (NORM, LINEAR, NORM, UNKNOWN),
    **dict.fromkeys(("llava", "qwen2-vl", "qwen2.5-vl", "idefics3", "smolvlm"), LLAMA),
}  # fmt: skip
# What cross-attention's keys and values read is the encoder's output, which every block of the decoder reads.
DECODING = {
    **dict.fromkeys(("t5", "whisper"), (NORM, LINEAR, NORM, UNKNOWN, LINEAR, NORM, UNKNOWN)),
    "flan-t5": (NORM, LINEAR, NORM, UNKNOWN, LINEAR, NORM, LINEAR),
    "bart": (UNKNOWN, LINEAR, RESIDUAL, UNKNOWN, LINEAR, RESIDUAL, UNKNOWN),
}


def apart(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny model, its experts as linears."""
    model = build(name, dtype=dtype)
    split_experts(model)
    return model


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        inputs = around(model, IDS)
        mask = {"attention_mask": torch.ones_like(IDS)} if "input_ids" in inputs else {}
        return model(**inputs, **mask).logits


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, tuple[Adapter, dict[str, Fold | str]]]]:
    yield {name: (adapter := discover(apart(name).to("meta")), folds(adapter)) for name in BODIES}


def scale_for(fold: Fold, generator: torch.Generator) -> Tensor:
    """Powers of two, the same where channels are."""
    exponents = torch.randint(-3, 4, (int(fold.channels.max()) + 1,), generator=generator)
    return torch.exp2(exponents.float())[fold.channels]


@pytest.mark.parametrize("name", BODIES)
def test_verdicts(name: str, found: dict[str, tuple[Adapter, dict[str, Fold | str]]]) -> None:
    adapter, verdicts = found[name]
    for block in adapter.blocks[1:] or adapter.blocks:  # ModernBERT's first has no norm before attention
        said = [verdicts[stage[0].name] for stage in block.stages if "pos_" not in stage[0].name]
        wanted = DECODING[name] if name in DECODING and "decoder" in block.name else EXPECTED[name]
        assert len(said) == len(wanted)
        for verdict, expected in zip(said, wanted, strict=True):
            if isinstance(verdict, Fold):
                assert verdict.kind == expected, verdict
                assert verdict.producer.startswith(f"{block.name}.")
            else:
                assert expected in verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BODIES)
def test_folding_everything_changes_no_logit(
    name: str, dtype: torch.dtype, found: dict[str, tuple[Adapter, dict[str, Fold | str]]]
) -> None:
    """Powers of two go through every product unharmed, so the logits are equal to the bit; but for norms that
    add one to their weight first, whose rounding moves."""
    adapter, verdicts = found[name]
    model = apart(name, dtype)
    before, generator = outputs(model), torch.Generator().manual_seed(1)
    chosen = {
        stage[0].name: (stage, verdict, scale_for(verdict, generator))
        for block in adapter.blocks
        for stage in block.stages
        if isinstance(verdict := verdicts[stage[0].name], Fold)
    }
    for stage, fold, scale in chosen.values():
        assert not bool((scale == 1).all())
        apply_fold(model, stage, fold, scale)
    after = outputs(model)
    if any(fold.kind == "norm+1" for _, fold, _ in chosen.values()):
        limit = 1e-5 if dtype == torch.float32 else 0.05
        assert float((after - before).float().std() / before.float().std()) < limit
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("name", ["bert", "olmo2", "gpt2", "gpt-neox"])
def test_where_it_says_no_folding_would_be_wrong(
    name: str, found: dict[str, tuple[Adapter, dict[str, Fold | str]]]
) -> None:
    """Dividing by the scale in the nearest norm or linear before, which the verdict forbids."""
    adapter, verdicts = found[name]
    block = adapter.blocks[1]
    producers = {
        "bert": (2, "attention.output.LayerNorm", NORM), "olmo2": (2, "post_attention_layernorm", NORM),
        "gpt2": (3, "mlp.c_fc", LINEAR), "gpt-neox": (3, "mlp.dense_h_to_4h", LINEAR),
    }  # fmt: skip
    number, producer, kind = producers[name]
    stage = block.stages[number]
    assert isinstance(verdicts[stage[0].name], str)
    wrong = Fold(f"{block.name}.{producer}", kind, torch.arange(stage[0].in_features))
    model = build(name)
    before = outputs(model)
    apply_fold(model, stage, wrong, scale_for(wrong, torch.Generator().manual_seed(1)))
    assert float((outputs(model) - before).std() / before.std()) > 1e-3


def test_query_heads_of_a_group_share_their_values_scale(
    found: dict[str, tuple[Adapter, dict[str, Fold | str]]]
) -> None:
    _, verdicts = found["llama"]
    fold = verdicts["model.layers.0.self_attn.o_proj"]
    assert isinstance(fold, Fold) and fold.producer == "model.layers.0.self_attn.v_proj"
    heads = fold.channels.view(4, 32)
    assert torch.equal(heads[0], torch.arange(32)) and torch.equal(heads[1], heads[0])
    assert torch.equal(heads[2], torch.arange(32, 64)) and torch.equal(heads[3], heads[2])


def test_values_and_the_linear_half_of_fused_weights(
    found: dict[str, tuple[Adapter, dict[str, Fold | str]]]
) -> None:
    _, verdicts = found["phi3"]
    values = verdicts["model.layers.1.self_attn.o_proj"]
    up = verdicts["model.layers.1.mlp.down_proj"]
    assert isinstance(values, Fold) and isinstance(up, Fold)
    assert sorted(set(values.channels.tolist())) == list(range(192, 256))  # behind 128 of queries and 64 of keys
    assert torch.equal(up.channels, torch.arange(256, 512))
    _, verdicts = found["gpt-neox"]
    values = verdicts["gpt_neox.layers.1.attention.dense"]
    assert isinstance(values, Fold)
    assert torch.equal(values.channels.view(4, 32)[1], torch.arange(96 + 64, 96 + 96))  # head by head q, k, v


class Routed(nn.Module):
    """Wraps an MLP: a router reads the norm's output by a bare parameter."""

    def __init__(self, mlp: nn.Module, width: int, transposed: bool) -> None:
        super().__init__()
        self.mlp, self.transposed = mlp, transposed
        self.weight = nn.Parameter(torch.randn((width, 4) if transposed else (4, width)))

    def forward(self, x: Tensor) -> Tensor:
        gate = x @ self.weight if self.transposed else nn.functional.linear(x, self.weight)
        return self.mlp(x) * gate.softmax(-1)[..., :1]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_router_reads_the_norm_like_any_other(transposed: bool) -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp = Routed(layer.mlp, 128, transposed)
    adapter = discover(copy.deepcopy(model).to("meta"))
    stage = adapter.blocks[0].stages[2]
    verdict = folds(adapter)[stage[0].name]
    if transposed:
        assert verdict == "the output of post_attention_layernorm is also read by mm"
        return
    assert isinstance(verdict, Fold) and verdict.others == ("model.layers.0.mlp.weight",)
    before = outputs(model)
    apply_fold(model, stage, verdict, scale_for(verdict, torch.Generator().manual_seed(1)))
    assert torch.equal(outputs(model), before)


def test_a_forward_that_cannot_be_followed_folds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("not on meta")

    adapter = discover(build("llama").to("meta"))
    monkeypatch.setattr(type(adapter.model.model), "forward", refuse)
    said = folds(adapter)
    assert set(said.values()) == {"its forward could not be followed (RuntimeError: not on meta)"}


class Odd(nn.Module):
    """Neither multiplies by its weight nor by one more."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.exp(self.weight)


def test_forms_of_norms() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    assert norm_form(nn.LayerNorm(8)) == norm_form(LlamaRMSNorm(8)) == "norm"
    assert norm_form(nn.LayerNorm(8, bias=False)) == "norm"
    assert norm_form(Gemma2RMSNorm(8)) == "norm+1"
    assert norm_form(Odd()) is None


def test_every_decoder_is_looked_at() -> None:
    assert set(EXPECTED) == set(BODIES) and set(DECODERS) <= set(BODIES)


@pytest.mark.parametrize("asks", [False, True])
def test_channels_that_change_places_between_tokens_are_seen(asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the model asks for a mask's truth value, which on meta tensors is said to be yes: what the trace asks
    of its own numbers is answered by those."""
    model = build("llama")

    def shuffled(self: Any, x: Tensor) -> Tensor:
        if asks:
            assert torch.ones(1, dtype=torch.bool, device=x.device).all()
        made = self.up_proj(x)
        return self.down_proj(made.reshape(x.shape[0], -1, x.shape[1]).transpose(1, 2))

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", shuffled)
    verdict = folds(discover(model))["model.layers.0.mlp.down_proj"]
    assert isinstance(verdict, str) and UNKNOWN in verdict
