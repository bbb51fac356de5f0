"""Which linear gets what: targets, overrides, group sizes, and every problem said at once."""

from __future__ import annotations

import pytest
from tiny import build

from llmcomp.adapters.base import Adapter
from llmcomp.adapters.discover import discover
from llmcomp.errors import BadRecipe
from llmcomp.pipeline.assign import assign
from llmcomp.recipe import Override, QuantizeStep


@pytest.fixture(scope="module")
def llama() -> Adapter:
    return discover(build("llama"))


@pytest.fixture(scope="module")
def narrow() -> Adapter:
    """Inputs of 96 everywhere but in o_proj (128) and down_proj (160)."""
    return discover(build("mistral", hidden_size=96, intermediate_size=160))


def test_the_default_takes_the_blocks_and_names_the_rest(llama: Adapter) -> None:
    found = assign(llama, QuantizeStep())
    assert len(found.tasks) == 14 and found.calibrated
    assert found.left == {
        "model.embed_tokens": "embeddings not targeted", "lm_head": "head not targeted",
    }  # fmt: skip
    assert {task.scheme.label for task in found.tasks.values()} == {"int4 g128"}
    assert {task.fallback for task in found.tasks.values()} == {None}


def test_every_weight_is_either_taken_or_left(llama: Adapter) -> None:
    step = QuantizeStep(targets=("mlp",), overrides=(Override("blocks:1", skip=True), Override("head", bits=8)))
    found = assign(llama, step)
    names = {ref.name for ref in llama.refs}
    assert set(found.tasks) | set(found.left) >= names
    assert not set(found.tasks) & set(found.left)
    assert set(found.tasks) == {f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")} | {"lm_head"}


def test_of_several_overrides_the_last_wins(llama: Adapter) -> None:
    overrides = (Override("mlp", skip=True), Override("down_proj", bits=8), Override("blocks:1", bits=2))
    tasks = assign(llama, QuantizeStep(overrides=overrides)).tasks
    assert tasks["model.layers.0.mlp.down_proj"].scheme.bits == 8
    assert tasks["model.layers.1.mlp.down_proj"].scheme.bits == 2
    assert "model.layers.0.mlp.up_proj" not in tasks
    assert tasks["model.layers.1.mlp.up_proj"].scheme.bits == 2


def test_embeddings_are_rounded_whatever_the_method(llama: Adapter) -> None:
    tasks = assign(llama, QuantizeStep(method="gptq", targets=("embeddings", "mlp"))).tasks
    assert tasks["model.embed_tokens"].method == "rtn"
    assert {task.method for name, task in tasks.items() if name != "model.embed_tokens"} == {"gptq"}


@pytest.mark.parametrize(("method", "calibrated"), [("rtn", False), ("rtn-clip", True), ("gptq", True)])
def test_whether_data_are_needed(method: str, calibrated: bool, llama: Adapter) -> None:
    assert assign(llama, QuantizeStep(method=method)).calibrated is calibrated


def test_one_calibrated_override_needs_data(llama: Adapter) -> None:
    step = QuantizeStep(method="rtn", overrides=(Override("q_proj", method="gptq"),))
    assert assign(llama, step).calibrated


def test_default_groups_fall_back_by_width_and_say_so(narrow: Adapter) -> None:
    for task in assign(narrow, QuantizeStep()).tasks.values():
        width = task.ref.in_features
        assert task.scheme.group_size == (128 if width == 128 else 32)
        said = None if width == 128 else f"128 does not divide its width {width}: int4 g32"
        assert task.fallback == said


def test_an_explicit_group_falls_back_where_it_does_not_fit(narrow: Adapter) -> None:
    tasks = assign(narrow, QuantizeStep(group_size=128)).tasks
    fits = {name for name, task in tasks.items() if task.fallback is None}
    assert fits == {"model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"}


def test_an_explicit_group_that_fits_nothing_is_an_error(narrow: Adapter) -> None:
    step = QuantizeStep(group_size=64, overrides=(Override("o_proj", skip=True),))
    with pytest.raises(BadRecipe, match=r"group_size 64 divides none of the widths \[96, 160\]"):
        assign(narrow, step)


def test_all_problems_at_once(llama: Adapter) -> None:
    step = QuantizeStep(method="x", targets=("attn",), overrides=(Override("blocks:9"),))
    with pytest.raises(BadRecipe) as caught:
        assign(llama, step)
    said = str(caught.value)
    assert said.startswith("The recipe does not fit LlamaForCausalLM: ")
    assert "method 'x'" in said and "'attn' matches no weight" in said and "'blocks:9' matches no weight" in said
