"""The layout's own account of a checkpoint, and config.json's list of what stays dense."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from checkpoints import bert, gpt2, linears, llama, ref
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from llmcomp import bnb
from llmcomp.errors import BadRecipe
from llmcomp.formats import FORMATS, Layout
from llmcomp.formats.bitsandbytes import skipped
from llmcomp.schemes import Scheme

FORMS = ("bnb-nf4", "bnb-int8")
MODELS = {"llama": llama(), "bert": bert(), "gpt2": gpt2()}


def layout_of(form: str, model: nn.Module, names: list[str]) -> Layout:
    return FORMATS[form]([(ref(model, name), Scheme(8)) for name in names], model)


def replaced(model: Any, config: dict[str, Any]) -> set[str]:
    """Names of the modules that transformers makes bitsandbytes' own by a config.json's section."""
    with torch.device("meta"):
        skeleton = copy.deepcopy(model).to("meta")
    read = BitsAndBytesConfig.from_dict(config)
    replace_with_bnb_linear(skeleton, read.llm_int8_skip_modules, read)
    return {name for name, module in skeleton.named_modules() if type(module).__name__ in _MADE}


_MADE = ("Linear4bit", "Linear8bitLt")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_bytes_and_values_are_those_of_the_tensors(form: str, name: str) -> None:
    model = MODELS[name]
    layout = layout_of(form, model, linears(model))
    for module in linears(model)[:5]:
        one, dense = ref(model, module), model.get_submodule(module).weight.detach()
        tensors = layout.tensors(one, Held(dense.t() if one.transposed else dense))
        assert layout.nbytes(one, 4) == sum(tensor.nbytes for tensor in tensors.values())
        assert all(key.startswith(f"{module}.") for key in tensors)
        back = layout.decode(one, tensors)
        assert back.shape == dense.shape
        assert float((back - dense).norm() / dense.norm()) < (0.15 if form == "bnb-nf4" else 0.02)


class Held:
    """A compressed weight only as far as a layout looks at it."""

    def __init__(self, dense: torch.Tensor) -> None:
        self._dense = dense

    def dense(self) -> torch.Tensor:
        return self._dense


@given(st.sampled_from(sorted(MODELS)), st.data())
@settings(max_examples=30, deadline=None)
def test_what_is_skipped_leaves_exactly_the_plan(name: str, data: st.DataObject) -> None:
    """Whatever is chosen, transformers replaces just that, in the whole model and in its base."""
    model = MODELS[name]
    chosen = data.draw(st.sets(st.sampled_from(linears(model)), min_size=1))
    config = layout_of("bnb-nf4", model, sorted(chosen)).config(model)
    assert config is not None and replaced(model, config) == chosen
    prefix = f"{model.base_model_prefix}."
    assert replaced(model.base_model, config) == {one.removeprefix(prefix) for one in chosen}


def test_what_only_the_base_model_has_is_skipped() -> None:
    """AutoModel gives BERT a pooler that no masked model's checkpoint holds."""
    model = MODELS["bert"]
    assert "pooler.dense" in skipped(model, linears(model))
    assert "pooler.dense" not in bnb.convertible(model)


def test_a_name_at_the_end_of_another() -> None:
    """transformers takes 'layer' for the end of any name; then the pattern is anchored."""
    model = nn.ModuleDict({"dense": nn.Linear(4, 4), "block": nn.ModuleDict({"dense": nn.Linear(4, 4)})})
    assert skipped(model, {"block.dense"}) == ["dense$"]
    assert replaced(model, BitsAndBytesConfig(load_in_8bit=True).to_dict()) == {"dense", "block.dense"}
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped(model, {"block.dense"}))
    assert replaced(model, config.to_dict()) == {"block.dense"}


def test_nothing_skipped_is_an_empty_list() -> None:
    """Which is not None: that would leave the head dense."""
    config = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    config.tie_word_embeddings = False
    model = BertForMaskedLM(config).eval()
    found = layout_of("bnb-int8", model, list(bnb.convertible(model))).config(model)
    assert found is not None and found["llm_int8_skip_modules"] == ["pooler.dense"]
    assert replaced(model, found) == set(bnb.convertible(model))


def test_rows_that_blocks_do_not_divide() -> None:
    """Which bitsandbytes computes wrongly where a CPU has AVX512."""
    config = BertConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    model = BertForMaskedLM(config).eval()
    name = "bert.encoder.layer.0.output.dense"
    with pytest.raises(BadRecipe, match=f"{name} has 96 inputs.*take bnb-int8 or --skip dense"):
        layout_of("bnb-nf4", model, [name])
    assert name in layout_of("bnb-int8", model, [name]).modules


@pytest.mark.parametrize(
    ("model", "names", "said"),
    [
        (llama(tied=True), ["lm_head"], "lm_head shares its storage with the embeddings"),
        (llama(), ["model.embed_tokens"], "no embeddings that can be saved"),
        (gpt2(), ["transformer.wte"], "no embeddings that can be saved"),
    ],
    ids=["tied", "embeddings", "gpt2"],
)
@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_carried(form: str, model: nn.Module, names: list[str], said: str) -> None:
    with pytest.raises(BadRecipe, match=said):
        layout_of(form, model, names)
