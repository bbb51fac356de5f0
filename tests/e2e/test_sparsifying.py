"""Weights removed, alone and before they are rounded, end to end: exact patterns in what a fresh process loads."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import parse
from e2e_runs import Case, Run, broken_run, hashes, quantize, recipe_of_case, reload, runs_of
from tiny import build, tiny, write_tokenizer
from torch import Tensor

from llmcomp.adapters.discover import discover
from llmcomp.cli.main import main
from llmcomp.errors import BadRecipe
from llmcomp.formats.opening import open_checkpoint
from llmcomp.patterns import Pattern, holds
from llmcomp.pipeline import surveying
from llmcomp.pipeline.job import plan_recipe
from llmcomp.pipeline.plan import prospect
from llmcomp.recipe import Calibration, Override, QuantizeStep, Recipe, SparsifyStep, Step, check
from llmcomp.report.schema import Report
from llmcomp.report.summary import reproduce, roles

SKIPPED = (Override("mlp", pattern="1:4"), Override("blocks:0", skip=True))  # of two the later one wins
CASES = {
    "llama": Case("llama", (SparsifyStep(),), dtype=torch.bfloat16),
    "llama overrides": Case("llama", (SparsifyStep("wanda", overrides=SKIPPED),)),
    "bert alps": Case("bert", (SparsifyStep("alps", "4:8", options={"iterations": 20}),)),
    "gpt2 magnitude": Case("gpt2", (SparsifyStep("magnitude", "unstructured", 0.6),)),
    "mixtral": Case("mixtral", (SparsifyStep(),)),  # whose experts few tokens reach
    "albert": Case("albert", (SparsifyStep("sparsegpt", "unstructured", 0.7),)),  # one block that runs twice
    "llama packed": Case("llama", (SparsifyStep("wanda"),), "llmcomp", torch.bfloat16),
    "llama one sweep": Case("llama", (SparsifyStep(), QuantizeStep(group_size=64)), "compressed-tensors"),
    "llama held": Case("llama", (SparsifyStep("wanda"), QuantizeStep(bits=8, symmetric=False)), "llmcomp"),
    "bert rtn": Case("bert", (SparsifyStep("magnitude", "4:8"), QuantizeStep("rtn")), "compressed-tensors"),
    "mixtral one sweep": Case("mixtral", (SparsifyStep(), QuantizeStep(group_size=32)), "compressed-tensors"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Run]:
    return runs_of(CASES, tmp_path_factory.mktemp("sparsifying"), text)


@pytest.fixture(scope="module")
def reloaded(runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
    return reload({name: run for name, run in runs.items() if CASES[name].stored != "llmcomp"})


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.stored != "llmcomp"])
def test_a_fresh_process_computes_what_the_run_computed(name: str, reloaded: dict[str, dict[str, Any]]) -> None:
    found = reloaded[name]
    assert found["account"] == {} and found["imported"] == []
    assert found["from_witness"] < (2e-2 if CASES[name].dtype == torch.bfloat16 else 1e-5)
    assert found["verification"]["passed"], found["verification"]["checks"]
    assert found["from_original"] > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_what_is_stored_keeps_exactly_its_pattern(name: str, runs: dict[str, Run]) -> None:
    run, step = runs[name], CASES[name].steps[0]
    assert isinstance(step, SparsifyStep)
    stored = stored_weights(run.output, run.report)
    for layer in run.report.layers:
        weight = stored[layer.name]
        label = layer.scheme.partition(" + ")[0].removesuffix(" stored dense")
        if label.startswith("unstructured"):
            removed = Pattern.parse("unstructured", step.sparsity).removes(weight.numel())
            assert int((weight == 0).sum()) == removed
            continue
        pattern = Pattern.parse(label)
        groups = (weight != 0).view(len(weight), -1, pattern.of or 1)
        # A kept weight may be zero, too: rounded to it, or in an input that calibration never saw.
        assert int(groups.sum(-1).max()) <= (pattern.kept or 0)
        if len(CASES[name].steps) == 1 and layer.method != "sparsegpt":
            assert holds(pattern, weight != 0)


def test_overrides_have_their_own_pattern(runs: dict[str, Run]) -> None:
    schemes, left = runs["llama overrides"].schemes(), runs["llama overrides"].left()
    assert schemes["model.layers.1.mlp.up_proj"] == "1:4"
    assert schemes["model.layers.1.self_attn.q_proj"] == "2:4"
    assert "blocks:0" in left["model.layers.0.mlp.up_proj"]


def test_experts_that_few_tokens_reach_are_masked_more_humbly(runs: dict[str, Run]) -> None:
    for name, usual, humbler in (
        ("mixtral", "sparsegpt", {"wanda", "magnitude"}),
        ("mixtral one sweep", "sparsegpt + gptq", {"wanda + rtn-clip", "magnitude + rtn"}),
    ):
        methods = {layer.method for layer in runs[name].report.layers if ".experts." in layer.name}
        assert methods <= {usual, *humbler} and methods & humbler
        assert all(layer.fallback for layer in runs[name].report.layers if layer.method in humbler)


def test_the_report_says_what_was_done(runs: dict[str, Run]) -> None:
    assert runs["llama"].report.command == "sparsify"
    assert runs["llama one sweep"].report.command == "compress"
    assert {layer.scheme for layer in runs["llama one sweep"].report.layers} == {"2:4 + int4 g64"}
    assert all(layer.error and 0 < layer.error < 0.6 for layer in runs["llama one sweep"].report.layers)


@pytest.mark.parametrize("name", ["llama one sweep", "bert alps"])
def test_a_broken_run_ends_bit_identical(name: str, runs: dict[str, Run], text: Path, tmp_path: Path) -> None:
    recipe = recipe_of_case(text, CASES[name])
    output = tmp_path / "again"
    broken_run(runs[name].source, output, recipe, 1)
    again = quantize(runs[name].source, output, recipe)
    assert again.report.resumed_blocks == 1
    assert hashes(output) == hashes(runs[name].output)


@pytest.mark.parametrize(
    ("steps", "format", "said"),
    [
        ((SparsifyStep(pattern="2:5"),), "dense", "2:5 does not divide the widths"),
        ((SparsifyStep(pattern="4:2"),), "dense", "N at least 1 and below M"),
        ((SparsifyStep(pattern="half"),), "dense", "--pattern half cannot be"),
        ((SparsifyStep(sparsity=0.7),), "dense", "leave --sparsity out"),
        ((SparsifyStep(allocate=True),), "dense", "2:4 removes one share of every weight; take --pattern unstructured"),
        ((SparsifyStep(pattern="unstructured", sparsity=1.5),), "dense", "share between 0 and 1"),
        ((SparsifyStep("lottery"),), "dense", "method 'lottery' is not one of sparsegpt, alps"),
        ((SparsifyStep(targets=("embeddings",)),), "dense", "looked up row by row"),
        ((SparsifyStep(targets=("convolutions",)),), "dense", "'convolutions' matches no weight"),
        ((SparsifyStep(options={"iterations": 3}),), "dense", "unknown key 'iterations'"),
        ((SparsifyStep(overrides=(Override("mlp", bits=8),)),), "dense", "sets bits"),
        ((QuantizeStep(overrides=(Override("mlp", pattern="2:4"),)),), "dense", "sets pattern"),
        ((SparsifyStep(),), "compressed-tensors", "'format: dense'"),
        ((SparsifyStep(pattern="unstructured", sparsity=1e-6, allocate=True),), "dense", "--allocate nothing to share"),
        ((SparsifyStep(pattern="unstructured"),), "llmcomp", "is unstructured 50%; take --format dense"),
        ((SparsifyStep(options={"damping": 0.1}), QuantizeStep()), "dense", "give damping as options of the step to"),
        ((SparsifyStep(),), "bnb-nf4", "take --format dense"),
        ((QuantizeStep(), SparsifyStep()), "dense", "do not go together"),
        ((QuantizeStep(), QuantizeStep()), "dense", "do not go together"),
        ((SparsifyStep(), QuantizeStep("signround")), "dense", "move removed weights from zero"),
        ((SparsifyStep(), QuantizeStep("awq-gptq")), "dense", "move removed weights from zero"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(steps: tuple[Step, ...], format: str, said: str) -> None:
    recipe = Recipe(steps, format=format)
    with pytest.raises(BadRecipe, match=said) as caught:
        check(recipe)
        plan_recipe(recipe, discover(build("llama")))
    assert "\n" not in str(caught.value)


def test_recipes_as_people_write_them() -> None:
    """A pattern without quotes, which is a number to the base of 60 in YAML 1.1; no format, where nothing is packed."""
    recipe = Recipe.from_yaml("steps: [{kind: sparsify, pattern: 2:4, overrides: [{target: mlp, pattern: 4:8}]}]")
    step = recipe.sparsifying
    assert step is not None and recipe.format == "dense"
    assert (step.pattern, step.overrides[0].pattern) == ("2:4", "4:8")
    assert Recipe.from_yaml("seed: 12\nsteps: [{kind: quantize, options: {damping: 1e-2}}]").seed == 12


def test_auto_after_sparsifying_takes_what_keeps_the_mask() -> None:
    recipe = Recipe((SparsifyStep(), QuantizeStep("auto", bits=2)), format="llmcomp")
    tasks = plan_recipe(recipe, discover(build("llama"))).assignment.tasks
    assert {task.methods for task in tasks.values()} == {"sparsegpt + gptq"}


def test_the_plan_counts_what_admm_takes() -> None:
    adapter = discover(build("llama", hidden_size=256, intermediate_size=512))
    found = {}
    for method in ("wanda", "alps"):
        recipe = Recipe((SparsifyStep(method),), Calibration(samples=4, sequence_length=64), format="dense")
        found[method] = prospect(adapter, recipe, (), 8 * 2**20).rows[0]
    assert found["alps"].seconds > 3 * found["wanda"].seconds
    assert found["alps"].peak_memory > found["wanda"].peak_memory + 4 * 512**2


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_recipes_are_read_as_they_were_written(case: Case) -> None:
    recipe = Recipe(case.steps, format=case.stored)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_the_commands(
    runs: dict[str, Run], text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, output, saved = str(runs["bert alps"].source), str(tmp_path / "out"), str(tmp_path / "recipe.yaml")
    flags = ["--method", "wanda", "--pattern", "unstructured", "--sparsity", "0.6", "--skip", "blocks:0"]
    shared = ["--calibration", str(text), "--samples", "4", "--sequence-length", "16"]
    quick = ["--no-evaluate", "--no-verify"]
    assert main(["sparsify", model, *flags, *shared, *quick, "--save-recipe", saved, "-o", output]) == 0
    printed = capfd.readouterr().out
    assert "unstructured 60%" in printed and "llmcomp sparsify" in printed
    report = Report.read(tmp_path / "out")
    assert parse(shlex.split(reproduce(report))[1:])["recipe"] == Path("llmcomp_recipe.yaml")
    assert main(["compress", model, "--recipe", saved, *quick, "-o", str(tmp_path / "again")]) == 0
    assert hashes(tmp_path / "again") == hashes(tmp_path / "out")
    assert main(["plan", model, "--recipe", saved]) == 0
    assert "wanda unstructured 60%" in capfd.readouterr().out
    assert main(["sparsify", model, "--sparsity", "0.7", "-o", str(tmp_path / "no")]) == 2
    assert "leave --sparsity out" in capfd.readouterr().err
    assert not list(tmp_path.glob("*no*"))


def uneven(name: str, directory: Path) -> Path:
    """A tiny model of which some matrices have few large weights, as others have not."""
    model = build(name)
    with torch.no_grad():
        for number, (key, value) in enumerate(model.named_parameters()):
            if ".layers." in key and value.dim() > 1:
                spread = value.sign() * value.abs() ** (1 + number % 4)
                value.copy_(spread * value.std() / spread.std())
    model.save_pretrained(directory)
    write_tokenizer(directory, encoder=False)
    return directory


def test_what_is_removed_is_shared_out_under_one_budget(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, by what was measured once; a resumed run goes by the same numbers and ends bit-identical."""
    source, own = uneven("llama", tmp_path / "source"), Override("o_proj", sparsity=0.3)
    step = SparsifyStep(pattern="unstructured", sparsity=0.6, allocate=True, overrides=(own,))
    recipe = recipe_of_case(text, Case("llama", (step,)))
    whole = quantize(source, tmp_path / "whole", recipe)
    partial = broken_run(source, tmp_path / "again", recipe, 1)
    shared = json.loads((partial / "sparsities.json").read_text())
    monkeypatch.setattr(surveying.Pass, "run", None)  # a second measurement would fail
    again = quantize(source, tmp_path / "again", recipe)
    assert again.report.resumed_blocks == 1
    assert hashes(again.output) == hashes(whole.output)
    removed = {name: int((weight == 0).sum()) for name, weight in stored_weights(whole.output, whole.report).items()}
    sizes = {layer.name: layer.shape[0] * layer.shape[1] for layer in whole.report.layers}
    assert set(shared) == {name for name in sizes if "o_proj" not in name} and len(set(shared.values())) > 4
    assert all(removed[name] == round(share * sizes[name]) for name, share in shared.items())
    assert all(0.4 - 1e-6 <= share <= 0.8 + 1e-6 for share in shared.values())
    assert sum(removed[name] for name in shared) == sum(Pattern(removed=0.6).removes(sizes[name]) for name in shared)
    assert all(removed[name] == Pattern(removed=0.3).removes(sizes[name]) for name in sizes if "o_proj" in name)
    assert any(re.fullmatch(r"unstructured [\d.]+–[\d.]+%", role.schemes) for role in roles(whole.report))


@pytest.mark.parametrize(("method", "model"), [("wanda", "mixtral"), ("magnitude", "mixtral"), ("alps", "llama")])
def test_every_method_shares_out(method: str, model: str, text: Path, tmp_path: Path) -> None:
    options = {"iterations": 5} if method == "alps" else {}
    step = SparsifyStep(method, "unstructured", 0.5, allocate=True, options=options)
    source = uneven(model, tmp_path / "source")
    run = quantize(source, tmp_path / "out", recipe_of_case(text, Case(model, (step,))))
    weights = stored_weights(run.output, run.report)
    gone, size = sum(int((one == 0).sum()) for one in weights.values()), sum(map(Tensor.numel, weights.values()))
    slack = max(len(one) for one in weights.values()) / 2 if method == "wanda" else len(weights)
    assert abs(gone - size / 2) <= slack
    assert len({layer.scheme for layer in run.report.layers}) > 3


def test_the_plan_says_that_it_measures_first() -> None:
    recipe = Recipe((SparsifyStep(pattern="unstructured", allocate=True),), format="dense")
    seen = prospect(discover(build("llama")), recipe, (), 8 * 2**20)
    assert seen.rows[0].shared == "sparsity" and seen.rows[0].method == "sparsegpt unstructured 50% allocated"
    with pytest.raises(BadRecipe, match="runs one block several times"):
        plan_recipe(recipe, discover(build("albert")))


def test_the_verb_packs_what_it_is_asked_to(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path / "llama", dtype=torch.bfloat16)
    quick = ["--method", "magnitude", "--no-evaluate", "--no-verify"]
    sizes = {}
    for format in ("dense", "llmcomp"):
        output = tmp_path / format
        assert main(["sparsify", str(source), *quick, "--format", format, "-o", str(output)]) == 0
        report = Report.read(output)
        assert report.format == format
        sizes[format] = sum(layer.bytes_after for layer in report.layers)
        assert all(holds(Pattern(2, 4), weight != 0) for weight in stored_weights(output, report).values())
    shapes = 16 * len(report.layers)
    assert (sizes["llmcomp"] - shapes) * 16 == sizes["dense"] * 9  # of every four two of 16 bits, and their places
    assert main(["sparsify", str(source), "--sparsity", "0.5", "--pattern", "unstructured", "--format", "llmcomp",
                 "-o", str(tmp_path / "no")]) == 2  # fmt: skip
    assert not list(tmp_path.glob("*no*"))


def stored_weights(output: Path, report: Report) -> dict[str, torch.Tensor]:
    """{linear that was compressed: its dense weight [out, in]}."""
    opened = open_checkpoint(output)
    stored = dict(opened.dense())
    weights = {layer.name: stored[f"{layer.name}.weight"] for layer in report.layers}
    return {name: weight.t() if opened.ref(name).transposed else weight for name, weight in weights.items()}
