"""Encoder-decoders, images, sound and a language part from the command line: whole runs, resumed ones, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_command import Command, untouched
from e2e_runs import Run, broken_run, hashes, quantize, recipe_of
from tiny import BEYOND_TEXT, VISION_LANGUAGE, tiny
from tiny_media import write_data

from llmcomp.formats.verify import check
from llmcomp.pipeline.plan import prospect
from llmcomp.recipe import Override, Recipe, step_of


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, tuple[Path, Path]]:
    """{name: (model, calibration data)}."""
    root = tmp_path_factory.mktemp("beyond")
    return {
        name: (
            tiny(name, root / name, tokenizer=True),
            write_data(name, root / f"{name}-data") if name in BEYOND_TEXT else text,
        )
        for name in ("t5", "bart", *BEYOND_TEXT)
    }


NAMES = ("t5", "bart", "whisper", "vit-classifier", "llava", "qwen2-vl")
# As far as llmcomp's own code goes like one of these.
LIKE_THEM = [pytest.param(name, marks=pytest.mark.slow) for name in VISION_LANGUAGE if name not in NAMES]
Sources = dict[str, tuple[Path, Path]]


def verified(run: Run) -> Run:
    assert check(run.output, run.witness).passed
    return run


@pytest.mark.parametrize("method", ["awq-gptq", "rtn-clip", "signround"])
@pytest.mark.parametrize("name", [*NAMES, *LIKE_THEM])
def test_other_methods(name: str, method: str, sources: Sources, tmp_path: Path) -> None:
    model, data = sources[name]
    step: dict[str, Any] = {"options": {"iterations": 4}} if method == "signround" else {}
    recipe = recipe_of(data, method=method, symmetric=method != "rtn-clip", **step)
    run = verified(quantize(model, tmp_path / "q", recipe))
    assert {layer.method for layer in run.report.layers} == {method}
    if method == "awq-gptq":
        assert all(layer.scaling is not None for layer in run.report.layers)


@pytest.mark.parametrize(
    ("name", "way", "label"),
    [
        ("vit-classifier", "int8-dynamic", "a8"), ("llava", "int8-dynamic", "a8"), ("qwen2-vl", "int8-dynamic", "a8"),
        ("idefics3", "int8-static", "a8 static"), ("gemma3-vision", "int8-static", "a8 static"),
    ],
)  # fmt: skip
def test_rounded_activations(name: str, way: str, label: str, sources: Sources, tmp_path: Path) -> None:
    model, data = sources[name]
    recipe = recipe_of(data, bits=8, activations=way)
    run = verified(quantize(model, tmp_path / "q", recipe))
    assert {layer.scheme for layer in run.report.layers} == {f"int8 channel {label}"}


@pytest.mark.parametrize("name", [*NAMES, *LIKE_THEM])
def test_bitsandbytes(name: str, sources: Sources, tmp_path: Path) -> None:
    skip = {"overrides": (Override("wo", skip=True),)} if name == "t5" else {}
    recipe = Recipe((step_of("bnb-nf4", **skip),), format="bnb-nf4")
    run = verified(quantize(sources[name][0], tmp_path / "q", recipe))
    count = {"t5": 28, "vit-classifier": 12} | dict.fromkeys(VISION_LANGUAGE, 14)
    assert len(run.report.layers) == count.get(name, 32)


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_a_fresh_model_generates_before_any_forward(name: str, sources: Sources, tmp_path: Path) -> None:
    """`generate` calls the encoder alone, past the hook that decodes other models at their first call."""
    import transformers

    model, data = sources[name]
    run = quantize(model, tmp_path / "q", recipe_of(data))
    kind = getattr(transformers, run.report.architecture)
    ids = torch.arange(8, 20)[None]
    inputs = {"input_ids": ids} if name == "t5" else {"input_features": torch.ones(1, 16, 100)}
    settings = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    fresh, used = (kind.from_pretrained(run.output).eval() for _ in range(2))
    with torch.no_grad():
        used(**inputs, decoder_input_ids=torch.ones(1, 1, dtype=torch.int64))
        found, wanted = fresh.generate(**inputs, **settings), used.generate(**inputs, **settings)
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(torch.equal(one, other) for one, other in zip(found.scores, wanted.scores, strict=True))


def test_weights_that_stay_in_float32(tmp_path: Path, text: Path, command: Command) -> None:
    """T5's `wo` overflows in float16; of a packed checkpoint it would be loaded so."""
    source = tiny("t5", tmp_path / "t5", dtype=torch.float16, tokenizer=True)
    said = command.refused(2, source)
    assert "keeps 4 weights of this float16 model in float32" in said and "--format dense" in said
    assert untouched(command)
    verified(quantize(source, tmp_path / "q", recipe_of(text, format="dense")))


@pytest.mark.parametrize("name", ["bart", "vit-classifier", "qwen2-vl"])
def test_a_broken_run_goes_on_to_the_same_bits(name: str, sources: Sources, tmp_path: Path) -> None:
    """Of the encoder-decoder: from the middle of the second chain."""
    model, data = sources[name]
    recipe = recipe_of(data, method="awq-gptq")
    whole = quantize(model, tmp_path / "whole", recipe)
    after = 3 if name == "bart" else 1
    broken_run(model, tmp_path / "broken", recipe, after)
    resumed = quantize(model, tmp_path / "broken", recipe)
    assert resumed.report.resumed_blocks == after
    assert hashes(resumed.output) == hashes(whole.output)


def test_other_images_are_another_run(sources: Sources, tmp_path: Path) -> None:
    model, data = sources["vit-classifier"]
    broken_run(model, tmp_path / "q", recipe_of(data), 1)
    other = write_data("vit-classifier", tmp_path / "other", count=5)
    run = quantize(model, tmp_path / "q", recipe_of(other))
    assert run.report.resumed_blocks == 0 and any("discarded" in note for note in run.report.notes)


def test_text_alone_serves_a_vision_language_model_and_is_said(sources: Sources, tmp_path: Path, text: Path) -> None:
    run = verified(quantize(sources["llava"][0], tmp_path / "q", recipe_of(text)))
    assert any("text alone, not on images" in warning for warning in run.report.calibration["warnings"])
    reasons = {why for name, why in run.left().items() if "vision_tower" in name and "embedding" not in name}
    assert reasons == {"no part of the language model, which alone is compressed"}


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_needs_the_config_only(name: str, sources: Sources) -> None:
    from llmcomp.adapters.discover import discover, skeleton

    found = prospect(discover(skeleton(sources[name][0])), Recipe(), (4,), 2**23)
    assert all(row.peak_memory > 0 and row.seconds > 0 for row in found.rows)
    assert found.length == {"whisper": 50, "vit-classifier": 17}.get(name, 512)


# --- bad input ---


@pytest.mark.parametrize(
    ("name", "data", "flags", "said"),
    [
        ("vit-classifier", "text", [], "is no source of images"),
        ("vit-classifier", None, ["--calibration", "default"], "reads images, of which none come with llmcomp; give"),
        ("whisper", "vit-classifier", [], "holds no sound (.wav)"),
        ("llama", "vit-classifier", [], "is a directory, and text is read from one file"),
        ("t5", "vit-classifier", [], "is a directory, and text is read from one file"),
        ("t5", "text", ["--activations", "int8-dynamic"], "readers decode the weights of an encoder-decoder"),
        ("t5", "text", ["--target", "head"], "target 'head' matches no weight"),
        ("vit-classifier", "vit-classifier", ["--target", "embeddings"], "target 'embeddings' matches no weight"),
    ],
)
def test_data_and_recipes_of_another_kind(
    name: str, data: str | None, flags: list[str], said: str, sources: Sources, llama: Path, command: Command
) -> None:
    models = {**{key: model for key, (model, _) in sources.items()}, "llama": llama}
    given = {**{key: where for key, (_, where) in sources.items()}, "text": command.text}
    more = [] if data is None else ["--calibration", str(given[data])]
    assert said in command.refused(2, models[name], *more, *flags)
    assert untouched(command)


def test_t5_by_bitsandbytes_says_what_to_skip(sources: Sources, command: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(Recipe((step_of("bnb-nf4"),), format="bnb-nf4").to_yaml())
    said = command.refused(2, sources["t5"][0], "--recipe", str(recipe))
    assert "one that transformers keeps in float32; leave it and its like out by --skip wo" in said


def test_an_audio_model_without_a_processor(sources: Sources, command: Command, tmp_path: Path) -> None:
    bare = tiny("whisper", tmp_path / "bare")
    said = command.refused(2, bare, "--calibration", str(sources["whisper"][1]))
    assert "has no processor that makes the model's inputs of sound" in said
    assert "add its preprocessor_config.json" in said and untouched(command)


def test_sound_without_transcripts(sources: Sources, command: Command, tmp_path: Path) -> None:
    data = write_data("whisper", tmp_path / "data")
    (data / "0.txt").unlink()
    said = command.refused(2, sources["whisper"][0], "--calibration", str(data))
    assert "0.wav has no transcript, which the decoder reads; put it beside the sound as NAME.txt" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, *LIKE_THEM])
def test_measured_by_the_same_command(name: str, sources: Sources, tmp_path: Path, text: Path) -> None:
    from llmcomp import api

    model, data = sources[name]
    held_out = str(text if name in ("t5", "bart", *VISION_LANGUAGE) else data)
    options: dict[str, Any] = {"output": tmp_path / "q", "eval_data": held_out}
    report = api.quantize(str(model), recipe=recipe_of(data), **options).report
    assert report.verification is not None and report.verification.passed
    assert report.divergence is not None and report.divergence.kl_mean.value > 0
    assert report.after is not None and report.after.quality is not None and report.after.cost is not None
    metric = "accuracy" if name == "vit-classifier" else "perplexity"
    assert metric in report.after.quality.metrics
    assert json.loads(report.to_json())["task"] == report.task
