"""A directory in, an evaluation out; what cannot be measured is said in one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import POSITIONS, tiny

from llmcomp.calibration.data import Texts
from llmcomp.errors import BadCheckpoint, BadData, RunError, UserError
from llmcomp.measure import load, run
from llmcomp.measure.inputs import default_against, max_positions
from llmcomp.report.schema import Report

QUICK = run.Settings(windows=4, sequence_length=32, cost=False)
TEXT = Texts(
    [" ".join(f"word{n} is followed by {n * 7 % 11}." for n in range(400))], None, "test text", running=True
)


def _rounded(source: Path, target: Path, name: str) -> Path:
    """A copy whose matrices are rounded to 15 levels a row: what compression does, without the packing."""
    tiny(name, target, tokenizer=True)
    tensors = load_file(source / "model.safetensors")
    for key, value in tensors.items():
        if value.ndim == 2 and "embed" not in key:
            step = value.abs().amax(1, keepdim=True) / 7
            tensors[key] = (value / step).round() * step
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_against_the_original(tmp_path: Path) -> None:
    original = tiny("llama", tmp_path / "a", tokenizer=True)
    rounded = _rounded(original, tmp_path / "b", "llama")
    found = run.evaluate_model(rounded, against=original, data=TEXT, settings=QUICK)
    assert found.task == "causal-lm" and found.before is not None and found.divergence is not None
    assert found.divergence.kl_mean.value > 0
    assert found.before.sparsity == 0.0 < found.after.sparsity
    assert found.after.quality is not None and found.after.quality.samples == 4
    assert found.after.quality.tokens == 4 * 31
    assert (
        "4 samples of 32 tokens" in found.after.quality.data and "do not overlap" in found.after.quality.data
    )
    again = run.evaluate_model(rounded, against=original, data=TEXT, settings=QUICK)
    assert (again.before, again.after, again.divergence) == (found.before, found.after, found.divergence)
    report = found.as_report()
    assert Report.from_json(report.to_json()) == report
    assert report.command == "evaluate" and report.format == "dense"


def test_alone_with_its_cost(tmp_path: Path) -> None:
    model = tiny("roberta", tmp_path, tokenizer=True)
    settings = run.Settings(windows=2, sequence_length=512, latency_sequence=16, latency_repeats=3)
    found = run.evaluate_model(model, data=TEXT, settings=settings)
    assert found.before is None and found.divergence is None
    assert found.after.cost is not None and found.after.quality is not None
    assert found.after.cost.peak_memory > 0.2 * found.after.size.bytes_on_disk
    assert (found.after.cost.batch, found.after.cost.sequence) == (1, 16)
    assert f"2 samples of {POSITIONS} tokens" in found.after.quality.data, "clipped to the model's positions"
    assert "pseudo-perplexity over 15% of tokens" in found.after.quality.data


def test_positions_kept_for_padding_do_not_count() -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=66))
    embedding = torch.nn.Embedding(66, 4, padding_idx=1)
    model = SimpleNamespace(config=config, named_modules=lambda: [("e.position_embeddings", embedding)])
    assert max_positions(model, SimpleNamespace(model_max_length=10**30)) == 64


def test_a_classifier_without_labels_or_original_says_so(tmp_path: Path) -> None:
    model = tiny("bert-classifier", tmp_path, tokenizer=True)
    rows = Texts(["one row", "another row"], None, "rows")
    found = run.evaluate_model(model, data=rows, settings=QUICK)
    assert found.after.quality is None
    assert any("needs labels" in note and "--against" in note for note in found.notes)


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", tmp_path, tokenizer=True)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000_000, total=1))
    with pytest.raises(RunError, match=r"The model would need 0\.3 GB .* and 0\.1 GB are available"):
        run.evaluate_model(model, data=TEXT, settings=QUICK)


def test_models_that_do_not_belong_together(tmp_path: Path) -> None:
    one, other = tiny("llama", tmp_path / "a", tokenizer=True), tiny("bert", tmp_path / "b", tokenizer=True)
    with pytest.raises(BadCheckpoint, match=r"is for causal-lm and .* for masked-lm"):
        run.evaluate_model(one, against=other, data=TEXT, settings=QUICK)


def test_a_model_with_missing_weights_is_not_measured(tmp_path: Path) -> None:
    """transformers would fill the hole with random numbers and only warn."""
    model = tiny("llama", tmp_path)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        BadCheckpoint, match=r"lacks 1 weights .* such as model\.layers\.1\.mlp\.down_proj\.weight"
    ):
        load.load(model)


def test_task_from_the_architecture(tmp_path: Path) -> None:
    for name, task in {
        "gpt2": "causal-lm",
        "mpnet": "masked-lm",
        "bert-classifier": "sequence-classification",
    }.items():
        assert load.task_of(tiny(name, tmp_path / name)) == task
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    assert load.task_of(tmp_path) == "encoder"
    (tmp_path / "config.json").write_text('{"architectures": ["BertForMultipleChoice"]}')
    with pytest.raises(BadData, match="BertForMultipleChoice has a head that cannot be evaluated"):
        load.task_of(tmp_path)


def test_lm_eval_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    settings = run.Settings(lm_eval=("hellaswag",))
    with pytest.raises(UserError, match=r"pip install llmcomp\[lm-eval\]"):
        run.evaluate_model(tiny("llama", tmp_path / "a"), settings=settings)
    with pytest.raises(BadData, match="this model's task is masked-lm"):
        run.evaluate_model(tiny("bert", tmp_path / "b"), settings=settings)


def test_what_to_compare_with_by_default(tmp_path: Path) -> None:
    assert default_against(tmp_path) is None
    report = tmp_path / "llmcomp_report.json"
    report.write_text(json.dumps({"model": "x", "source": str(tmp_path)}))
    assert default_against(tmp_path) == str(tmp_path)
    report.write_text(json.dumps({"model": "org/x", "source": str(tmp_path / "gone")}))
    assert default_against(tmp_path) is None
    report.write_text(json.dumps({"model": "sample:lm", "source": "sample:lm"}))
    assert default_against(tmp_path) == "sample:lm"
    report.write_text("{")
    assert default_against(tmp_path) is None
