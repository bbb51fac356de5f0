"""llmcomp's own script asks llmcomp's command line for options that it has."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from evals.peers.arguments import TOGETHER, parse
from evals.peers.llmcomp_run import command, together
from llmcomp.cli.main import app
from llmcomp.recipe import Recipe, check


@pytest.fixture
def required(tmp_path):
    save_file({"input_ids": torch.zeros(3, 8, dtype=torch.int64)}, tmp_path / "w.safetensors")
    return ["--model", "m", "--windows", str(tmp_path / "w.safetensors"), "--output", "o", "--bits", "3"]


def test_the_command_of_a_job(required):
    words = command(parse([*required, "--group-size", "channel", "--extra=--no-verify"]))
    assert words[:6] == ["quantize", "m", "--bits", "3", "--group-size", "channel"]
    assert words[words.index("--samples") + 1] == "3"
    assert words[-2:] == ["--no-evaluate", "--no-verify"]
    assert "--method" not in words  # llmcomp's own default is what is compared


def test_sentences_go_in_as_text_and_methods_by_llmcomps_names(required):
    words = command(parse([*required, "--task", "classification", "--method", "rtn-mse"]))
    assert words[words.index("--calibration") + 1].endswith("w.jsonl")
    assert words[words.index("--method") + 1] == "rtn-clip"
    with pytest.raises(SystemExit, match="no method gptq-mse"):
        command(parse([*required, "--method", "gptq-mse"]))


def test_what_is_pruned_is_said_in_llmcomps_flags(required):
    words = command(parse([*required, "--method", "cut-unfitted", "--cut=--mlp 0.25"]))
    assert words[:4] == ["prune", "m", "--mlp", "0.25"]
    assert words[4:8] == ["--method", "activation", "--option", "compensate=false"]
    with pytest.raises(SystemExit, match="no method gptq"):
        command(parse([*required, "--cut=--layers 1"]))


def test_factors_are_asked_for_by_method_and_ratio(required):
    words = command(parse([*required, "--method", "svd-llm-balanced", "--ratio", "0.6"]))
    assert words[:4] == ["factorize", "m", "--ratio", "0.6"]
    assert words[4:9] == ["--method", "svd-llm", "--update", "--ranks", "balanced"]
    shown = CliRunner().invoke(app, ["factorize", "--help"], env={"COLUMNS": "200"}).output
    assert all(option in shown for option in words if option.startswith("--"))


def test_every_option_is_one_of_llmcomps(required):
    words = command(parse([*required, "--method", "rtn", "--extra=--no-verify"]))
    shown = CliRunner().invoke(app, ["quantize", "--help"], env={"COLUMNS": "200"}).output
    for option in (word for word in words if word.startswith("--")):
        assert option in shown


@pytest.mark.parametrize("method", TOGETHER)
def test_removing_and_rounding_are_a_recipe_that_can_be(required, tmp_path, method):
    job = parse([*required, "--pattern", "2:4", "--method", method])
    *first, last = together(job, tmp_path)
    assert last[:2] == ["compress", "m" if method != "two-steps" else str(tmp_path / "sparse")]
    recipe = Recipe.from_yaml((tmp_path / "recipe.yaml").read_text())
    check(recipe)
    assert [step.kind for step in recipe.steps] == ["sparsify", "quantize"]
    assert (recipe.calibration.samples, recipe.calibration.sequence_length) == (3, 8)
    if method == "two-steps":
        assert first[0][:6] == ["sparsify", "m", "--pattern", "2:4", "--method", "sparsegpt"]
        assert first[0][first[0].index("--output") + 1] == last[1]
    else:
        assert not first
