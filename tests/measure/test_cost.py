"""Sizes from headers, zeros, latency, and a peak that grows with the model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build, tiny

from llmcomp.errors import BadCheckpoint, RunError
from llmcomp.measure import cost


def test_size_of_a_dense_checkpoint_in_shards(tmp_path: Path) -> None:
    model = build("llama")
    tiny("llama", tmp_path, shard="200KB")
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    found = cost.size_of(tmp_path, lambda name: "mlp" if ".mlp." in name else "other")
    assert found.parameters == sum(p.numel() for p in model.parameters())  # tied weights once in both
    assert found.bytes_on_disk == sum(file.stat().st_size for file in files)
    assert found.parts["mlp"] == 4 * sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)
    assert sum(found.parts.values()) == 4 * found.parameters
    assert cost.size_of(tmp_path).parts == {}
    assert cost.loaded_bytes(tmp_path) == 4 * found.parameters


def test_packed_weights_count_as_what_they_stand_for(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    dense = cost.size_of(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    rows, columns = tensors.pop(f"{name}.weight").shape
    tensors[f"{name}.weight_packed"] = torch.zeros(rows, columns // 8, dtype=torch.int32)
    tensors[f"{name}.weight_shape"] = torch.tensor([rows, columns])
    tensors[f"{name}.weight_scale"] = torch.ones(rows, columns // 64)
    tensors[f"{name}.weight_zero_point"] = torch.zeros(rows // 8, columns // 64, dtype=torch.int32)
    whole = "model.layers.1.mlp.up_proj"
    tensors[f"{whole}.weight"] = tensors[f"{whole}.weight"].to(torch.int8)
    tensors[f"{whole}.weight_scale"] = torch.ones(rows, 1)
    tensors["position_ids"] = torch.arange(9)
    save_file(tensors, tmp_path / "model.safetensors")
    found = cost.size_of(tmp_path)
    assert found.parameters == dense.parameters
    assert found.bytes_on_disk < dense.bytes_on_disk
    assert cost.loaded_bytes(tmp_path) == 4 * dense.parameters
    del tensors[f"{name}.weight_shape"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"without model\.layers\.0\.mlp\.up_proj\.weight_shape"):
        cost.size_of(tmp_path)


def test_sparsity_counts_zeros_of_matrices() -> None:
    model = build("llama-untied")
    assert cost.sparsity_of(cost.weights_of(model)) == 0.0
    matrices = [p for p in model.parameters() if p.ndim > 1]
    with torch.no_grad():
        matrices[1].view(-1)[::2] = 0
        model.model.norm.weight.zero_()
    share = (matrices[1].numel() // 2) / sum(p.numel() for p in matrices)
    assert cost.sparsity_of(cost.weights_of(model)) == pytest.approx(share)


def test_latency_runs_the_models_in_turns() -> None:
    models = [build("bert"), build("gpt2")]
    calls: list[tuple[int, tuple[int, ...]]] = []
    for number, model in enumerate(models):
        model.register_forward_pre_hook(
            lambda _m, _a, inputs, number=number: calls.append((number, tuple(inputs["input_ids"].shape))),
            with_kwargs=True,
        )
    found = cost.latency(models, batch=2, sequence=9, repeats=3)
    assert calls == [(0, (2, 9)), (1, (2, 9))] * 5
    for one in found:
        assert 0 < one.low <= one.median <= one.high


def test_peak_memory_holds_the_weights_and_little_else(tmp_path: Path) -> None:
    large = tiny("llama-untied", tmp_path / "large", vocab_size=100_000)
    weights = cost.size_of(large).bytes_on_disk  # 103 MB, beside which 16 tokens' logits are 6 MB
    peak = cost.peak_memory(large, task="causal-lm", sequence=16)
    # Half of the weights are an embedding of which 16 rows are read; the rest of it stays on disk.
    assert 0.4 * weights <= peak < 2.5 * weights


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho first >&2\necho 'OSError: gone' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(RunError, match="peak memory of model failed: OSError: gone"):
        cost.peak_memory("model")
