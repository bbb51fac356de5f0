"""What a step that prunes plans: sizes, memory, time, and what is found out about a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build, tiny

from llmcomp.adapters.discover import discover, resized
from llmcomp.adapters.units import heads_of, neurons_of, spread
from llmcomp.api import compress
from llmcomp.cli import plan as verb
from llmcomp.errors import BadRecipe
from llmcomp.pipeline.job import plan_recipe
from llmcomp.pipeline.narrowed import notes, with_cut
from llmcomp.pipeline.plan import Prospect, bytes_after, bytes_needed, prospect
from llmcomp.pipeline.pruning import renumbered
from llmcomp.recipe import Calibration, PruneStep, QuantizeStep, Recipe, Step
from llmcomp.report.schema import LayerReport, Removed
from llmcomp.run_options import RunOptions

ALL = PruneStep(heads=0.5, mlp=0.25, layers=1)
BUDGET = 8 << 20


def recipe_of(*steps: Step, format: str = "dense") -> Recipe:
    return Recipe(steps, Calibration("sample", 4, 16), format=format)


def seen(recipe: Recipe, name: str = "llama", **sizes: Any) -> Prospect:
    return prospect(discover(build(name, **sizes).to("meta")), recipe, (4,), BUDGET)


@pytest.mark.parametrize(
    ("steps", "format"),
    [
        ((ALL,), "dense"),
        ((PruneStep("magnitude", mlp=0.5),), "dense"),
        ((PruneStep(layers=1),), "dense"),
        ((ALL, QuantizeStep("rtn")), "compressed-tensors"),
    ],
    ids=["all", "magnitude", "layers", "int4"],
)
def test_bytes_after_are_those_that_are_written(steps: tuple[Step, ...], format: str, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 3}
    source = tiny("llama", tmp_path / "model", tokenizer=True, dtype=torch.bfloat16, **sizes)
    recipe = recipe_of(*steps, format=format)
    model = build("llama", dtype=torch.bfloat16, **sizes).to("meta")
    row = prospect(discover(model), recipe, (), BUDGET).rows[0]
    options = RunOptions(output=tmp_path / "out", evaluate=False, verify=False)
    compress(str(source), recipe, options=options)
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert row.bytes_after == pytest.approx(written, rel=0.01)


def test_a_plan_counts_what_the_smaller_model_takes_beside_the_output() -> None:
    adapter = discover(build("llama", num_hidden_layers=3).to("meta"))
    alone, both = (plan_recipe(recipe, adapter) for recipe in (
        recipe_of(ALL), recipe_of(ALL, QuantizeStep(), format="compressed-tensors")
    ))  # fmt: skip
    stored = set(adapter.model.state_dict())
    smaller = bytes_after(alone.adapter, alone, stored)
    assert bytes_needed(alone, stored) == 3 * smaller
    assert bytes_needed(both, stored) == smaller + 2 * bytes_after(both.adapter, both, stored)
    assert bytes_needed(plan_recipe(recipe_of(QuantizeStep(), format="dense"), adapter), stored) > 3 * smaller


@pytest.mark.parametrize(
    ("steps", "statistics", "passes", "said"),
    [
        ((ALL,), 4, 2, "each window is computed 2 times, to look at blocks"),
        ((PruneStep(mlp=0.5),), 3, 1, "each window is computed once"),
        ((PruneStep("taylor", mlp=0.5),), 3, 3, "each window is computed 3 times, to look at blocks"),
        ((PruneStep(layers=1),), 0, 1, "0 Gram matrices are gathered; each window is computed once"),
        ((PruneStep("magnitude", mlp=0.5),), 0, 1, "No calibration is needed"),
        ((ALL, QuantizeStep()), 12, 3, "computed 3 times"),
    ],
    ids=["all", "mlp", "taylor", "layers", "magnitude", "int4"],
)
def test_a_plan_says_what_is_computed(steps: tuple[Step, ...], statistics: int, passes: int, said: str) -> None:
    from rich.console import Console

    found = seen(recipe_of(*steps, format="dense" if len(steps) == 1 else "compressed-tensors"), num_hidden_layers=3)
    (row,) = found.rows
    assert (row.statistics, row.passes, row.asked) == (statistics, passes, True)
    assert row.method.startswith(f"{steps[0].method} {steps[0].amount}")  # type: ignore[union-attr]
    console = Console(width=500)
    with console.capture() as shown:
        console.print(verb.view("m", found))
    assert said in shown.get()


def test_more_tokens_take_longer_and_wider_models_more_memory() -> None:
    def row(recipe: Recipe, **sizes: Any) -> Any:
        return seen(recipe, **sizes).rows[0]

    step = PruneStep(mlp=0.5)
    few = row(Recipe((step,), Calibration("sample", 64, 64), format="dense"))
    many = row(Recipe((step,), Calibration("sample", 64000, 64), format="dense"))
    assert many.seconds > 10 * few.seconds
    narrow, wide = row(recipe_of(step), intermediate_size=256), row(recipe_of(step), intermediate_size=2048)
    assert wide.peak_memory - narrow.peak_memory > 3 * 8 * 2048**2  # the Gram matrix's inverse in float64
    taylor = PruneStep("taylor", mlp=0.5)
    assert row(Recipe((taylor,), Calibration("sample", 64000, 64), format="dense")).seconds > many.seconds
    assert row(recipe_of(taylor), vocab_size=1 << 20).peak_memory > row(recipe_of(step), vocab_size=1 << 20).peak_memory
    assert row(recipe_of(PruneStep("magnitude", mlp=0.5)), intermediate_size=2048).peak_memory < wide.peak_memory / 2


def test_a_plan_for_several_ranks_is_refused() -> None:
    adapter = discover(build("llama").to("meta"))
    with pytest.raises(BadRecipe, match="without --ranks"):
        prospect(adapter, recipe_of(PruneStep(mlp=0.5)), (), BUDGET, ranks=2)


# --- what a block has ---


def test_units_lie_where_a_module_has_them() -> None:
    block = discover(build("phi3").to("meta")).blocks[0]
    part = neurons_of(block)
    assert not isinstance(part, str)
    (fused,) = (ref for ref, _ in part.producers)
    assert part.rows(fused, torch.tensor([1, 3])).tolist() == [1, 3, 257, 259]  # gates, then values
    heads = heads_of(discover(build("llama").to("meta")).blocks[0], build("llama").config)
    assert not isinstance(heads, str)
    slices = {name.rpartition("self_attn.")[2]: where for name, where in heads.slices(torch.tensor([1])).items()}
    assert slices["o_proj.weight"][1].tolist() == slices["q_proj.bias"][1].tolist() == list(range(64, 128))
    assert slices["k_proj.weight"][1].tolist() == list(range(32, 64))
    assert [slices[name][0] for name in ("o_proj.weight", "q_proj.weight", "v_proj.bias")] == [1, 0, 0]
    conv = neurons_of(discover(build("gpt2").to("meta")).blocks[0])
    assert not isinstance(conv, str)
    turned = {name.rpartition("mlp.")[2]: where[0] for name, where in conv.slices(torch.tensor([1])).items()}
    assert turned == {"c_proj.weight": 0, "c_fc.weight": 1, "c_fc.bias": 0}
    assert spread(torch.tensor([0, 2]), 2).tolist() == [0, 1, 4, 5]


def test_a_resized_model_is_that_of_its_config_and_impossible_sizes_say_why() -> None:
    model = build("gpt2").to("meta")
    assert resized(model, {"n_inner": 64}).state_dict()["transformer.h.0.mlp.c_fc.weight"].shape == (128, 64)
    assert model.config.n_inner == 256  # as it was
    with pytest.raises(ValueError, match="not a multiple"):
        resized(build("llama").to("meta"), {"num_attention_heads": 3})


def test_names_are_renumbered_in_the_chain_alone() -> None:
    blocks = discover(build("llama").to("meta")).blocks
    assert renumbered("model.layers.1.mlp.up_proj.weight", blocks, (0, 7)) == "model.layers.7.mlp.up_proj.weight"
    assert renumbered("model.norm.weight", blocks, (0, 7)) == "model.norm.weight"


# --- what is said ---


def test_layers_of_later_steps_say_what_pruning_did_before() -> None:
    def layer(name: str, scheme: str, method: str, before: int, **more: Any) -> LayerReport:
        return LayerReport(name, 0, "mlp", (4, 4), scheme, method, before, 10, **more)

    narrowed = [layer("down", "3 of 4 neurons", "activation", 32), layer("up", "3 of 4 neurons", "activation", 32)]
    down, up = with_cut([layer("down", "int4 g128", "gptq", 24, error=0.5)], narrowed)
    assert (down.scheme, down.method, down.bytes_before) == ("3 of 4 neurons + int4 g128", "activation + gptq", 32)
    assert down.error == 0.5 and up == narrowed[1]


def test_notes_name_blocks_and_say_where_heads_are() -> None:
    block = Removed("layers.2", "block", 1, 1, [2], 0.0123)
    (said,) = notes([block, Removed("down", "neuron", 8, 2, [], 0.1)], 4)
    assert said == "Blocks that are gone, of 4, counted from 0, with the score for which they went: 2 (0.0123)."
    assert "under 'removed'" in notes([Removed("o", "head", 8, 2, [1, 5], 0.1)], 4)[0]
    assert notes([], 4) == []
