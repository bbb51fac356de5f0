"""Which neurons and blocks go first: those that do nothing, and those of least influence on labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from e2e_runs import LENGTH, SAMPLES, quantize, rows_kept, tensors
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, tiny
from transformers import AutoTokenizer

import llmcomp
from llmcomp.adapters.units import Part, neurons_of
from llmcomp.calibration.data import read_texts
from llmcomp.formats.verify import check as verified
from llmcomp.methods.structured import most_important
from llmcomp.pipeline.job import open_source
from llmcomp.pipeline.sensitivity import sensitivities
from llmcomp.recipe import Calibration, PruneStep, Recipe


@pytest.mark.parametrize("method", ["activation", "taylor", "magnitude"])
def test_neurons_that_do_nothing_go_first_and_are_not_missed(method: str, tmp_path: Path, text: Path) -> None:
    source = tiny("llama", tmp_path / "source", tokenizer=True)
    stored, dead = load_file(source / "model.safetensors"), torch.arange(0, 256, 2)
    for name, value in stored.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            value[dead] = 0
        elif name.endswith("down_proj.weight"):
            value[:, dead] = 0
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe((PruneStep(method, mlp=0.5),), Calibration(str(text), SAMPLES, LENGTH), format="dense")
    run = quantize(source, tmp_path / "out", recipe)
    for name, value in tensors(run.output).items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            assert torch.equal(value, stored[name][1::2])
        elif name.endswith("down_proj.weight"):
            assert torch.allclose(value, stored[name][:, 1::2], rtol=1e-6, atol=1e-9)
    ids = torch.randint(8, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = (llmcomp.load(path)(input_ids=ids).logits for path in (source, run.output))
    assert torch.allclose(before, after, atol=1e-5)


def test_the_block_of_least_influence_goes(tmp_path: Path, text: Path) -> None:
    """One whose output projections are almost zero passes on what it reads."""
    source = tiny("llama", tmp_path / "source", tokenizer=True, num_hidden_layers=4)
    stored = load_file(source / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        stored[f"model.layers.1.{name}.weight"] *= 1e-3
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe((PruneStep(layers=1),), Calibration(str(text), SAMPLES, LENGTH), format="dense")
    run = quantize(source, tmp_path / "out", recipe)
    (gone,) = run.report.removed
    assert gone.name == "model.layers.1" and gone.which == [1] and 0 <= (gone.score or 0) < 1e-4
    left = tensors(run.output)
    for old, new in ((0, 0), (2, 1), (3, 2)):
        own = f"model.layers.{old}."
        for name in (name for name in stored if name.startswith(own)):
            assert torch.equal(stored[name], left[f"model.layers.{new}.{name.removeprefix(own)}"])


def test_a_classifier_is_pruned_by_the_gradients_of_its_labels(tmp_path: Path) -> None:
    """Other labels, other neurons; the same ones, what `sensitivities` finds."""
    source = tiny("bert-classifier", tmp_path / "source", tokenizer=True)
    step, kept = PruneStep("taylor", mlp=0.5, options={"multiple": 1, "compensate": False}), {}
    for name, labels in (("ones", [1] * 8), ("mixed", [0, 1] * 4)):
        rows = tmp_path / f"{name}.jsonl"
        lines = [{"text": f"a text of {number} and {number * number}", "label": label}
                 for number, label in enumerate(labels)]  # fmt: skip
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        recipe = Recipe((step,), Calibration(str(rows), 8, LENGTH), format="dense")
        run = quantize(source, tmp_path / name, recipe)
        assert verified(run.output, run.witness).passed
        stored, left = tensors(source), tensors(run.output)
        key = "bert.encoder.layer.0.intermediate.dense.weight"
        kept[name] = rows_kept(stored[key], left[key])
    opened = open_source(source)
    parts = [part for block in opened.adapter.blocks if isinstance(part := neurons_of(block), Part)]
    texts = read_texts(str(tmp_path / "mixed.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    batches = [dict(tokenizer(row, return_tensors="pt", max_length=LENGTH, truncation=True)) for row in texts.rows]
    labels = [torch.tensor([label]) for label in texts.labels or []]
    scores = sensitivities(
        opened.adapter, opened.binding, batches, labels, parts, torch.device("cpu"), opened.checkpoint.release
    )
    wanted = most_important(torch.tensor(scores["bert.encoder.layer.0.output.dense"]), len(kept["mixed"]))
    assert torch.equal(kept["mixed"], wanted)
    assert not torch.equal(kept["mixed"], kept["ones"])
