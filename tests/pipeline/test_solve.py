"""One stage: what is stacked together comes apart as if it had been solved alone."""

from __future__ import annotations

import pytest
import torch
from tiny import build

from llmcomp.adapters.discover import discover
from llmcomp.calibration.stats import GramAccumulator
from llmcomp.errors import BadRecipe
from llmcomp.pipeline.assign import Task, assign
from llmcomp.pipeline.solve import method_config, solve_stage
from llmcomp.recipe import Override, QuantizeStep


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    """q, k and v of a block, v at 8 bits."""
    adapter = discover(build("llama"))
    found = assign(adapter, QuantizeStep(overrides=(Override("v_proj", bits=8),))).tasks
    return [found[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"]


@pytest.fixture(scope="module")
def weights(tasks: list[Task]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(task.ref.out_features, task.ref.in_features) for task in tasks]
    return [0.05 * torch.randn(shape, generator=generator) for shape in shapes]


def statistics(width: int = 128):
    accumulator = GramAccumulator()
    accumulator.add(torch.randn(300, width, generator=torch.Generator().manual_seed(1)))
    return accumulator.finish("q_proj")


def test_results_come_in_the_order_of_the_tasks(tasks: list[Task], weights: list[torch.Tensor]) -> None:
    solved = solve_stage(tasks, weights, statistics(), {})
    assert [done.task for done in solved] == tasks
    for done, weight in zip(solved, weights, strict=True):
        dense = done.solution.weight.dense()
        assert dense.shape == weight.shape
        away = float((dense - weight).square().mean() / weight.square().mean())
        assert away < (1e-3 if done.task.scheme.bits == 8 else 0.1)


def test_stacking_changes_no_row(tasks: list[Task], weights: list[torch.Tensor]) -> None:
    together = solve_stage(tasks, weights, statistics(), {})
    for done, task, weight in zip(together, tasks, weights, strict=True):
        (alone,) = solve_stage([task], [weight], statistics(), {})
        assert done.solution.weight.values.equal(alone.solution.weight.values)
        assert done.solution.weight.scale.equal(alone.solution.weight.scale)


def test_an_option_that_a_method_does_not_have() -> None:
    with pytest.raises(BadRecipe, match="options of rtn"):
        method_config("rtn", {"no_such_option": 0.1})
