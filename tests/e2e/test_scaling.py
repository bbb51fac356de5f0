"""Scaled inputs, end to end: what is written computes what the run computed, and a broken run ends the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_runs import Run, broken_run, hashes, quantize, recipe_of, reload, tensors
from loud_models import loud

from llmcomp.formats.verify import check as verified
from llmcomp.recipe import FactorizeStep, Override, QuantizeStep, Recipe, SparsifyStep, Step

SOME_DENSE = tuple(Override(name, skip=True) for name in ("q_proj", "v_proj", "up_proj"))
KEYS_BY_GPTQ = (Override("k_proj", method="gptq", bits=8),)
DENSE = {"format": "dense"}
STATIC = {"activations": "int8-static"}

# name → (model, dtype, the recipe's step and format)
CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "llama": ("llama", torch.float32, {"method": "awq", "bits": 3}),
    "llama rtn-clip": ("llama", torch.float32, {"method": "rtn-clip", "bits": 3}),
    "llama awq-gptq": ("llama", torch.float32, {"method": "awq-gptq", "bits": 3}),
    "llama gptq": ("llama", torch.float32, {"bits": 3}),
    "llama some dense": ("llama", torch.float32, {"method": "awq", "overrides": SOME_DENSE}),
    "llama mixed": ("llama", torch.float32, {"method": "awq", "overrides": KEYS_BY_GPTQ}),
    "llama bf16": ("llama", torch.bfloat16, {"method": "awq", "symmetric": False}),
    "gemma2": ("gemma2", torch.float32, {"method": "awq"}),
    "gemma2 bf16": ("gemma2", torch.bfloat16, {"method": "awq-gptq"}),
    "phi3": ("phi3", torch.float32, {"method": "awq-gptq", "symmetric": False}),
    "cohere dense": ("cohere", torch.float32, {"method": "awq", **DENSE}),
    "gpt2": ("gpt2", torch.float32, {"method": "awq", "group_size": 64}),
    "mixtral": ("mixtral", torch.float32, {"method": "awq", "group_size": 32}),
    "llama static": ("llama", torch.float32, {"bits": 8, **STATIC}),
    "gemma2 static bf16": ("gemma2", torch.bfloat16, {"bits": 8, "method": "rtn-clip", **STATIC}),
    "bert static": ("bert", torch.float32, {"bits": 8, "method": "awq-gptq", **STATIC}),
    "bert": ("bert", torch.float32, {"method": "awq"}),
    "albert": ("albert", torch.float32, {"method": "awq", "group_size": 32}),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Run]:
    root, made = tmp_path_factory.mktemp("scaling"), {}
    sources: dict[tuple[str, torch.dtype], Path] = {}
    for name, (model, dtype, step) in CASES.items():
        if (model, dtype) not in sources:
            sources[model, dtype] = loud(model, root / f"{model}-{dtype}", dtype)
        made[name] = quantize(sources[model, dtype], root / name.replace(" ", "-"), recipe_of(text, **step))
    return made


@pytest.fixture(scope="module")
def reloaded(runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
    return reload(runs)


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_computes_what_the_run_computed(name: str, reloaded: dict[str, dict[str, Any]]) -> None:
    found = reloaded[name]
    assert found["account"] == {} and found["imported"] == []
    # In bf16 a unit in the last place may be the next of 255 steps, where inputs are rounded.
    assert found["from_witness"] < (3e-2 if name.endswith("static bf16") else 2e-2 if name.endswith("bf16") else 1e-5)
    assert found["verification"]["passed"], found["verification"]["checks"]
    assert 1e-4 < found["from_original"] < 0.7


@pytest.mark.parametrize("name", CASES)
def test_the_report_says_what_was_scaled_by_whom_and_what_not(name: str, runs: dict[str, Run]) -> None:
    said = {layer.name: layer.scaling for layer in runs[name].report.layers}
    method = CASES[name][2].get("method", "gptq")
    if not method.startswith("awq") and "activations" not in CASES[name][2]:
        assert set(said.values()) == {None}
        return
    assert all(said.values())
    scaled = {about.rpartition(" ")[2] for about in said.values() if about and about.startswith("inputs scaled by")}
    producers = {
        "llama": {"input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"},
        "gemma2": {"input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"},
        "phi3": {"input_layernorm", "self_attn.qkv_proj", "post_attention_layernorm", "mlp.gate_up_proj"},
        "cohere": {"input_layernorm", "self_attn.v_proj", "mlp.up_proj"},
        "gpt2": {"ln_1", "attn.c_attn", "ln_2"},
        "mixtral": {"input_layernorm", "self_attn.v_proj"},
        "bert": {"attention.self.value"},
        "albert": {"albert_layers.0.attention.value"},
    }  # fmt: skip
    assert {producer for producer in scaled if ".experts." not in producer} == producers[CASES[name][0]]
    count = sum(about.startswith("inputs scaled") for about in said.values() if about)
    noted = f"{count} of {len(said)} weights read scaled inputs"
    assert any(note.startswith(noted) for note in runs[name].report.notes)
    if CASES[name][0] == "bert":
        left = [about for about in said.values() if about and about.startswith("inputs not scaled: ")]
        assert len(left) == 10 and "is also read by add" in " ".join(left)


@pytest.mark.parametrize(("scaled", "plain"), [("llama", "llama rtn-clip"), ("llama awq-gptq", "llama gptq")])
def test_scaling_lowers_the_error_of_loud_models(
    scaled: str, plain: str, runs: dict[str, Run]
) -> None:
    def error(name: str) -> float:
        return sum(layer.error or 0 for layer in runs[name].report.layers)

    assert error(scaled) < 0.97 * error(plain)


def test_ranges_are_those_of_the_scaled_inputs(runs: dict[str, Run]) -> None:
    """Every 32nd channel is sixteen times as loud: what the weights take over need not be in the range."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmcomp.pipeline.scaling.search_migration", lambda weights, *_: torch.ones(weights[0].shape[1]))
        run = runs["llama static"]
        output = run.output.with_name("llama-static-unscaled")
        plain = quantize(run.source, output, Recipe.load(run.output / "llmcomp_recipe.yaml"))
    assert {layer.scaling for layer in plain.report.layers} == {"inputs not scaled: no scale lowers the error"}
    found, before = tensors(run.output), tensors(plain.output)
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        key = f"model.layers.0.{name}.input_scale"
        assert float(found[key]) < 0.5 * float(before[key]), name
    away = {one.output.name: found["from_original"] for one, found in zip(
        (run, plain), reload({"scaled": run, "plain": plain}).values(), strict=True)}
    assert away[run.output.name] < 0.7 * away[plain.output.name]


def test_what_is_not_compressed_is_scaled_as_well(runs: dict[str, Run]) -> None:
    """Queries read the scaled norm, values and up take over scales: dense, and by powers of two only."""
    before, after = tensors(runs["llama some dense"].source), tensors(runs["llama some dense"].output)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
        key = f"model.layers.0.{name}.weight"
        ratio = (after[key] / before[key]).log2()
        assert torch.equal(ratio, ratio.round()) and bool((ratio != 0).any()), name


THREE = {"num_hidden_layers": 3}
DEEPER: dict[str, dict[str, Any]] = {
    "llama": THREE, "phi3": THREE, "mixtral": THREE, "gemma2": {**THREE, "layer_types": ["sliding_attention"] * 3},
    "albert": {"num_hidden_layers": 6, "num_hidden_groups": 3},
}  # fmt: skip
RESUMED = ("llama some dense", "gemma2 bf16", "phi3", "albert", "mixtral", "llama static")


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("name", RESUMED)
def test_a_broken_run_ends_bit_identical(name: str, after: int, text: Path, tmp_path: Path) -> None:
    model, dtype, step = CASES[name]
    source = loud(model, tmp_path / "source", dtype, **DEEPER[model])
    recipe = recipe_of(text, **step)
    unbroken = quantize(source, tmp_path / "unbroken", recipe)
    assert any((layer.scaling or "").startswith("inputs scaled") for layer in unbroken.report.layers)
    broken_run(source, tmp_path / "q", recipe, after)
    resumed = quantize(source, tmp_path / "q", recipe)
    assert resumed.report.resumed_blocks == after
    assert hashes(resumed.output) == hashes(unbroken.output)


BY_AWQ = tuple(Override(name, method="awq") for name in ("o_proj", "down_proj"))
LEFT_OUT = (Override("o_proj", skip=True), Override("down_proj", skip=True))
PRODUCERS: dict[str, tuple[str, tuple[Step, ...]]] = {
    "floating factors": (
        "llama", (FactorizeStep(targets=("v_proj", "up_proj")), QuantizeStep("awq", targets=("o_proj", "down_proj")))
    ),
    "factors of integers": ("llama", (FactorizeStep(overrides=LEFT_OUT), QuantizeStep("rtn", overrides=BY_AWQ))),
    "corrected integers": ("llama", (QuantizeStep("rtn", overrides=BY_AWQ), FactorizeStep(rank=8, overrides=LEFT_OUT))),
    "Conv1D": ("gpt2", (QuantizeStep("awq", group_size=64),)),
    "Conv1D, sparse": ("gpt2", (SparsifyStep("wanda"), QuantizeStep("awq", group_size=64))),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCERS)
def test_weights_of_llmcomp_s_own_layout_take_scales_over(name: str, text: Path, tmp_path: Path) -> None:
    model, steps = PRODUCERS[name]
    source, recipe = loud(model, tmp_path / "source", torch.float32), recipe_of(text, format="llmcomp")
    recipe = replace(recipe, steps=steps)
    run = quantize(source, tmp_path / "out", recipe)
    taken = {(one.scaling or "").rpartition(" ")[2] for one in run.report.layers if "scaled by" in (one.scaling or "")}
    assert taken >= ({"attn.c_attn"} if model == "gpt2" else {"self_attn.v_proj", "mlp.up_proj"})
    assert verified(run.output, run.witness).passed
    broken_run(source, tmp_path / "again", recipe, 1)
    assert hashes(quantize(source, tmp_path / "again", recipe).output) == hashes(run.output)
