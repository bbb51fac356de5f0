"""Sparse weights that aim at the source's outputs on the inputs of now, end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from e2e_runs import Run, broken_run, hashes, quantize, reads
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, build, tiny
from transformers import AutoModelForCausalLM

from llmcomp.adapters.discover import discover
from llmcomp.calibration.stats import GramAccumulator
from llmcomp.errors import BadRecipe
from llmcomp.experts import split_experts
from llmcomp.formats.opening import open_checkpoint
from llmcomp.methods.retarget import DAMPING
from llmcomp.methods.sparsegpt import sparsegpt
from llmcomp.patterns import Pattern
from llmcomp.pipeline.sparsifying import assign_steps
from llmcomp.recipe import Calibration, FactorizeStep, Override, QuantizeStep, Recipe, SparsifyStep, check


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several times as many tokens as the widest input has columns."""
    path = tmp_path_factory.mktemp("windows") / "windows.safetensors"
    ids = torch.randint(8, VOCABULARY, (24, 64), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, path)
    return path


def recipe(windows: Path, update: bool, *more: QuantizeStep) -> Recipe:
    return Recipe((SparsifyStep(update=update), *more), Calibration(str(windows), 24, 64), format="dense")


@pytest.fixture(scope="module")
def runs(windows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Run]:
    root = tmp_path_factory.mktemp("updating")
    tiny("llama", root / "source", tokenizer=True)
    return {update: quantize(root / "source", root / str(update), recipe(windows, update)) for update in (False, True)}


def test_outputs_are_nearer_to_the_source_s(runs: dict[bool, Run], windows: Path) -> None:
    ids = load_file(windows)["input_ids"]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(runs[True].source, dtype=torch.float32)(input_ids=ids).logits
        apart = {
            update: float((AutoModelForCausalLM.from_pretrained(run.output)(input_ids=ids).logits - wanted).norm())
            for update, run in runs.items()
        }
    assert apart[True] < 0.97 * apart[False]


def test_where_inputs_are_the_source_s_nothing_changes(runs: dict[bool, Run]) -> None:
    one, other = (dict(open_checkpoint(runs[update].output).dense()) for update in (True, False))
    first, later = (f"model.layers.{block}.self_attn.q_proj.weight" for block in (0, 1))
    assert torch.equal(one[first], other[first]) and not torch.equal(one[later], other[later])


def test_a_linear_is_swept_from_least_squares_of_both_inputs(runs: dict[bool, Run], windows: Path) -> None:
    """With inputs as plain transformers computes them in the source and in what was written."""
    paths = (runs[True].source, runs[True].output)
    source, done = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths)
    ids, name = load_file(windows)["input_ids"], "model.layers.1.mlp.down_proj"
    there, now = reads(source, ids, name), reads(done, ids, name)
    weight = source.get_submodule(name).weight.detach().double()
    ridge = (DAMPING * now.square().sum(0).mean()).sqrt() * torch.eye(now.shape[1], dtype=torch.float64)
    missing = (there - now) @ weight.T
    step = torch.linalg.lstsq(torch.cat((now, ridge)), torch.cat((missing, missing.new_zeros(len(ridge), len(weight)))))
    target = (weight + step.solution.T).float()
    seen = GramAccumulator()
    seen.add(now.float())
    swept = sparsegpt(target, seen.finish(name), Pattern(2, 4), torch.float32).weight.dense()
    found = done.get_submodule(name).weight.detach()
    same = (swept != 0) == (found != 0)
    assert float(same.float().mean()) > 0.999  # ties of rounding may choose another weight
    rows = same.all(1)
    assert float((swept[rows] - found[rows]).norm() / found[rows].norm()) < 1e-3


def test_the_report_names_it(runs: dict[bool, Run]) -> None:
    assert {layer.method for layer in runs[True].report.layers} == {"sparsegpt updated"}
    assert {layer.method for layer in runs[False].report.layers} == {"sparsegpt"}


@pytest.mark.parametrize("more", [(), (QuantizeStep(group_size=32),)], ids=["alone", "one sweep"])
def test_a_broken_run_ends_bit_identical(
    more: tuple[QuantizeStep, ...], runs: dict[bool, Run], windows: Path, tmp_path: Path
) -> None:
    made = recipe(windows, True, *more)
    whole = quantize(runs[True].source, tmp_path / "whole", made)
    broken_run(runs[True].source, tmp_path / "again", made, 1)
    again = quantize(runs[True].source, tmp_path / "again", made)
    assert again.report.resumed_blocks == 1 and hashes(tmp_path / "again") == hashes(whole.output)


@pytest.mark.parametrize("name", ["mixtral", "albert"])
def test_what_cannot_be_updated_says_so(name: str) -> None:
    model = build(name)
    split_experts(model)
    tasks = assign_steps(discover(model), (SparsifyStep(update=True),)).tasks.values()
    humble = [task for task in tasks if task.pruning is not None and not task.pruning.update]
    assert humble and all("not updated" in (task.fallback or "") for task in humble)


# --- integers that aim at the source's outputs ---


@pytest.fixture(scope="module")
def aimed(windows: Path, runs: dict[bool, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    root, source = tmp_path_factory.mktemp("aimed"), runs[True].source
    recipes = {
        "gptq": quantizing(windows, "gptq"), "gptaq": quantizing(windows, "gptaq", alpha=1.0),
        "none": quantizing(windows, "gptaq", alpha=0.0),
    }  # fmt: skip
    return {name: quantize(source, root / name, recipe) for name, recipe in recipes.items()}


def quantizing(windows: Path, method: str, **options: float) -> Recipe:
    step = QuantizeStep(method=method, bits=3, group_size=32, options=options)
    return Recipe((step,), Calibration(str(windows), 24, 64))


def test_integers_give_what_is_nearer_to_the_source(aimed: dict[str, Run], windows: Path) -> None:
    ids = load_file(windows)["input_ids"]
    with torch.no_grad():
        source = AutoModelForCausalLM.from_pretrained(aimed["gptq"].source, dtype=torch.float32)
        wanted = source(input_ids=ids).logits
        apart = {
            name: float((AutoModelForCausalLM.from_pretrained(run.output)(input_ids=ids).logits - wanted).norm())
            for name, run in aimed.items()
        }
    assert apart["gptaq"] < 0.97 * apart["gptq"]
    assert {layer.method for layer in aimed["gptaq"].report.layers} == {"gptaq"}


def test_an_aim_of_no_length_is_gptq(aimed: dict[str, Run]) -> None:
    assert weights_of(aimed["none"]) == weights_of(aimed["gptq"]) != weights_of(aimed["gptaq"])


def weights_of(run: Run) -> dict[str, str]:
    return {name: digest for name, digest in hashes(run.output).items() if name.endswith(".safetensors")}


def test_a_broken_run_of_integers_ends_bit_identical(aimed: dict[str, Run], windows: Path, tmp_path: Path) -> None:
    made = quantizing(windows, "gptaq", alpha=1.0)
    broken_run(aimed["gptaq"].source, tmp_path / "again", made, 1)
    again = quantize(aimed["gptaq"].source, tmp_path / "again", made)
    assert again.report.resumed_blocks == 1 and weights_of(again) == weights_of(aimed["gptaq"])


@pytest.mark.parametrize("name", ["mixtral", "albert"])
def test_what_cannot_aim_takes_gptq_and_says_so(name: str) -> None:
    model = build(name)
    split_experts(model)
    tasks = assign_steps(discover(model), (QuantizeStep(method="gptaq"),)).tasks.values()
    humble = [task for task in tasks if task.method == "gptq"]
    assert humble and all("not updated" in (task.fallback or "") for task in humble)
    assert all(task.crossed == (task.method == "gptaq") for task in tasks)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((QuantizeStep(method="gptaq", bits=8, activations="int8-dynamic"),), "nothing has rounded; take gptq"),
        ((QuantizeStep(method="gptaq", overrides=(Override("mlp", method="awq"),)),), "take one of them for all"),
        ((SparsifyStep(), QuantizeStep(method="gptaq")), "after sparsifying take gptq"),
        ((FactorizeStep(), QuantizeStep(method="gptaq")), "take gptq, rtn-clip or rtn"),
    ],
    ids=["activations", "awq", "sparse", "factors"],
)
def test_refused_beside_others(steps: tuple[QuantizeStep, ...], said: str) -> None:
    with pytest.raises(BadRecipe, match=said):
        assign_steps(discover(build("llama")), steps)


def test_refused() -> None:
    with pytest.raises(BadRecipe, match="magnitude reads none; take another --method"):
        check(Recipe((SparsifyStep("magnitude", update=True),), format="dense"))
