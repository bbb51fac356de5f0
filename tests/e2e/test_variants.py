"""What a recipe can ask for, end to end: schemes, overrides, embeddings, heads, formats, other methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_runs import Run, quantize, recipe_of, reload, tensors
from tiny import build, tiny
from transformers import AutoModelForMaskedLM

from llmcomp.adapters.discover import discover
from llmcomp.recipe import Override

ALL = ("attention", "mlp", "embeddings", "head")
INT8_ENDS = (Override("embeddings", bits=8), Override("head", bits=8))
MIXED = (Override("down_proj", bits=8), Override("blocks:0-1", skip=True))

PACKED = "compressed-tensors"

# name → (model, its config's changes, the recipe's step, format)
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    **{f"llama-int{bits}": ("llama", {}, {"bits": bits}, PACKED) for bits in (2, 3, 8)},
    **{f"bert-int{bits}": ("bert", {}, {"bits": bits}, PACKED) for bits in (2, 3, 8)},
    "llama-tied-ends": ("llama", {}, {"targets": ALL, "overrides": INT8_ENDS}, PACKED),
    "llama-untied-ends": ("llama-untied", {}, {"targets": ALL, "overrides": INT8_ENDS}, PACKED),
    "llama-rtn-ends": ("llama", {}, {"targets": ALL, "method": "rtn"}, PACKED),
    "bert-head": ("bert", {}, {"targets": ALL}, PACKED),
    "llama-tied-head": ("llama", {}, {"targets": ("attention", "mlp", "head")}, PACKED),
    "bert-tied-embeddings": ("bert", {}, {"overrides": INT8_ENDS[:1]}, PACKED),
    "llama-mixed": ("llama", {"num_hidden_layers": 4}, {"overrides": MIXED}, PACKED),
    "modernbert-mixed": ("modernbert", {}, {"overrides": (Override("Wo", bits=8),)}, PACKED),
    "llama-asymmetric": ("llama", {}, {"symmetric": False}, PACKED),
    "llama-asymmetric-mixed": ("llama", {}, {"symmetric": False, "overrides": MIXED[:1]}, PACKED),
    "modernbert-asymmetric-mixed": (
        "modernbert", {}, {"symmetric": False, "overrides": (Override("Wo", bits=8),)}, PACKED,
    ),
    "roberta-channel": ("roberta", {}, {"group_size": "channel"}, PACKED),
    "gpt2-g32": ("gpt2", {}, {"group_size": 32}, PACKED),
    "gpt2-embeddings": ("gpt2", {}, {"overrides": INT8_ENDS[:1]}, PACKED),
    "opt-dense": ("opt", {}, {"bits": 3}, "dense"),
    "llama-a8": ("llama", {}, {"bits": 8, "activations": "int8-dynamic"}, PACKED),
    "bert-a8": ("bert", {}, {"bits": 8, "activations": "int8-dynamic", "overrides": INT8_ENDS[:1]}, PACKED),
    "modernbert-a8": ("modernbert", {}, {"bits": 8, "activations": "int8-dynamic"}, PACKED),
    "llama-a8-static": (
        "llama", {}, {"bits": 8, "activations": "int8-static", "targets": ("attention", "mlp", "head")}, PACKED,
    ),
    "bert-a8-static": (
        "bert", {},
        {"bits": 8, "activations": "int8-static", "method": "rtn-clip", "overrides": INT8_ENDS[:1]}, PACKED,
    ),
    "modernbert-a8-static": ("modernbert", {}, {"bits": 8, "activations": "int8-static"}, PACKED),
    "albert-a8-static": ("albert", {}, {"bits": 8, "activations": "int8-static"}, PACKED),
    "qwen3-rtn": ("qwen3", {}, {"method": "rtn"}, PACKED),
    "qwen3-rtn-clip": ("qwen3", {}, {"method": "rtn-clip"}, PACKED),
    "qwen3-gptq": ("qwen3", {}, {}, PACKED),
    "mistral-narrow": ("mistral", {"hidden_size": 96, "intermediate_size": 160}, {}, PACKED),
    # The shared expert and attention have a scheme of their own; the routed experts' comes first in config.json.
    "deepseek-mixed": (
        "deepseek-v3", {},
        {"overrides": (Override("attention", bits=8), Override("re:.*shared_experts.*", bits=8))}, PACKED,
    ),
    "mixtral-dense": ("mixtral", {}, {"symmetric": False, "overrides": (Override("w2", bits=8),)}, "dense"),
    "bert-odd": ("bert", {"hidden_size": 72, "intermediate_size": 128}, {"group_size": 64}, PACKED),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("variants")
    made = {}
    for name, (model, changes, step, form) in VARIANTS.items():
        source = tiny(model, root / f"{name}-source", tokenizer=True, **changes)
        made[name] = quantize(source, root / name, recipe_of(text, format=form, **step))
    return made


@pytest.fixture(scope="module")
def reloaded(runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
    return reload(runs)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_fresh_process_loads_it_plainly(name: str, reloaded: dict[str, dict[str, Any]]) -> None:
    found = reloaded[name]
    assert found["account"] == {} and found["imported"] == []
    assert found["from_witness"] < 1e-4
    assert found["verification"]["passed"], found["verification"]["checks"]
    assert 1e-5 < found["from_original"] < (1.5 if "int2" in name else 0.5)


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_fewer_bits_cost_more(model: str, runs: dict[str, Run], reloaded: dict[str, dict[str, Any]]) -> None:
    names = [f"{model}-int{bits}" for bits in (8, 3, 2)]
    away = [reloaded[name]["from_original"] for name in names]
    assert away == sorted(away) and away[0] < 0.02
    by_layer = zip(*(runs[name].report.layers for name in names), strict=True)
    for eight, three, two in by_layer:
        assert eight.name == three.name == two.name
        assert eight.error < three.error < two.error
        assert eight.bytes_after > three.bytes_after > two.bytes_after


def test_calibrated_methods_beat_rounding(runs: dict[str, Run], reloaded: dict[str, dict[str, Any]]) -> None:
    def error(name: str) -> float:
        layers = runs[name].report.layers
        return sum(layer.error for layer in layers) / len(layers)

    assert error("qwen3-gptq") < error("qwen3-rtn-clip")
    assert all(layer.error is None for layer in runs["qwen3-rtn"].report.layers), "no data, no error to state"
    assert reloaded["qwen3-gptq"]["from_original"] < reloaded["qwen3-rtn"]["from_original"]
    assert runs["qwen3-rtn"].report.calibration == {"description": "none needed"}


@pytest.mark.parametrize("name", ["llama-tied-ends", "llama-tied-head", "bert-tied-embeddings"])
def test_quantizing_a_side_of_a_tie_unties_it(name: str, runs: dict[str, Run]) -> None:
    run = runs[name]
    config = json.loads((run.output / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert any("no longer shares the embeddings' storage" in note for note in run.report.notes)
    weights = sum(tensor.nbytes for tensor in tensors(run.output).values())
    assert sum(run.report.size_after.parts.values()) == weights


def test_a_tie_that_is_kept_is_stored_once(runs: dict[str, Run]) -> None:
    stored = tensors(runs["llama-int8"].output)
    assert "model.embed_tokens.weight" in stored
    assert not [name for name in stored if name.startswith("lm_head")]
    sizes = {left.name: left.bytes for left in runs["llama-int8"].report.left}
    assert sizes == {"model.embed_tokens": stored["model.embed_tokens.weight"].nbytes, "lm_head": 0}


@pytest.mark.parametrize("name", ["llama-tied-ends", "llama-untied-ends"])
def test_embeddings_and_head_in_int8(name: str, runs: dict[str, Run]) -> None:
    layers = {layer.role: layer for layer in runs[name].report.layers if layer.block is None}
    assert set(layers) == {"embeddings", "head"}
    assert layers["embeddings"].method == "rtn" and layers["head"].method == "gptq"
    assert layers["embeddings"].scheme == layers["head"].scheme == "int8 g128"
    assert runs[name].left() == {}


def test_overrides_reach_what_they_name(runs: dict[str, Run]) -> None:
    schemes, left = runs["llama-mixed"].schemes(), runs["llama-mixed"].left()
    assert {name for name, scheme in schemes.items() if scheme == "int8 g128"} == {
        "model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj",
    }  # fmt: skip
    assert len(schemes) == 14 and not [name for name in schemes if name.split(".")[2] in "01"]
    skipped = [name for name, reason in left.items() if reason == "skipped by the recipe (blocks:0-1)"]
    assert len(skipped) == 14


def test_a_family_that_cannot_load_packed_mixtures_says_what_it_costs(runs: dict[str, Run]) -> None:
    notes = runs["modernbert-mixed"].report.notes
    assert sum("has 4-bit values but takes 8 bits each" in note for note in notes) == 8


def test_dense_is_on_the_grid_and_as_large_as_before(runs: dict[str, Run]) -> None:
    run = runs["opt-dense"]
    assert "quantization_config" not in json.loads((run.output / "config.json").read_text())
    weight = tensors(run.output)["model.decoder.layers.0.fc1.weight"]
    assert max(len(row.unique()) for row in weight) <= 2**3
    assert run.report.labels[0].startswith("As large and as fast as before")


def test_an_encoder_is_decoded_before_anything_is_called(runs: dict[str, Run]) -> None:
    """sentence-transformers' CrossEncoder calls `forward`, past the hook that decodes at the first call."""
    output = runs["roberta-channel"].output
    assert json.loads((output / "config.json").read_text())["quantization_config"]["dequantize"] is True
    model = AutoModelForMaskedLM.from_pretrained(output)
    with torch.no_grad():
        first = model.forward(input_ids=torch.arange(8, 24)[None]).logits
        assert torch.equal(first, model(input_ids=torch.arange(8, 24)[None]).logits)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "-a8" in name])
def test_rounded_activations(name: str, runs: dict[str, Run], reloaded: dict[str, dict[str, Any]]) -> None:
    """Where inputs are rounded, too, more is lost; embeddings are read by indices, which nothing rounds."""
    report = runs[name].report
    inside = {layer.scheme for layer in report.layers if layer.role in ("attention", "mlp")}
    assert inside == {"int8 channel a8" + (" static" if name.endswith("static") else "")}
    outside = [layer.scheme for layer in report.layers if layer.role == "embeddings"]
    assert outside == (["int8 channel"] if name.startswith("bert") else [])
    assert not [layer for layer in report.layers if layer.fallback]
    assert any("simulates the rounded activations" in label for label in report.labels)
    assert reloaded[name]["from_original"] < 0.05
    if name == "llama-a8":
        assert reloaded["llama-int8"]["from_original"] < reloaded[name]["from_original"]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.endswith("static")])
def test_linears_with_one_input_share_its_range(name: str, runs: dict[str, Run]) -> None:
    """Kernels that fuse them want one scale; what reads something else has one of its own."""
    stored = tensors(runs[name].output)
    scales = {key.removesuffix(".input_scale"): value for key, value in stored.items() if key.endswith("input_scale")}
    assert set(scales) == {layer.name for layer in runs[name].report.layers if layer.scheme.endswith("static")}
    assert all(scale.shape == (1,) and float(scale) > 0 for scale in scales.values())
    stages = [stage for block in discover(build(VARIANTS[name][0]).to("meta")).blocks for stage in block.stages]
    shared = [{float(scales[ref.name]) for ref in stage} for stage in stages]
    assert all(len(one) == 1 for one in shared) and len({min(one) for one in shared}) == len(stages)


def fell_back(run: Run, test: Callable[[int], bool]) -> None:
    for layer in run.report.layers:
        assert (layer.fallback is not None) == test(layer.shape[1]), layer
    count = sum(layer.fallback is not None for layer in run.report.layers)
    assert count > 0
    note = f"{count} of {len(run.report.layers)} weights fell back; the layer table says why."
    assert note in run.report.notes


def test_widths_that_no_default_group_divides_are_counted(runs: dict[str, Run]) -> None:
    """Head width 32 × 4 heads gives o_proj an input of 128; 96 and 160 allow groups of 32 only."""
    fell_back(runs["mistral-narrow"], lambda width: width != 128)
    assert {layer.scheme for layer in runs["mistral-narrow"].report.layers} == {"int4 g128", "int4 g32"}


def test_an_explicit_group_that_fits_some_falls_back_for_the_others(runs: dict[str, Run]) -> None:
    fell_back(runs["bert-odd"], lambda width: width == 72)
    assert {layer.scheme for layer in runs["bert-odd"].report.layers} == {"int4 g64", "int4 channel"}
