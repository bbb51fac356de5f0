"""Learned rounding in the loop: its losses against whole forwards in float64, killed and resumed runs, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from broken import stopped_after
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, build, tiny
from torch import Tensor
from transformers import AutoTokenizer

from llmcomp import api
from llmcomp.adapters.discover import discover
from llmcomp.errors import BadRecipe
from llmcomp.experts import split_experts
from llmcomp.methods import AUTO, AUTO_ALONE
from llmcomp.pipeline.assign import assign
from llmcomp.pipeline.job import open_source
from llmcomp.pipeline.tuning import _batches
from llmcomp.recipe import Calibration, Override, QuantizeStep, Recipe
from llmcomp.report.schema import Report

WINDOWS, LENGTH = 6, 40
SETTINGS = {"iterations": 8, "batch_size": 2, "learning_rate": 0.05}
# Post-norm and pre-norm, parallel blocks, Conv1D, two kinds of positions, experts.
MODELS = ("llama", "bert", "falcon", "gpt2", "gemma3", "modernbert", "mixtral")
STEP = QuantizeStep(method="gptq-signround", bits=2, group_size=64, options=SETTINGS)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(8, VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def calibration(ids: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("tuning") / "windows.safetensors"
    save_file({"input_ids": ids}, path)
    return Calibration(str(path), WINDOWS, LENGTH)


def quantize(source: Path, output: Path, calibration: Calibration, step: QuantizeStep = STEP, **options: Any) -> Report:
    recipe = Recipe((step,), calibration, format="dense", seed=options.pop("seed", 0))
    return api.quantize(str(source), recipe=recipe, output=output, evaluate=False, verify=False, **options).report


@pytest.mark.parametrize("windows", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("calls", [[1], [4, 2], [2, 2, 1], [4, 4, 4, 2], [1] * 7, [3, 1, 2, 5]])
def test_each_call_is_in_one_batch(calls: list[int], windows: int) -> None:
    given: Any = [SimpleNamespace(lane=SimpleNamespace(inputs={"x": range(held)})) for held in calls]
    batches = _batches(given, windows)
    assert [number for batch in batches for number in batch] == list(range(len(calls)))
    held = [sum(calls[number] for number in batch) for batch in batches]
    assert all(one >= windows for one in held) or len(batches) == 1


def tensors(output: Path) -> dict[str, Tensor]:
    """Of a dense checkpoint, by their names in the model."""
    shards = [load_file(path) for path in sorted(output.glob("*.safetensors"))]
    return {name.replace(".block_sparse_moe.", ".mlp."): one for shard in shards for name, one in shard.items()}


def same(first: Path, second: Path) -> bool:
    one, other = tensors(first), tensors(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("tuning-llama") / "model", num_hidden_layers=3, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def unbroken(llama: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    output = tmp_path_factory.mktemp("tuning-unbroken") / "q"
    return output, quantize(llama, output, calibration)


def block_output(model: Any, block: str, ids: Tensor) -> Tensor:
    """What a block gives in a plain forward of the whole model, [windows, length, features]."""
    seen: list[Tensor] = []

    def note(_: Any, inputs: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    hook = model.get_submodule(block).register_forward_hook(note)
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_errors_are_those_of_whole_forwards_in_float64(
    name: str, ids: Tensor, calibration: Calibration, tmp_path: Path
) -> None:
    """For each block the error of its output, in a model whose earlier blocks are compressed, from the source's."""
    source = tiny(name, tmp_path / name)
    adapter = open_source(source).adapter
    report = quantize(source, tmp_path / "q", calibration, replace(STEP, method="signround"))
    compressed = tensors(tmp_path / "q")
    model, original = build(name).double(), build(name).double()
    split_experts(model)
    split_experts(original)
    assert {layer.method for layer in report.layers} <= {"signround", "rtn-clip"}
    for block in adapter.blocks:
        layers = [one for one in report.layers if one.block == block.index and one.block_error is not None]
        target = block_output(original, block.name, ids)
        for ref in block.linears:
            weight = model.get_submodule(ref.name).weight
            weight.data.copy_(compressed[f"{ref.name}.weight"])
        error = (block_output(model, block.name, ids) - target).square().sum() / target.square().sum()
        found = {(one.block_error_start, one.block_error) for one in layers}
        assert len(found) == 1, "one for the whole block"
        before, after = found.pop()
        assert after == pytest.approx(float(error), rel=2e-3)
        assert before is not None and after <= before
        assert all(one.error is not None and 0 < one.error < 1 for one in layers)
    gains = {one.block: one.block_error < one.block_error_start for one in report.layers if one.block_error}
    assert any(gains.values()), "something was learned"


def test_padding_is_no_target(tmp_path: Path) -> None:
    """Sentences of other lengths in one batch: the error is that of each sentence alone, without padding."""
    source = tiny("bert-classifier", tmp_path / "bert", tokenizer=True)
    rows = ["word of a row " * count for count in (1, 5, 2, 9, 3, 7)]
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    report = quantize(source, tmp_path / "q", Calibration(str(text), len(rows), 80))
    tokenizer = AutoTokenizer.from_pretrained(source)
    sentences = [tokenizer(row, return_tensors="pt")["input_ids"] for row in rows]
    assert len({sentence.shape for sentence in sentences}) > 1
    model, original = build("bert-classifier").double(), build("bert-classifier").double()
    compressed = tensors(tmp_path / "q")
    for block in open_source(source).adapter.blocks:
        for ref in block.linears:
            model.get_submodule(ref.name).weight.data.copy_(compressed[f"{ref.name}.weight"])
        targets = [block_output(original, block.name, ids) for ids in sentences]
        found = [block_output(model, block.name, ids) for ids in sentences]
        lost = sum(float((one - target).square().sum()) for one, target in zip(found, targets, strict=True))
        share = lost / sum(float(target.square().sum()) for target in targets)
        errors = [one.block_error for one in report.layers if one.block == block.index]
        assert errors == pytest.approx([share] * len(block.linears), rel=2e-3)


@pytest.mark.parametrize("after", [1, 2])
def test_a_stopped_run_goes_on_to_the_same_bits(
    after: int, llama: Path, calibration: Calibration, unbroken: tuple[Path, Report], tmp_path: Path
) -> None:
    with stopped_after(after):
        quantize(llama, tmp_path / "q", calibration)
    report = quantize(llama, tmp_path / "q", calibration)
    assert report.resumed_blocks == after
    assert same(tmp_path / "q", unbroken[0])
    errors = [(one.name, one.error, one.block_error) for one in report.layers]
    assert errors == [(one.name, one.error, one.block_error) for one in unbroken[1].layers]


def test_where_windows_wait_changes_no_bit(
    llama: Path, calibration: Calibration, unbroken: tuple[Path, Report], tmp_path: Path
) -> None:
    report = quantize(llama, tmp_path / "q", calibration, activation_memory=0)
    assert same(tmp_path / "q", unbroken[0])
    assert any("mapped files" in note for note in report.notes)


def test_settings_reach_it_and_the_head_has_no_block(llama: Path, calibration: Calibration, tmp_path: Path) -> None:
    step = replace(STEP, method="signround", targets=("mlp", "head"), options={**SETTINGS, "iterations": 1})
    report = quantize(llama, tmp_path / "q", calibration, step)
    head = next(one for one in report.layers if one.role == "head")
    assert head.method == AUTO_ALONE and "no block whose output signround could learn from" in (head.fallback or "")
    assert head.block_error is None
    assert {one.method for one in report.layers if one.role == "mlp"} == {"signround"}
    with pytest.raises(BadRecipe, match="unknown key 'iteration'; did you mean 'iterations'"):
        quantize(llama, tmp_path / "bad", calibration, replace(step, options={"iteration": 1}))


# --- what it cannot do; what `auto` takes ---


@pytest.mark.parametrize(
    ("model", "step", "message"),
    [
        ("albert", {}, "this model runs one block 2 times in a row; take gptq"),
        ("llama", {"bits": 8, "group_size": None, "activations": "int8-dynamic"}, "round their inputs, too; take gptq"),
        ("llama", {"overrides": (Override("mlp", method="awq"),)}, "awq scales inputs .* take one of them for all"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(model: str, step: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecipe, match=message):
        assign(discover(build(model)), replace(STEP, **step))


@pytest.mark.parametrize("bits", sorted(AUTO))
def test_auto_takes_what_its_table_says(bits: int) -> None:
    llama, albert = discover(build("llama")), discover(build("albert"))
    step = QuantizeStep(method="auto", bits=bits, overrides=(Override("down_proj", bits=8),))
    tasks = assign(llama, step).tasks
    assert {task.method for name, task in tasks.items() if "down_proj" not in name} == {AUTO[bits]}
    assert {task.method for name, task in tasks.items() if "down_proj" in name} == {AUTO[8]}
    assert {task.method for task in assign(albert, replace(step, overrides=())).tasks.values()} == {AUTO_ALONE}
    ends = assign(llama, replace(step, targets=("head", "embeddings"))).tasks
    assert (ends["lm_head"].method, ends["model.embed_tokens"].method) == (AUTO_ALONE, "rtn")


def test_auto_runs_and_the_report_names_what_was_taken(llama: Path, calibration: Calibration, tmp_path: Path) -> None:
    step = replace(STEP, method="auto", options={} if AUTO[2] == "gptq" else SETTINGS)
    report = quantize(llama, tmp_path / "q", calibration, step)
    assert {one.method for one in report.layers} == {AUTO[2]}
    with pytest.raises(BadRecipe, match="unknown key 'steps'"):
        quantize(llama, tmp_path / "bad", calibration, replace(step, options={"steps": 3}))
