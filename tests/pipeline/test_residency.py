"""Parameters come into memory and leave it again, and none that is no number gets through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny

from llmcomp.errors import NumericalError
from llmcomp.pipeline.job import open_source
from llmcomp.pipeline.residency import Residency, check_finite


def opened(directory: Path) -> Residency:
    source = open_source(directory)
    return Residency(source.adapter, source.binding)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny("llama", tmp_path / "llama")


def test_names_are_inside_a_block_or_outside(directory: Path) -> None:
    params = opened(directory)
    inside = [*params.inside("model.layers.0"), *params.inside("model.layers.1")]
    assert len(inside) == 2 * 9 and not set(inside) & set(params.outside)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(params.outside)


def test_values_come_and_go(directory: Path) -> None:
    params, stored = opened(directory), load_file(directory / "model.safetensors")
    names = params.inside("model.layers.1")
    assert all(params.value(name).is_meta for name in names)
    params.read(names)
    assert all(params.value(name).equal(stored[name]) for name in names)
    params.release(names)
    assert all(params.value(name).is_meta for name in names)
    assert params.value(names[0]).shape == stored[names[0]].shape


def test_a_conv1d_is_seen_as_out_by_in(tmp_path: Path) -> None:
    source = open_source(tiny("gpt2", tmp_path / "gpt2"))
    params = Residency(source.adapter, source.binding)
    ref = next(ref for ref in source.adapter.refs if ref.name.endswith("h.0.attn.c_attn"))
    params.read([f"{ref.name}.weight"])
    weight = params.weight(ref)
    assert ref.transposed and weight.shape == (ref.out_features, ref.in_features) == (384, 128)
    params.install(ref, weight * 2)
    assert params.value(f"{ref.name}.weight").equal(weight.t() * 2)
    assert params.value(f"{ref.name}.weight").is_contiguous()


def test_a_side_of_a_tie_is_replaced_alone(directory: Path) -> None:
    params = opened(directory)
    params.read(params.outside)
    before = params.value("model.embed_tokens.weight").clone()
    params.put("lm_head.weight", torch.zeros_like(before))
    assert params.value("model.embed_tokens.weight").equal(before)
    assert not params.value("lm_head.weight").any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_named(value: float, directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][-1, -1] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    params = opened(directory)
    params.read(params.inside("model.layers.1"))
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds NaN or Inf"):
        params.read(params.inside("model.layers.0"))


def test_every_chunk_is_looked_at() -> None:
    tensor = torch.zeros((1 << 22) + 5)
    check_finite(tensor, "x")
    tensor[-1] = float("inf")
    with pytest.raises(NumericalError, match="x holds"):
        check_finite(tensor, "x")
    check_finite(torch.zeros(3, dtype=torch.int64), "integers")
