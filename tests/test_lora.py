"""Factors beside linears of every kind: what they compute, and what merging makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed import packed, random_mask
from tiny import build
from torch import Tensor, nn

import llmcomp
from llmcomp import lora
from llmcomp.errors import BadCheckpoint
from llmcomp.formats.opening import open_checkpoint
from llmcomp.kinds import Kind, LowRank, Sparse
from llmcomp.packed import PackedLinear
from llmcomp.patterns import Pattern
from llmcomp.schemes import Scheme

KINDS: dict[str, Kind] = {
    "q_proj": Scheme(4, 32), "k_proj": Scheme(2, 32, False), "v_proj": Sparse(Pattern(2, 4)),
    "o_proj": Sparse(Pattern(2, 4), Scheme(4, 32)), "up_proj": LowRank(8),
    "down_proj": LowRank(8, Scheme(8), Scheme(8)),
}  # fmt: skip
TARGETS = [f"model.layers.{n}.{'mlp' if name in ('up_proj', 'down_proj') else 'self_attn'}.{name}"
           for n in (0, 1) for name in KINDS]  # fmt: skip


def shaken(wrapped: Any) -> Any:
    """Factors that do something: peft's B is zero at the start."""
    generator = torch.Generator().manual_seed(3)
    for name, value in wrapped.named_parameters():
        if ".lora_B." in name:
            value.data = 0.05 * torch.randn(value.shape, generator=generator)
    return wrapped.eval()


def logits(model: Any) -> Tensor:
    ids = torch.arange(5, 29).view(2, 12)
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a linear of each kind, and an adapter beside them."""
    path = packed("llama", tmp_path_factory.mktemp("lora") / "m", lambda name: KINDS.get(name.rpartition(".")[2]))
    wrapped = shaken(lora.wrap(llmcomp.load(path), TARGETS, rank=4, alpha=8, dropout=0.0, task="CAUSAL_LM"))
    lora.save(wrapped, path / lora.FOLDER)
    torch.save(logits(wrapped), path / "expected.pt")
    return path


def test_factors_stand_beside_every_kind_of_packed_weight(directory: Path) -> None:
    expected = torch.load(directory / "expected.pt")
    bare = llmcomp.load(directory, adapter=False)
    assert not lora.factors(bare)
    assert float((logits(bare) - expected).norm() / expected.norm()) > 1e-3
    model = llmcomp.load(directory)
    assert len(lora.factors(model)) == 2 * len(TARGETS)
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # peft's, of what it has been told of
def test_peft_opens_them_by_our_config(directory: Path) -> None:
    from peft import PeftModel

    folder = directory / lora.FOLDER
    model = PeftModel.from_pretrained(
        llmcomp.load(directory, adapter=False), str(folder), config=lora.adapter_config(folder)
    )
    assert torch.equal(logits(model), torch.load(directory / "expected.pt"))


def test_factors_learn_through_packed_weights(directory: Path) -> None:
    """Their gradients are those of factors beside the decoded weights."""
    packed_model = llmcomp.load(directory)
    dense = build("llama")
    lacking = dense.load_state_dict(dict(open_checkpoint(directory).dense()), strict=False)
    assert lacking.missing_keys == ["lm_head.weight"] and not lacking.unexpected_keys  # which is tied
    lora.attach(dense, directory / lora.FOLDER)
    ids, gradients = torch.arange(5, 29).view(2, 12), []
    for model in (packed_model, dense.double()):
        for name, value in model.named_parameters():
            value.requires_grad_(".lora_" in name)
        model(input_ids=ids).logits.logsumexp(-1).mean().backward()
        gradients.append({name: value.grad.double() for name, value in model.named_parameters() if ".lora_" in name})
    assert gradients[0].keys() == gradients[1].keys()
    first = [name for name in gradients[0] if ".0.self_attn.q_proj." in name and "lora_B" in name]
    assert first and all(gradients[0][name].abs().max() > 0 for name in first)
    for name, wanted in gradients[1].items():
        assert float((gradients[0][name] - wanted).norm() / wanted.norm()) < 0.03, name


@pytest.mark.parametrize("rows", [48, 3000])  # at once, and in pieces
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_through_a_packed_linear_are_float64s(rows: int, dtype: torch.dtype) -> None:
    from packed import random_weight

    from llmcomp import native

    scheme = Scheme(4, 32, False)
    weight = random_weight((rows, 96), scheme, dtype)
    module = PackedLinear(nn.Linear(96, rows, bias=False, device="meta"), scheme, native.to_tensors(weight, False))
    module.settle()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 96, generator=generator).to(dtype).requires_grad_()
    sent = torch.randn(2, 5, rows, generator=generator).to(dtype)
    module(x).backward(sent)
    wanted = sent.double() @ weight.dense().double()
    assert x.grad is not None and x.grad.dtype == dtype
    assert float((x.grad.double() - wanted).norm() / wanted.norm()) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_under_a_mask_what_was_trained_is_what_is_merged(name: str) -> None:
    model = build(name)
    names = [key for key, one in model.named_modules() if key.endswith(("q_proj", "down_proj", "c_fc", "c_proj"))]
    masks = {}
    for seed, key in enumerate(names):
        weight = model.get_submodule(key).weight
        turned = type(model.get_submodule(key)).__name__ == "Conv1D"
        mask = random_mask(tuple(weight.t().shape if turned else weight.shape), Pattern(2, 4), seed)
        masks[key] = mask.t() if turned else mask
        weight.data *= masks[key]
    wrapped = shaken(lora.wrap(model, names, rank=4, alpha=8, dropout=0.0, task=None, masks=masks))
    expected, before = logits(wrapped), {key: wrapped.get_submodule(f"base_model.model.{key}.base_layer").weight.clone()
                                         for key in names}  # fmt: skip
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    for key, mask in masks.items():
        weight = merged.get_submodule(key).weight
        assert not bool((weight[~mask] != 0).any())
        assert bool((weight[mask] != before[key][mask]).all())


def test_what_is_no_adapter_is_one_sentence(directory: Path, tmp_path: Path) -> None:
    assert lora.beside(tmp_path) is None
    with pytest.raises(BadCheckpoint, match="holds no adapter_config"):
        lora.adapter_config(tmp_path)
    with pytest.raises(BadCheckpoint, match="does not fit the weights"):
        lora.attach(build("bert"), directory / lora.FOLDER)
