"""Checkpoint directories for tests, and ways to spoil them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import MASK, PAD, VOCABULARY, tiny
from torch import Tensor, nn

from llmcomp.adapters.discover import skeleton
from llmcomp.checkpoint import Binding, Checkpoint, bind
from llmcomp.experts import expert_shares, split_experts
from llmcomp.feeds import around

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def plain(directory: Path) -> Any:
    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(directory)


def fill(model: nn.Module, binding: Binding) -> Any:
    """Every bound tensor put in the skeleton's place; both ends of a tie get one object."""
    for name in binding.key_of:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = binding.tensor(name)
        else:
            module.register_parameter(leaf, nn.Parameter(binding.tensor(name), requires_grad=False))
    for target, source in binding.ties.items():
        owner, _, leaf = target.rpartition(".")
        model.get_submodule(owner).register_parameter(leaf, model.get_parameter(source))
    return model


def batch(model: nn.Module) -> dict[str, Tensor]:
    """Two rows of 24 ids, longer than the tiny models' windows; the second has eight of padding."""
    ids = torch.randint(MASK + 1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 16:], mask[1, 16:] = PAD, 0
    if (inputs := around(model, ids)).keys() != {"input_ids"}:
        return inputs
    return {"input_ids": ids, "attention_mask": mask}


def assert_same_outputs(directory: Path) -> Binding:
    """Assert that skeleton + bind is from_pretrained to the bit, experts taken apart in both; return the binding."""
    checkpoint = Checkpoint.open(directory)
    model = skeleton(directory)
    binding = bind(checkpoint, model)
    other = plain(directory)
    split_experts(other)
    with torch.no_grad():
        mine = fill(model, binding)(**batch(model))[0]
        theirs = other(**batch(model))[0]
    if expert_shares(other):
        # Products with a few tokens are rounded by where weights begin in memory, and mapped ones begin anywhere.
        assert float((mine - theirs).abs().max() / theirs.std()) < 1e-5
        state, loaded = model.state_dict(), other.state_dict()
        assert all(torch.equal(state[name], loaded[name]) for name in loaded)
    else:
        assert torch.equal(mine, theirs)
    assert mine.float().std() > 0.01
    return binding


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    state = {key: value.clone() for key, value in load_file(directory / "model.safetensors").items()}
    save_file(change(state), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def set_config(directory: Path, **values: Any) -> Path:
    config = json.loads((directory / "config.json").read_text()) | values
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def saved(directory: Path) -> Path:
    return tiny("llama", directory / "model")
