"""What cannot be pruned, and the command line: one sentence for each mistake, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import parse
from tiny import build

import llmcomp
from llmcomp.adapters.base import Adapter
from llmcomp.adapters.discover import discover
from llmcomp.cli.main import main
from llmcomp.errors import BadRecipe, RunError
from llmcomp.experts import split_experts
from llmcomp.pipeline import influence
from llmcomp.pipeline.job import plan_recipe
from llmcomp.recipe import (
    Override,
    PruneStep,
    QuantizeStep,
    Recipe,
    Step,
)


def adapter_of(name: str, **sizes: Any) -> Adapter:
    model = build(name, **sizes).to("meta")
    split_experts(model)
    return discover(model)


def cannot(model: str, step: PruneStep, said: str, **sizes: Any) -> None:
    with pytest.raises(BadRecipe, match=said):
        plan_recipe(Recipe((step,), format="dense"), adapter_of(model, **sizes))


@pytest.mark.parametrize(
    ("model", "step", "said"),
    [
        ("bert", PruneStep(heads=0.5), "its config cannot say that there are fewer of them.*prune --mlp or --layers"),
        ("gpt2", PruneStep(heads=0.5), "queries, keys and values are fused in c_attn; prune --mlp or --layers"),
        ("olmo2", PruneStep(heads=0.5), "q_norm.weight would have the shape"),
        ("deepseek-v3", PruneStep(heads=0.5), "not made of queries, keys, values and one output"),
        ("bloom", PruneStep(mlp=0.5), "its config has no field for their number; prune --heads or --layers"),
        ("albert", PruneStep(layers=1), "all of its layers share their weights; llmcomp factorize"),
        ("t5", PruneStep(mlp=0.5), "several stacks of blocks"),
        ("llava", PruneStep(mlp=0.5), "several stacks of blocks"),
        ("bert", PruneStep("taylor", mlp=0.5), "wants a loss, which models for causal-lm and sequence-classification"),
        ("llama", PruneStep(layers=2), "--layers 2 of 2 blocks leaves none; take at most 1"),
        ("llama", PruneStep(heads=0.2), "--heads, each 2 heads that share keys and values: .*take at least 0.5"),
        ("llama", PruneStep(mlp=0.01), "removes none; take at least 0.2"),
        ("llama", PruneStep(mlp=0.5, options={"multiple": 0}), "at least 1"),
        ("llama", PruneStep(mlp=0.5, options={"alpha": 1}), "unknown key 'alpha'"),
        ("llama", PruneStep(heads=0.1, layers=7, mlp=0.01), "take at least 0.5; .*take at least 0.2; .*at most 1"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_is_refused_with_what_would_work(model: str, step: PruneStep, said: str) -> None:
    cannot(model, step, said)


def test_heads_that_share_one_of_keys_and_values_are_one_group() -> None:
    cannot("llama", PruneStep(heads=0.5), "so they are one group; prune --mlp", num_key_value_heads=1)


def test_heads_that_transformers_refuses_are_refused_with_those_that_it_takes() -> None:
    """Llama wants their number to divide the hidden size: 6 of 8 do not divide 128."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}
    said = "leave 6 heads, which transformers refuses.*it takes --heads 0.5, 0.8, 0.9"
    cannot("llama", PruneStep(heads=0.25), said, **sizes)


def test_blocks_that_differ_in_shape_are_refused_when_the_wrong_one_is_to_go() -> None:
    plan = plan_recipe(Recipe((PruneStep(layers=1),), format="dense"), adapter_of("deepseek-v3"))
    assert plan.reduction is not None
    with pytest.raises(BadRecipe, match="would have other shapes than it has"):
        plan.reduction.of([1])


@pytest.mark.parametrize(
    ("steps", "format", "said"),
    [
        ((PruneStep(),), "dense", "Nothing is to be pruned: give --heads 0.25"),
        ((PruneStep(mlp=1.0),), "dense", "--mlp 1 cannot be"),
        ((PruneStep(heads=-0.5),), "dense", "--heads -0.5 cannot be"),
        ((PruneStep(layers=0),), "dense", "--layers 0 cannot be"),
        ((PruneStep("hessian", mlp=0.5),), "dense", "choose activation, taylor or magnitude"),
        ((PruneStep("magnitude", mlp=0.5, options={"damping": 0.1}),), "dense", "Method magnitude has no options"),
        ((PruneStep(mlp=0.5),), "compressed-tensors", "take --format dense"),
        ((PruneStep(mlp=0.5), QuantizeStep()), "bnb-nf4", "run llmcomp prune first"),
        ((QuantizeStep(), PruneStep(mlp=0.5)), "dense", "do not go together"),
        ((PruneStep(mlp=0.5), PruneStep(layers=1)), "dense", "do not go together"),
    ],
)
def test_what_no_model_could_make_right_is_refused(
    steps: tuple[Step, ...], format: str, said: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadRecipe, match=said):
        llmcomp.compress(str(llama), Recipe(steps, format=format), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcomp.session import Session

    class Two:
        first, size, rank = True, 2, 0

    recipe = Recipe((PruneStep(mlp=0.5),), format="dense")
    options = llmcomp.RunOptions(output=tmp_path / "out", evaluate=False, device="cpu")
    from llmcomp.progress import Silent

    session = Session(str(llama), str(llama), llama, recipe, options, Silent(), Two())  # type: ignore[arg-type]
    with pytest.raises(BadRecipe, match="pruned in one process, and this run has 2"):
        session.run()


# --- the command line, and recipes ---


def test_flags_are_sugar_for_the_step(tmp_path: Path, llama: Path) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    flags = ["--mlp", "0.5", "--method", "magnitude", "--no-evaluate", "--no-verify"]
    assert main(["prune", str(llama), *flags, "--output", str(output), "--save-recipe", str(recipe)]) == 0
    assert Recipe.load(recipe) == Recipe((PruneStep("magnitude", mlp=0.5),), format="dense")
    assert Recipe.load(output / "llmcomp_recipe.yaml") == Recipe.load(recipe)
    assert parse(["prune", "m", "--heads", "0.25", "--layers", "4"])["layers"] == 4


def test_recipes_read_what_they_write() -> None:
    recipe = Recipe((PruneStep(heads=0.5, mlp=0.3, layers=1), QuantizeStep(overrides=(Override("mlp", bits=8),))))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_yaml("steps: [{kind: prune, mlp: 0.3}]").format == "dense"
    with pytest.raises(BadRecipe, match="unknown key 'mpl'"):
        Recipe.from_yaml("steps: [{kind: prune, mpl: 0.3}]")
    with pytest.raises(BadRecipe, match="unknown key 'targets'"):
        Recipe.from_yaml("steps: [{kind: prune, mlp: 0.3, targets: [mlp]}]")


def test_a_mistake_is_one_sentence_and_leaves_nothing(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", str(llama), "--heads", "0.1", "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "take at least 0.5" in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_influences_need_a_window_in_every_block(llama: Path, tmp_path: Path) -> None:
    from llmcomp.devices import CPU
    from llmcomp.pipeline.job import open_source

    source = open_source(llama)
    with pytest.raises(RunError, match="never computed in the calibration run"):
        influence.influences(source.adapter, source.binding, [], tmp_path, 0, CPU)
