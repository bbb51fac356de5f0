"""A model read block by block measures exactly what the same model held whole does."""

from __future__ import annotations

import pydoc_data.topics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny import tiny

import llmcomp
from llmcomp.calibration.data import Texts
from llmcomp.measure.load import load
from llmcomp.measure.run import Settings
from llmcomp.pipeline.streaming import open_streamed
from llmcomp.recipe import Calibration, Override, QuantizeStep, Recipe

TEXT = Texts(["\n\n".join(list(pydoc_data.topics.topics.values())[:6])], None, "help topics", running=True)
QUICK = Settings(windows=4, sequence_length=32, cost=False)
INT4 = QuantizeStep(method="rtn", group_size=32)
INT8_TOO = (Override("embeddings", bits=8), Override("attention", bits=8))
RECIPES = {
    "symmetric": Recipe((INT4,)),
    "asymmetric": Recipe((replace(INT4, symmetric=False),)),
    "mixed, with embeddings": Recipe((replace(INT4, overrides=INT8_TOO),)),
    "dense": Recipe((INT4,), format="dense"),
    "activations": Recipe((replace(INT4, bits=8, group_size=None, activations="int8-dynamic"),)),
    "static activations": Recipe(
        (QuantizeStep("rtn-clip", 8, activations="int8-static"),), Calibration("sample", samples=4, sequence_length=16)
    ),
}


def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    real = psutil.virtual_memory()
    few = SimpleNamespace(available=1_000_000, total=real.total)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: few)


@pytest.mark.parametrize(
    ("name", "recipe"),
    # GPT-2's readers do not round activations.
    [(name, recipe) for name in ("llama", "gpt2", "bert", "modernbert") for recipe in RECIPES
     if name != "gpt2" or "activations" not in recipe],
)  # fmt: skip
def test_the_same_numbers(name: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny(name, tmp_path / "source", tokenizer=True)
    made = llmcomp.quantize(
        str(source), recipe=RECIPES[recipe], output=tmp_path / "out", evaluate=False, verify=False
    )
    whole = llmcomp.evaluate(made.output, against=source, data=TEXT, settings=QUICK)
    short_of_memory(monkeypatch)
    streamed = llmcomp.evaluate(made.output, against=source, data=TEXT, settings=QUICK)
    assert whole.notes == [] or "blocks were read" not in whole.notes[-1]
    assert "blocks were read as they were needed" in streamed.notes[-1]
    assert streamed.divergence is not None and streamed.divergence.kl_mean.value > 0
    assert (streamed.before, streamed.after) == (whole.before, whole.after)
    assert streamed.divergence == whole.divergence


def test_blocks_are_in_memory_only_while_they_compute(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path)
    model, parameters = open_streamed(source)
    inside = [parameter for name, parameter in model.named_parameters() if ".layers." in name]
    assert inside and all(parameter.is_meta for parameter in inside)
    seen = []
    model.model.layers[1].mlp.register_forward_hook(
        lambda *_: seen.append([layer.mlp.up_proj.weight.is_meta for layer in model.model.layers])
    )
    ids = torch.arange(8)[None] + 8
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, load(source)(input_ids=ids).logits)
    assert seen == [[True, False, *[True] * (len(model.model.layers) - 2)]]
    assert all(layer.mlp.up_proj.weight.is_meta for layer in model.model.layers)
    assert sum(parameter.numel() for parameter in parameters()) == sum(p.numel() for p in load(source).parameters())


def test_a_damaged_block_is_an_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    model, _ = open_streamed(tiny("llama", tmp_path))
    with torch.no_grad(), pytest.raises(RuntimeError, match="size"):
        model.model.layers[0](torch.zeros(1, 4, 3), position_embeddings=(torch.zeros(1), torch.zeros(1)))
    assert all(parameter.is_meta for parameter in model.model.layers[0].parameters())


@pytest.mark.parametrize("recipe", ["symmetric", "dense"])
def test_experts_are_read_block_by_block_too(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, transformers computes all experts at once and adds up in another order."""
    source = tiny("mixtral", tmp_path / "source", tokenizer=True)
    made = llmcomp.quantize(
        str(source), recipe=RECIPES[recipe], output=tmp_path / "out", evaluate=False, verify=False
    )
    whole = llmcomp.evaluate(made.output, against=source, data=TEXT, settings=QUICK)
    short_of_memory(monkeypatch)
    streamed = llmcomp.evaluate(made.output, against=source, data=TEXT, settings=QUICK)
    assert "blocks were read as they were needed" in streamed.notes[-1]
    for one, other in ((whole.before, streamed.before), (whole.after, streamed.after)):
        assert one is not None and other is not None and one.quality is not None and other.quality is not None
        for name, metric in one.quality.metrics.items():
            assert other.quality.metrics[name].value == pytest.approx(metric.value, rel=1e-5)
