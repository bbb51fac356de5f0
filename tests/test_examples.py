"""The recipes under examples/ load, fit a model, and do what their comments say."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import build

from llmcomp.adapters.discover import discover
from llmcomp.pipeline.job import Plan, plan_recipe
from llmcomp.recipe import QuantizeStep, Recipe, check
from llmcomp.training.pruning_plan import GRADUAL, LOTTERY, MOVEMENT, read_plan

FILES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.yaml"))
TRAINED = [path for path in FILES if "scripts/prune_in_training.py" in path.read_text(encoding="utf-8")]
EXAMPLES = [path for path in FILES if path not in TRAINED]


def planned(path: Path) -> Plan:
    recipe = Recipe.load(path)
    check(recipe)
    return plan_recipe(recipe, discover(build("llama", num_hidden_layers=3)))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_a_llama(path: Path) -> None:
    assert planned(path).assignment.tasks
    assert f"--recipe examples/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_an_example_of_training_can_be_read(path: Path) -> None:
    plan = read_plan(path, ["seed=3"])  # which refuses what cannot be
    assert plan.seed == 3 and plan.learning_rate is not None
    assert f"--config examples/{path.name}" in path.read_text(encoding="utf-8")


def test_the_examples_of_training_are_of_three_methods() -> None:
    assert {read_plan(path).method for path in TRAINED} == {GRADUAL, MOVEMENT, LOTTERY}
    assert {read_plan(path).pattern for path in TRAINED} == {"2:4", "unstructured"}


def test_int4_is_the_default_written_out() -> None:
    recipe = Recipe.load(EXAMPLES[0].with_name("int4.yaml"))
    assert recipe.calibration == Recipe().calibration and recipe.format == Recipe().format
    assert recipe.steps == (QuantizeStep(group_size=128),)


def test_mixed_gives_each_role_its_own_bits() -> None:
    plan = planned(EXAMPLES[0].with_name("mixed.yaml"))
    bits = {name: (task.scheme.bits, task.scheme.group_size) for name, task in plan.assignment.tasks.items()}
    assert bits["model.layers.2.mlp.down_proj"] == (8, 128)
    assert bits["model.layers.2.mlp.up_proj"] == (4, 128)
    assert bits["model.embed_tokens"] == (8, None)
    assert not [name for name in bits if ".layers.0." in name or ".layers.1." in name]
    assert "blocks:0-1" in plan.assignment.left["model.layers.0.mlp.up_proj"]
