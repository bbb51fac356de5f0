"""Experts taken apart compute what the fused ones do, under the names that files have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import VOCABULARY, build, tiny
from torch import Tensor, nn

from llmcomp.checkpoint import Checkpoint, bind
from llmcomp.experts import Expert, SplitExperts, expert_shares, fused_parameters, split_experts

MIXTURES = ("mixtral", "qwen3-moe", "deepseek-v3")


def windows() -> Tensor:
    return torch.randint(8, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_same_outputs(name: str, implementation: str) -> None:
    model = build(name, dtype=torch.float64 if implementation == "eager" else torch.float32)
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        fused = model(input_ids=windows()).logits
        assert fused_parameters(model) and not expert_shares(model)
        split_experts(model)
        apart = model(input_ids=windows()).logits
    assert not fused_parameters(model) and expert_shares(model)
    assert float((fused - apart).abs().max() / fused.std()) < (1e-12 if implementation == "eager" else 1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_names_and_values_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    """transformers itself takes its fused parameters apart when it saves."""
    stored = load_file(tiny(name, tmp_path) / "model.safetensors")
    model = build(name)
    split_experts(model)
    binding = bind(Checkpoint.open(tmp_path), model)
    assert binding.missing == binding.unused == []
    state = model.state_dict()
    for linear in expert_shares(model):
        key = binding.key_of[f"{linear}.weight"]
        assert key.endswith(linear.partition(".mlp.")[2] + ".weight")
        assert torch.equal(state[f"{linear}.weight"], stored[key])
    assert {binding.file_name(f"{name}_packed") for name in state if ".experts." in name} == {
        f"{key}_packed" for key in stored if ".experts." in key
    }
    assert all(binding.file_name(name) == binding.key_of[name] for name in state if name in binding.key_of)
    assert len(expert_shares(model)) == sum(".experts." in key for key in stored)


def test_weights_are_views() -> None:
    model = build("mixtral")
    fused = model.model.layers[0].mlp.experts.gate_up_proj
    split_experts(model)
    expert = model.model.layers[0].mlp.experts[2]
    assert expert.w1.weight.data_ptr() == fused[2].data_ptr()
    assert expert.w3.weight.data_ptr() == fused[2, 256:].data_ptr()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(1, 6), st.data())
def test_any_routing_against_a_slow_loop(tokens: int, experts: int, data: st.DataObject) -> None:
    """Experts without a token, tokens that all go to one, several choices of one expert."""
    chosen = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    index = torch.randint(0, experts, (tokens, chosen), generator=generator)
    weights = torch.rand(tokens, chosen, generator=generator)
    x = torch.randn(tokens, 8, generator=generator)
    gate_up = torch.randn(experts, 12, 8, generator=generator)
    down = torch.randn(experts, 8, 6, generator=generator)
    parts = [Expert(("g", "u", "d"), nn.SiLU(), gate_up[n], down[n]) for n in range(experts)]
    calls: list[int] = []
    for part in parts:
        part.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    with torch.no_grad():
        found = SplitExperts(parts, chosen)(x, index, weights)
    exact = torch.zeros(tokens, 8, dtype=torch.float64)
    for token in range(tokens):
        for choice in range(chosen):
            n = int(index[token, choice])
            gate, up = (gate_up[n].double() @ x[token].double()).split(6)
            inner = gate / (1 + (-gate).exp()) * up
            exact[token] += float(weights[token, choice]) * (down[n].double() @ inner)
    assert torch.allclose(found.double(), exact, rtol=1e-4, atol=1e-4)
    assert len(calls) == experts and sum(calls) == tokens * chosen, "every expert is called, in order"
