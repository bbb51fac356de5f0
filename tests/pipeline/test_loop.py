"""The loop over blocks: what each method is given, held against the model's own forward in float64."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, build, tiny
from torch import Tensor, nn

from llmcomp import api
from llmcomp.adapters.base import Adapter
from llmcomp.errors import RunError
from llmcomp.experts import split_experts
from llmcomp.pipeline import run as loop
from llmcomp.pipeline.job import open_source
from llmcomp.recipe import Calibration, QuantizeStep, Recipe

WINDOWS, LENGTH = 6, 40
SHARED = {"num_hidden_layers": 5, "num_hidden_groups": 2}  # ALBERT: three runs of one block, two of the next
MODELS: dict[str, dict[str, Any]] = {
    "llama": {}, "gemma3": {}, "gpt-neox": {}, "gptj": {}, "cohere": {}, "falcon": {}, "albert": SHARED,
    "deberta-v2": {"share_att_key": False}, "mixtral": {}, "deepseek-v3": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(8, VOCABULARY, (WINDOWS, LENGTH), generator=generator)


@pytest.fixture(scope="module")
def calibration(windows: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("loop") / "windows.safetensors"
    save_file({"input_ids": windows}, path)
    return Calibration(str(path), WINDOWS, LENGTH)


def quantize(source: Path, output: Path, calibration: Calibration) -> dict[str, Tensor]:
    """The tensors of the checkpoint that is written, dense, by their names in the model."""
    recipe = Recipe((QuantizeStep(bits=3, group_size=64),), calibration, format="dense")
    api.quantize(str(source), recipe=recipe, output=output, evaluate=False, verify=False)
    shards = [load_file(path) for path in sorted(output.glob("*.safetensors"))]
    return {
        name.replace(".block_sparse_moe.", ".mlp."): tensor for shard in shards for name, tensor in shard.items()
    }


@dataclass
class Given:
    """What the methods were given: {names of the linears: (their Gram matrix, count of tokens)}, in order."""

    stages: dict[tuple[str, ...], tuple[Tensor, int]] = field(default_factory=dict)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    seen, solve = Given(), loop.solve_stage

    def noting(tasks: Any, weights: Any, stats: Any, *others: Any) -> Any:
        assert not any(weight.is_meta for weight in weights)
        names = tuple(task.ref.name for task in tasks)
        seen.stages[names] = (stats.gram.clone(), stats.tokens)  # methods use the matrix up
        return solve(tasks, weights, stats, *others)

    monkeypatch.setattr(loop, "solve_stage", noting)
    return seen


def inputs_of(model: nn.Module, names: list[str], windows: Tensor) -> dict[str, Tensor]:
    """[tokens, features] that each linear reads in a plain forward pass, of all its calls."""
    read: dict[str, list[Tensor]] = {name: [] for name in names}

    def note(name: str) -> Any:
        return lambda _, inputs: read[name].append(inputs[0].reshape(-1, inputs[0].shape[-1]))

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    with torch.no_grad():
        model(input_ids=windows)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in read.items()}


def assert_gram(found: tuple[Tensor, int], x: Tensor, names: tuple[str, ...]) -> None:
    gram, tokens = found
    exact = x.T @ x
    size = exact.diagonal().sqrt()
    assert tokens == len(x), names
    assert float(((gram.double() - exact).abs() / torch.outer(size, size)).max()) < 1e-4, names


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_the_model_compressed_so_far(
    name: str, windows: Tensor, calibration: Calibration, given: Given, tmp_path: Path
) -> None:
    """Independent of lanes and stops: for each stage a whole forward in float64, of a model that holds the
    compressed weights of all stages before it (of a block that runs several times: of all blocks before it)."""
    source = tiny(name, tmp_path / name, **MODELS[name])
    adapter = open_source(source).adapter
    compressed = quantize(source, tmp_path / "q", calibration)
    model = build(name, **MODELS[name]).double()
    split_experts(model)

    def install(names: list[str]) -> None:
        for one in names:
            model.get_submodule(one).weight.data.copy_(compressed[f"{one}.weight"].double())

    wanted = [tuple(ref.name for ref in stage) for block in adapter.blocks for stage in block.stages]
    assert list(given.stages) == wanted
    for block in adapter.blocks:
        stages = [[ref.name for ref in stage] for stage in block.stages]
        for stage in stages:
            x = inputs_of(model, stage, windows)
            for one in stage:
                assert_gram(given.stages[tuple(stage)], x[one], (one,))
            if not re.search(r"pos_|\.experts\.", stage[0]):  # DeBERTa's positions; tokens that go elsewhere
                assert len(x[stage[0]]) == block.applications * windows.numel()
            if block.applications == 1:
                install(stage)
        install([one for stage in stages for one in stage])


def stop_after(stages: int, source: Path, output: Path, calibration: Calibration) -> None:
    """A run that fails when so many stages are solved."""
    solve, solved = loop.solve_stage, 0

    def failing(*arguments: Any) -> Any:
        nonlocal solved
        if solved == stages:
            raise RunError("stopped by the test")
        solved += 1
        return solve(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "solve_stage", failing)
        with pytest.raises(RunError, match="stopped by the test"):
            quantize(source, output, calibration)


# --- blocks that run several times ---


@pytest.fixture(scope="module")
def albert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("albert", tmp_path_factory.mktemp("shared") / "albert", **SHARED)


@pytest.fixture(scope="module")
def unbroken(albert: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return quantize(albert, tmp_path_factory.mktemp("unbroken") / "q", calibration)


@pytest.mark.parametrize("after", [2, 4, 6])
def test_stopped_within_a_shared_block_and_resumed(
    after: int, albert: Path, calibration: Calibration, unbroken: dict[str, Tensor], tmp_path: Path
) -> None:
    """`after` stages: in the middle of the first block, at its end, in the middle of the second."""
    stop_after(after, albert, tmp_path / "q", calibration)
    resumed = quantize(albert, tmp_path / "q", calibration)
    assert set(resumed) == set(unbroken)
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_shared_blocks_without_calibration(albert: Path, tmp_path: Path) -> None:
    recipe = Recipe((QuantizeStep(method="rtn"),), format="dense")
    result = api.quantize(str(albert), recipe=recipe, output=tmp_path / "q", evaluate=False, verify=False)
    adapter: Adapter = open_source(albert).adapter
    assert [layer.name for layer in result.report.layers] == [r.name for b in adapter.blocks for r in b.linears]


# --- experts ---


def test_an_expert_that_sees_no_token(calibration: Calibration, given: Given, tmp_path: Path) -> None:
    """It is rounded without statistics, the report says so, and the checkpoint loads."""
    source = tiny("deepseek-v3", tmp_path / "model")
    rewrite(source, lambda tensors: tensors["model.layers.1.mlp.gate.e_score_correction_bias"][5].fill_(-100))
    recipe = Recipe((QuantizeStep(group_size=64),), calibration)
    result = api.quantize(str(source), recipe=recipe, output=tmp_path / "q", evaluate=False)
    lone = [layer for layer in result.report.layers if ".experts.5." in layer.name]
    reason = "0 calibration tokens reached this expert, fewer than its width 128: rtn"
    assert [(layer.method, layer.fallback, layer.error) for layer in lone] == [("rtn", reason, None)] * 3
    tokens = {names[0]: stats[1] for names, stats in given.stages.items()}
    few = [name for name, count in tokens.items() if ".experts." in name and 0 < count < 128]
    by_name = {layer.name: layer for layer in result.report.layers}
    assert few and all(by_name[name].method == "rtn-clip" for name in few)
    fell = sum(layer.fallback is not None for layer in result.report.layers)
    assert f"{fell} of {len(by_name)} weights fell back; the layer table says why." in result.report.notes
    assert result.report.verification is not None and result.report.verification.passed


@pytest.mark.parametrize(("name", "after"), [("mixtral", 13), ("deepseek-v3", 11)])
def test_stopped_among_experts_and_resumed(name: str, after: int, calibration: Calibration, tmp_path: Path) -> None:
    """In the second block, the first is taken from its shard."""
    source = tiny(name, tmp_path / "model")
    whole = quantize(source, tmp_path / "whole", calibration)
    stop_after(after, source, tmp_path / "q", calibration)
    resumed = quantize(source, tmp_path / "q", calibration)
    assert set(resumed) == set(whole)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def rewrite(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
