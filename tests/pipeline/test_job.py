"""A recipe met with a checkpoint: formats, ties, data, witness."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, tiny

from llmcomp.errors import BadRecipe
from llmcomp.pipeline.job import Source, gather, open_source, plan_recipe
from llmcomp.progress import Silent
from llmcomp.recipe import Calibration, Override, QuantizeStep, Recipe


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(tiny("llama", tmp_path_factory.mktemp("job") / "llama", tokenizer=True))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(list(pydoc_data.topics.topics.values())[:6]), encoding="utf-8")
    return path


def test_opening_reads_no_weights(llama: Source) -> None:
    parameters = list(llama.adapter.model.parameters())
    assert parameters and all(parameter.is_meta for parameter in parameters)


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert", "gpt2", "idefics3", "qwen2-vl"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_which_linears_share_an_input_is_known(name: str, use_cache: bool, tmp_path: Path) -> None:
    path = tiny(name, tmp_path / name)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"use_cache": use_cache}))
    adapter = open_source(path).adapter
    assert adapter.trace_problem is None
    assert len(adapter.blocks[0].stages) == 4


def test_a_tie_is_kept_until_a_side_of_it_is_quantized(llama: Source) -> None:
    kept = plan_recipe(Recipe(), llama.adapter)
    assert kept.ties == {"lm_head.weight": "model.embed_tokens.weight"} and not kept.untied
    broken = plan_recipe(Recipe((QuantizeStep(overrides=(Override("head", bits=8),)),)), llama.adapter)
    assert broken.ties == {} and broken.untied


def test_the_dense_format_names_nothing_as_left_behind(llama: Source) -> None:
    plan = plan_recipe(Recipe(format="dense"), llama.adapter)
    assert set(plan.assignment.left) == {"model.embed_tokens", "lm_head"}
    assert plan.layout.config(llama.adapter.model) is None


def test_what_a_reader_cannot_decode_is_left_dense_with_its_reason(tmp_path: Path) -> None:
    source = open_source(tiny("gpt2", tmp_path / "gpt2"))
    plan = plan_recipe(Recipe((QuantizeStep(overrides=(Override("embeddings", bits=8),)),)), source.adapter)
    assert "transformer.wte" in plan.assignment.tasks
    assert plan.assignment.left["transformer.wte"].startswith("stored dense: ")


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        (Recipe(format="gguf"), "Format 'gguf' is not one of compressed-tensors, llmcomp, dense"),
        (Recipe((QuantizeStep(options={"dampening": 1}),)), "dampening"),
    ],
)
def test_recipes_that_do_not_fit(recipe: Recipe, named: str, llama: Source) -> None:
    with pytest.raises(BadRecipe, match=named):
        plan_recipe(recipe, llama.adapter)


def test_data_for_a_method_that_reads_some(llama: Source, text: Path) -> None:
    recipe = Recipe(calibration=Calibration(str(text), 6, 32))
    data = gather(recipe, llama, plan_recipe(recipe, llama.adapter), "model", Silent())
    ids = torch.cat([batch.input_ids for batch in data.batches])
    assert ids.shape == (6, 32)
    assert data.facts["samples"] == 6 and data.facts["tokens"] == 6 * 32
    witness = data.witness["input_ids"]
    assert witness.shape == (2, 32) and all(any(row.equal(known) for known in ids) for row in witness)
    assert gather(recipe, llama, plan_recipe(recipe, llama.adapter), "x", Silent()).fingerprint == data.fingerprint


def test_no_data_for_one_that_reads_none(llama: Source) -> None:
    recipe = Recipe((QuantizeStep(method="rtn"),), Calibration("no-such-file.txt"))
    data = gather(recipe, llama, plan_recipe(recipe, llama.adapter), "model", Silent())
    assert data.batches == [] and data.facts == {"description": "none needed"}
    witness = data.witness["input_ids"]
    assert witness.shape == (2, 64) and int(witness.min()) >= 8 and int(witness.max()) < VOCABULARY
