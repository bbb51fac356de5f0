"""Bytes that a model holds: once each, wherever a module keeps them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import build, tiny
from torch import nn

import llmcomp
from llmcomp.measure.holding import holding
from llmcomp.measure.load import load
from llmcomp.recipe import QuantizeStep, Recipe


def stored(module: nn.Module) -> int:
    """Parameters and buffers, tied ones once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_language_model(dtype: torch.dtype) -> None:
    model = build("llama-untied", dtype=dtype)
    found = holding(model)
    assert found.tensors == stored(model)
    assert found.blocks == sum(stored(block) for block in model.model.layers)
    assert found.read == found.tensors - stored(model.model.embed_tokens)


def test_a_table_that_the_head_multiplies_with_is_read() -> None:
    tied = build("llama")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert holding(tied).read == holding(tied).tensors == stored(tied)


def test_of_an_encoder_with_two_tables_beside_the_words() -> None:
    model = build("bert-classifier")
    found = holding(model)
    assert found.tensors == stored(model)
    assert found.blocks == sum(stored(layer) for layer in model.bert.encoder.layer)


def test_of_experts_nobody_knows_which_are_read() -> None:
    model = build("mixtral")
    assert holding(model).read is None
    assert holding(model).blocks == sum(stored(layer) for layer in model.model.layers)


def test_what_lies_beside_parameters_counts() -> None:
    """As bitsandbytes and gptqmodel keep it: on a parameter, in an object on it, in a list on a module."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ModuleList([nn.Linear(2, 2, bias=False)]))
    before = holding(model)
    assert before.tensors == 4 * 16 + 4 * 4 and before.blocks == 4 * 4
    weight = model[0].weight
    weight.quant_state = SimpleNamespace(absmax=torch.ones(5), state2=SimpleNamespace(absmax=torch.ones(3)))
    model[1][0].laid_out = [torch.ones(7, dtype=torch.uint8), {"again": weight}]
    found = holding(model)
    assert found.tensors == before.tensors + 4 * (5 + 3) + 7
    # The block refers to the other module's weight, so it holds that, too, and what hangs on it.
    assert found.blocks == before.blocks + 7 + 4 * 16 + 4 * (5 + 3)


def test_packed_weights_count_as_they_lie(tmp_path: Path) -> None:
    source = tiny("llama-untied", tmp_path / "source", dtype=torch.bfloat16, tokenizer=True)
    step = QuantizeStep(method="rtn", bits=4, group_size=128, targets=("attention", "mlp", "embeddings", "head"))
    options = llmcomp.RunOptions(output=tmp_path / "packed", verify=False, evaluate=False)
    packed = load(llmcomp.quantize(str(source), recipe=Recipe((step,), format="llmcomp"), options=options).output)
    found, dense = holding(packed), holding(load(source))
    assert found.tensors == stored(packed) and found.blocks <= 0.30 * dense.blocks
    assert found.read == found.tensors - stored(packed.get_input_embeddings())


def test_lists_in_lists_are_one_block() -> None:
    inner = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(2)])
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"experts": inner})])
    assert holding(model).blocks == 2 * 9 * 4
