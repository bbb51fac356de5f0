"""The Python API: keywords make a recipe, results are typed, what is saved is loaded again."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

import llmcomp
from llmcomp import Calibration, QuantizeStep, Recipe, RunOptions
from llmcomp.errors import BadRecipe, ModelNotFound, OutputExists
from llmcomp.measure.run import Settings

QUICK: dict[str, Any] = {"evaluate": False, "verify": False}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("bert", tmp_path_factory.mktemp("api") / "bert", tokenizer=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(list(pydoc_data.topics.topics.values())[:6]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def result(bert: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> llmcomp.CompressResult:
    recipe = Recipe((QuantizeStep(bits=8),), Calibration(str(text), 8, 32))
    output = tmp_path_factory.mktemp("result") / "q"
    return llmcomp.quantize(str(bert), recipe=recipe, options=RunOptions(output=output), **QUICK)


def test_a_result_says_where_and_what(result: llmcomp.CompressResult) -> None:
    assert (result.output / "config.json").is_file()
    assert result.report == llmcomp.Report.read(result.output)
    assert {layer.scheme for layer in result.report.layers} == {"int8 g128"}


def test_keywords_are_sugar_for_one_step(bert: Path, tmp_path: Path) -> None:
    found = llmcomp.quantize(
        str(bert), bits=3, group_size="channel", method="rtn", symmetric=False, output=tmp_path / "q", **QUICK
    )
    step = found.report.recipe["steps"][0]
    said = (step["bits"], step["group_size"], step["method"], step["symmetric"])
    assert said == (3, "channel", "rtn", False)
    assert {layer.scheme for layer in found.report.layers} == {"int3 channel asym"}


def test_outputs_may_be_texts(bert: Path, tmp_path: Path) -> None:
    found = llmcomp.quantize(str(bert), method="rtn", output=str(tmp_path / "q"), **QUICK)
    assert found.output == tmp_path / "q" and found.output.is_dir()


def test_the_default_output(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert llmcomp.quantize(str(bert), method="rtn", **QUICK).output == Path("bert-rtn-w4")
    with pytest.raises(OutputExists):
        llmcomp.quantize(str(bert), method="rtn", **QUICK)
    again = llmcomp.quantize(str(bert), method="rtn", overwrite=True, **QUICK)
    assert again.output == Path("bert-rtn-w4")


def test_unknown_keywords_are_refused(bert: Path) -> None:
    with pytest.raises(TypeError, match="overwrit"):
        llmcomp.quantize(str(bert), overwrit=True)


def test_a_recipe_that_cannot_be_is_refused_before_the_name_is_looked_up() -> None:
    with pytest.raises(BadRecipe, match="--bits 5"):
        llmcomp.quantize("no-such-org/no-such-model", bits=5)
    with pytest.raises(ModelNotFound):
        llmcomp.quantize("no-such-org/no-such-model", bits=4)


def test_load_opens_what_was_saved(bert: Path, result: llmcomp.CompressResult) -> None:
    model, original = llmcomp.load(result.output), llmcomp.load(str(bert))
    assert type(model) is type(original) and not model.training
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        found, wanted = model(input_ids=ids).logits, original(input_ids=ids).logits
    assert 0 < (found - wanted).square().mean().sqrt() < 0.05 * wanted.std()
    model(input_ids=ids).logits.sum().backward()  # as a caller may who does not know of inference mode


def test_evaluate_compares(bert: Path, text: Path, result: llmcomp.CompressResult) -> None:
    from llmcomp.calibration.data import evaluation_texts

    settings = Settings(cost=False, windows=4, sequence_length=32)
    found = llmcomp.evaluate(
        result.output, against=bert, data=evaluation_texts(str(text)), settings=settings
    )
    assert found.before is not None and found.divergence is not None
    assert found.after.size.bytes_on_disk < found.before.size.bytes_on_disk
    assert found.divergence.kl_mean.value < 0.01


def test_progress_hears_phases_blocks_and_layers(bert: Path, text: Path, tmp_path: Path) -> None:
    heard: dict[str, list[Any]] = {"phase": [], "step": [], "layer": [], "note": []}

    class Listener:
        def phase(self, name: str, total: int | None = None) -> None:
            heard["phase"].append((name, total))

        def step(self, done: int = 1) -> None:
            heard["step"].append(done)

        def layer(self, layer: Any) -> None:
            heard["layer"].append(layer.name)

        def note(self, text: str) -> None:
            heard["note"].append(text)

    recipe = Recipe((QuantizeStep(),), Calibration(str(text), 8, 32))
    found = llmcomp.quantize(
        str(bert), recipe=recipe, output=tmp_path / "q", progress=Listener(), **QUICK
    )
    assert ("compress", 2) in heard["phase"] and sum(heard["step"]) == 2
    assert heard["layer"] == [layer.name for layer in found.report.layers]
    assert any(note.startswith("Calibrating on") for note in heard["note"])
