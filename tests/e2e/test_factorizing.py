"""Matrices made two factors, alone and beside integers, end to end: what is stored, what it fits, what resumes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from command_line import parse
from e2e_runs import (
    Case,
    Run,
    broken_run,
    hashes,
    quantize,
    reads,
    recipe_of_case,
    runs_of,
    tensors,
)
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, build
from transformers import AutoModelForCausalLM

import llmcomp
from llmcomp.adapters.discover import discover
from llmcomp.cli.main import main
from llmcomp.errors import BadRecipe
from llmcomp.formats.opening import open_checkpoint
from llmcomp.formats.verify import check as verified
from llmcomp.kinds import LowRank
from llmcomp.methods import lowrank
from llmcomp.methods.rank_budget import Spectrum, allocate, balanced
from llmcomp.pipeline import surveying
from llmcomp.pipeline.job import plan_recipe
from llmcomp.pipeline.plan import prospect
from llmcomp.recipe import (
    Calibration,
    FactorizeStep,
    Override,
    QuantizeStep,
    Recipe,
    SparsifyStep,
    Step,
    check,
)
from llmcomp.report.schema import Report
from llmcomp.report.summary import reproduce, roles

OVERRIDES = (Override("mlp", ratio=0.5), Override("down_proj", rank=7), Override("blocks:0", skip=True))
CASES = {
    "llama": Case("llama", (FactorizeStep(),), dtype=torch.bfloat16),
    "llama overrides": Case("llama", (FactorizeStep("asvd", overrides=OVERRIDES),)),
    "bert": Case("bert", (FactorizeStep(ratio=0.6),)),
    "gpt2 svd": Case("gpt2", (FactorizeStep("svd", ratio=0.5),)),
    "mixtral": Case("mixtral", (FactorizeStep(),)),  # whose experts few tokens reach
    "albert": Case("albert", (FactorizeStep(),)),  # one block that runs twice
    "llama int4": Case("llama", (FactorizeStep(), QuantizeStep(group_size=64)), dtype=torch.bfloat16),
    "gpt2 int8": Case("gpt2", (FactorizeStep(ratio=0.5), QuantizeStep("rtn", 8))),
    "bert corrected": Case("bert", (QuantizeStep(bits=3), FactorizeStep(rank=8))),
    "mixtral corrected": Case("mixtral", (QuantizeStep(), FactorizeStep(rank=4))),
    "llama dense": Case("llama", (FactorizeStep(),), "dense", torch.bfloat16),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Run]:
    return runs_of(CASES, tmp_path_factory.mktemp("factorizing"), text)


@pytest.mark.parametrize("name", CASES)
def test_what_is_stored_computes_what_the_run_computed(name: str, runs: dict[str, Run]) -> None:
    found = verified(runs[name].output, runs[name].witness)
    assert found.passed and found.modules_compressed == (0 if name == "llama dense" else len(runs[name].report.layers))


def test_dense_is_the_product_of_the_factors(runs: dict[str, Run]) -> None:
    opened, dense = dict(open_checkpoint(runs["llama"].output).dense()), tensors(runs["llama dense"].output)
    for layer in runs["llama"].report.layers:
        assert torch.equal(opened[f"{layer.name}.weight"], dense[f"{layer.name}.weight"])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.stored == "llmcomp"])
def test_what_is_stored_has_its_rank_and_is_smaller(name: str, runs: dict[str, Run]) -> None:
    run, kinds = runs[name], open_checkpoint(runs[name].output).kinds
    for layer in run.report.layers:
        kind, (rows, columns) = kinds[layer.name], layer.shape
        assert isinstance(kind, LowRank) and layer.bytes_after < layer.bytes_before
        step = next(step for step in CASES[name].steps if isinstance(step, FactorizeStep))
        if step.rank is not None:
            assert kind.rank == step.rank and kind.base is not None
        elif not step.overrides:
            exact = (step.ratio or 0.8) * rows * columns / (rows + columns)
            assert kind.rank == int(exact)
            assert f"rank {kind.rank} (" in layer.scheme


def test_overrides_have_their_own_ratio_or_rank(runs: dict[str, Run]) -> None:
    schemes, left = runs["llama overrides"].schemes(), runs["llama overrides"].left()
    assert schemes["model.layers.1.mlp.up_proj"] == "rank 42 (49%)"
    assert schemes["model.layers.1.mlp.down_proj"] == "rank 7 (8%)"
    assert "blocks:0" in left["model.layers.0.mlp.up_proj"]


def test_experts_are_not_updated_and_say_so(runs: dict[str, Run]) -> None:
    layers = runs["mixtral"].report.layers
    experts = [layer for layer in layers if ".experts." in layer.name]
    assert experts and all("experts are not updated" in (layer.fallback or "") for layer in experts)
    assert {layer.method for layer in experts} <= {"svd-llm", "asvd", "svd"}
    assert {layer.method for layer in layers if layer not in experts} == {"svd-llm updated"}
    assert {layer.fallback for layer in runs["albert"].report.layers} == {
        "not updated: the model runs one block several times, which is solved by what the source's reads"
    }


def test_the_report_says_what_was_done(runs: dict[str, Run]) -> None:
    assert runs["llama"].report.command == "factorize" and runs["llama int4"].report.command == "compress"
    assert {layer.method for layer in runs["llama int4"].report.layers} == {"svd-llm updated + gptq"}
    assert {layer.method for layer in runs["bert corrected"].report.layers} == {"gptq + svd-llm"}
    assert {layer.scheme for layer in runs["bert corrected"].report.layers} == {"int3 g128 + rank 8 of int8 channel"}
    assert any("fewer multiplications" in label for label in runs["llama"].report.labels)
    assert any("As large as before" in label for label in runs["llama dense"].report.labels)
    assert all(layer.error is not None and 0 < layer.error < 1 for layer in runs["llama"].report.layers)


def test_a_correction_lowers_the_error_of_what_it_corrects(runs: dict[str, Run], text: Path, tmp_path: Path) -> None:
    alone = quantize(runs["bert corrected"].source, tmp_path / "alone", recipe_of_case(text, Case(
        "bert", (QuantizeStep(bits=3),)
    )))  # fmt: skip
    errors = [{one.name: one.error for one in run.report.layers} for run in (runs["bert corrected"], alone)]
    first = [name for name in errors[0] if "layer.0.attention.self" in name]  # whose inputs are the same in both
    assert len(first) == 3 and all((errors[0][name] or 0) < 0.8 * (errors[1][name] or 0) for name in first)


@pytest.mark.parametrize("name", ["llama int4", "bert corrected"])
def test_a_broken_run_ends_bit_identical(name: str, runs: dict[str, Run], text: Path, tmp_path: Path) -> None:
    recipe = recipe_of_case(text, CASES[name])
    output = tmp_path / "again"
    broken_run(runs[name].source, output, recipe, 1)
    again = quantize(runs[name].source, output, recipe)
    assert again.report.resumed_blocks == 1
    assert hashes(output) == hashes(runs[name].output)


# --- what factors are fitted to ---


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Known windows: several times as many tokens as the widest input has columns."""
    path = tmp_path_factory.mktemp("windows") / "windows.safetensors"
    ids = torch.randint(8, VOCABULARY, (24, 64), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, path)
    return path


@pytest.fixture(scope="module")
def fitted(runs: dict[str, Run], windows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Run]:
    """{update: a run of float32 Llama on these windows}."""
    root, source = tmp_path_factory.mktemp("fitted"), runs["llama overrides"].source
    calibration = Calibration(str(windows), 24, 64)
    return {
        update: quantize(source, root / str(update), Recipe((FactorizeStep(ratio=0.5, update=update),), calibration,
                                                            format="llmcomp"))
        for update in (True, False)
    }  # fmt: skip


@pytest.mark.parametrize("name", ["layers.0.mlp.down_proj", "layers.1.self_attn.v_proj", "layers.1.mlp.up_proj"])
def test_factors_are_the_source_s_best_and_then_fitted_to_the_inputs_of_now(
    name: str, fitted: dict[bool, Run], windows: Path
) -> None:
    """Against least squares by singular value decomposition, with the inputs that plain transformers computes."""
    source = AutoModelForCausalLM.from_pretrained(fitted[True].source, dtype=torch.float32)
    compressed = llmcomp.load(fitted[True].output)
    ids, name = load_file(windows)["input_ids"], f"model.{name}"
    there, now = reads(source, ids, name), reads(compressed, ids, name)
    weight = source.get_submodule(name).weight.detach().double()
    low = compressed.get_submodule(name).compressed()
    left = torch.linalg.svd((there @ weight.T).T, full_matrices=False).U[:, : low.rank]
    start = left @ left.T @ weight
    # Ridge, from where the factors are: (outputs of the source) - X' start' = X' step'.
    ridge = (lowrank.REFIT_DAMPING * now.square().sum(0).mean()).sqrt() * torch.eye(now.shape[1], dtype=torch.float64)
    missing = (there @ weight.T - now @ start.T) @ left
    right = torch.linalg.lstsq(torch.cat((now, ridge)), torch.cat((missing, missing.new_zeros(len(ridge), low.rank))))
    wanted = start + left @ right.solution.T
    apart = float((low.dense().double() - wanted).norm() / wanted.norm())
    assert apart < 1e-3 < float((start - wanted).norm() / wanted.norm())
    layer = next(one for one in fitted[True].report.layers if one.name == name)
    some = slice(None, None, max(1, len(weight) // 128))  # rows that stand for all
    outputs = there @ weight[some].T
    lost = float((outputs - now @ low.dense()[some].double().T).square().sum() / outputs.square().sum())
    assert layer.error == pytest.approx(lost, rel=1e-3)


def test_with_equal_inputs_the_update_changes_nothing(fitted: dict[bool, Run]) -> None:
    """The first stage reads what it reads in the source model; a later one does not."""
    one, other = (dict(open_checkpoint(fitted[update].output).dense()) for update in (True, False))

    def apart(name: str) -> float:
        return float((one[name] - other[name]).norm() / other[name].norm())

    assert apart("model.layers.0.self_attn.q_proj.weight") < 1e-5
    assert apart("model.layers.1.self_attn.q_proj.weight") > 1e-3


def test_the_update_brings_a_block_s_outputs_nearer(fitted: dict[bool, Run], windows: Path) -> None:
    ids = load_file(windows)["input_ids"]
    with torch.no_grad():
        source = AutoModelForCausalLM.from_pretrained(fitted[True].source, dtype=torch.float32)(input_ids=ids).logits
        apart = {u: (llmcomp.load(run.output)(input_ids=ids).logits - source).norm() for u, run in fitted.items()}
    assert float(apart[True]) < 0.98 * float(apart[False])


# --- ranks under one budget ---

SHARED = FactorizeStep(ratio=0.6, ranks="balanced", overrides=(Override("o_proj", rank=5),))


def test_ranks_are_those_of_the_source_s_losses_under_one_budget(
    runs: dict[str, Run], windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against eigenvalues of the outputs' covariance as plain transformers computes them; resumed without measuring."""
    run = runs["llama overrides"]
    recipe = Recipe((SHARED,), Calibration(str(windows), 24, 64), format="llmcomp")
    output = tmp_path / "out"
    partial = broken_run(run.source, output, recipe, 1)
    measured = json.loads((partial / "ranks.json").read_text())
    monkeypatch.setattr(surveying.Pass, "run", None)  # a second measurement would fail
    made = quantize(run.source, output, recipe)
    assert made.report.resumed_blocks == 1

    source = AutoModelForCausalLM.from_pretrained(run.source, dtype=torch.float32)
    ids, spectra = load_file(windows)["input_ids"], {}
    for name in measured:
        weight = source.get_submodule(name).weight.detach().double()
        energies = torch.linalg.svdvals(reads(source, ids, name) @ weight.T).square()
        spectra[name] = balanced(Spectrum(energies, (weight.shape[0], weight.shape[1])), 0.6)
    sizes = {name: spectrum.shape[0] * spectrum.shape[1] for name, spectrum in spectra.items()}
    wanted = allocate(spectra, int(0.6 * sum(sizes.values())), 1)
    # Float32 sums may exchange single ranks that are worth the same.
    assert all(abs((measured[name] or 999) - (wanted[name] or 999)) <= 1 for name in wanted)
    assert len(set(measured.values())) > 4 and not any("o_proj" in name for name in measured)

    kinds = open_checkpoint(output).kinds
    spent = 0
    for layer in made.report.layers:
        kind = kinds[layer.name]
        assert isinstance(kind, LowRank) and kind.rank == (5 if "o_proj" in layer.name else measured[layer.name])
        spent += 0 if "o_proj" in layer.name else kind.rank * sum(layer.shape)
    dense = sum(sizes[name] for name, rank in measured.items() if rank is None)
    assert 0.59 * sum(sizes.values()) < spent + dense <= 0.6 * sum(sizes.values())
    assert verified(made.output, made.witness).passed
    (role,) = {role.schemes for role in roles(made.report) if role.role == "mlp"}
    assert re.fullmatch(r"rank \d+–\d+", role)


def test_a_budget_is_spent_without_text_where_the_method_reads_none() -> None:
    recipe = Recipe((FactorizeStep("svd", ranks="balanced"),), format="llmcomp")
    plan = plan_recipe(recipe, discover(build("llama")))
    assert plan.shared == "ranks" and not plan.assignment.calibrated


def test_what_no_rank_makes_smaller_stays_dense() -> None:
    adapter = discover(build("llama"))
    plan = plan_recipe(Recipe((SHARED,), format="llmcomp"), adapter, {"model.layers.0.mlp.up_proj": None})
    assert "stays dense" in plan.assignment.left["model.layers.0.mlp.up_proj"]
    assert "model.layers.0.mlp.up_proj" not in plan.assignment.tasks


# --- what cannot be ---


@pytest.mark.parametrize(
    ("steps", "format", "said"),
    [
        ((FactorizeStep(ratio=1.0),), "llmcomp", "--ratio 1.0 cannot be: it is the share of bytes kept"),
        ((FactorizeStep(ratio=-0.5),), "llmcomp", "--ratio -0.5 cannot be"),
        ((FactorizeStep(ratio=0.5, rank=8),), "llmcomp", "say the same thing"),
        ((FactorizeStep(rank=0),), "llmcomp", "a rank is at least 1"),
        ((FactorizeStep(rank=80),), "llmcomp", r"Rank 80 saves nothing on a matrix \[128, 128\]; take 1 to 63"),
        ((FactorizeStep(rank=500),), "llmcomp", r"Rank 500 is above the width of a matrix \[128, 128\]"),
        ((FactorizeStep("pca"),), "llmcomp", "method 'pca' is not one of svd-llm, asvd, svd"),
        ((FactorizeStep(targets=("embeddings",)),), "llmcomp", "looked up row by row"),
        ((FactorizeStep(targets=("convolutions",)),), "llmcomp", "'convolutions' matches no weight"),
        ((FactorizeStep(options={"alpha": 0.3}),), "llmcomp", "unknown key 'alpha'"),
        ((FactorizeStep(ranks="fair"),), "llmcomp", "choose uniform or balanced"),
        ((FactorizeStep(rank=8, ranks="balanced"),), "llmcomp", "leave --rank out"),
        ((FactorizeStep(ratio=0.001, ranks="balanced"),), "llmcomp", "smallest ranks of all 14 matrices take 4,096"),
        ((FactorizeStep(overrides=(Override("mlp", bits=8),)),), "llmcomp", "sets bits"),
        ((QuantizeStep(overrides=(Override("mlp", rank=8),)),), "llmcomp", "sets rank"),
        ((FactorizeStep(),), "compressed-tensors", "--format llmcomp holds their factors"),
        ((FactorizeStep(), QuantizeStep()), "compressed-tensors", "--format llmcomp holds their factors"),
        ((FactorizeStep(),), "bnb-nf4", "has no form for factors"),
        ((FactorizeStep(), SparsifyStep()), "llmcomp", "do not go together"),
        ((FactorizeStep(), QuantizeStep("signround")), "llmcomp", "signround learns from"),
        ((FactorizeStep(), QuantizeStep("awq")), "llmcomp", "awq scales what"),
        ((FactorizeStep(), QuantizeStep(bits=8, activations="int8-dynamic")), "llmcomp", "leave --activations out"),
        ((QuantizeStep(), FactorizeStep(ratio=0.5)), "llmcomp", "there is no ratio; give a rank"),
        ((QuantizeStep(), FactorizeStep()), "llmcomp", "there is no ratio; give a rank"),
        ((QuantizeStep(), FactorizeStep("asvd")), "llmcomp", "are those of svd-llm"),
        ((QuantizeStep(), FactorizeStep(update=True)), "llmcomp", "leave 'update: true' out"),
        ((QuantizeStep(), FactorizeStep(rank=400)), "llmcomp", r"rank 400 is above the width of a matrix \[128, 128\]"),
        ((QuantizeStep(bits=8), FactorizeStep(rank=120)), "llmcomp", "take a smaller rank"),
        ((QuantizeStep(targets=("mlp",)), FactorizeStep(rank=8)), "llmcomp", "there is nothing to correct"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(steps: tuple[Step, ...], format: str, said: str) -> None:
    recipe = Recipe(steps, format=format)
    with pytest.raises(BadRecipe, match=said) as caught:
        check(recipe)
        plan_recipe(recipe, discover(build("llama", dtype=torch.bfloat16)))
    assert "\n" not in str(caught.value)


def test_linears_of_a_class_of_their_own_are_refused_before_the_run() -> None:
    for steps in ((FactorizeStep(),), (QuantizeStep(),)):
        with pytest.raises(BadRecipe, match=r"FalconLinear, which computes in a way of its own.*take --format dense"):
            plan_recipe(Recipe(steps, format="llmcomp"), discover(build("falcon")))


def test_auto_beside_factors_takes_what_leaves_them_alone() -> None:
    recipe = Recipe((FactorizeStep(), QuantizeStep("auto", bits=2)), format="llmcomp")
    tasks = plan_recipe(recipe, discover(build("llama"))).assignment.tasks
    assert {task.methods for task in tasks.values()} == {"svd-llm updated + gptq"}


def test_the_plan_says_how_often_windows_are_computed() -> None:
    adapter = discover(build("llama"))
    found = {}
    for update in (True, False):
        step = FactorizeStep("svd", update=update)
        recipe = Recipe((step,), Calibration(samples=4, sequence_length=64), format="llmcomp")
        found[update] = prospect(adapter, recipe, (), 8 * 2**20).rows[0]
    assert [found[update].beside for update in (True, False)] == [True, False]
    recipe = Recipe((SHARED,), Calibration(samples=4, sequence_length=64), format="llmcomp")
    assert prospect(adapter, recipe, (), 8 * 2**20).rows[0].shared == "ranks"
    assert found[True].statistics and not found[False].statistics
    assert found[True].peak_memory > found[False].peak_memory


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_recipes_are_read_as_they_were_written(case: Case) -> None:
    recipe = Recipe(case.steps, format=case.stored)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_a_recipe_with_factors_is_stored_as_factors() -> None:
    assert Recipe.from_yaml("steps: [{kind: factorize}]").format == "llmcomp"
    assert Recipe.from_yaml("steps: [{kind: quantize}, {kind: factorize}]").format == "llmcomp"


def test_the_commands(runs: dict[str, Run], text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, output, saved = str(runs["bert"].source), str(tmp_path / "out"), str(tmp_path / "recipe.yaml")
    flags = ["--method", "asvd", "--ratio", "0.6", "--targets", "attention,mlp", "--skip", "blocks:0", "--update"]
    shared = ["--calibration", str(text), "--samples", "4", "--sequence-length", "16"]
    quick = ["--no-evaluate", "--no-verify"]
    assert main(["factorize", model, *flags, *shared, *quick, "--save-recipe", saved, "-o", output]) == 0
    printed = capfd.readouterr().out
    assert "rank " in printed and "llmcomp factorize" in printed
    report = Report.read(tmp_path / "out")
    assert parse(shlex.split(reproduce(report))[1:])["recipe"] == Path("llmcomp_recipe.yaml")
    assert main(["compress", model, "--recipe", saved, *quick, "-o", str(tmp_path / "again")]) == 0
    assert hashes(tmp_path / "again") == hashes(tmp_path / "out")
    capfd.readouterr()
    assert main(["plan", model, "--recipe", saved]) == 0
    assert "asvd ratio 0.6" in capfd.readouterr().out
    assert main(["factorize", model, "--rank", "999", "-o", str(tmp_path / "no")]) == 2
    assert "above the width" in capfd.readouterr().err
    assert not list(tmp_path.glob("*no*"))
    made = llmcomp.factorize(model, ratio=0.5, method="svd", output=tmp_path / "py", evaluate=False, verify=False)
    assert {layer.scheme for layer in made.report.layers} == {"rank 32 (50%)", "rank 42 (49%)"}
