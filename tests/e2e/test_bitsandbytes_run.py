"""nf4 and int8 end to end: what a fresh process loads, what a kill leaves, what is refused, and the forward trap."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doomed import Doom
from e2e_command import Command, edit_json, untouched
from e2e_runs import Run, hashes, quantize, reload, tensors
from reference import bnb_float64 as reference
from safetensors.torch import load_file, save_file
from tiny import tiny
from torch import Tensor

from llmcomp import api, bnb
from llmcomp.adapters.discover import discover, skeleton
from llmcomp.calibration.data import read_texts
from llmcomp.cli.main import main
from llmcomp.errors import VerificationFailed
from llmcomp.formats.save import partial_of
from llmcomp.formats.verify import check
from llmcomp.measure.run import Settings
from llmcomp.pipeline.plan import prospect
from llmcomp.recipe import Override, Recipe, step_of

FORMS = {"nf4": "bnb-nf4", "int8": "bnb-int8"}
NAMES = ("llama", "bert", "gpt2")
CASES = [f"{name}-{kind}" for name in NAMES for kind in FORMS]
PARTS = [f"part-{kind}" for kind in FORMS]  # an untied Llama: its head and one block of two
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def recipe(form: str, **step: Any) -> Recipe:
    return Recipe((step_of(form, **step),), format=form)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bnb-sources")
    return {
        name: tiny(name, root / name, tokenizer=True, dtype=torch.bfloat16 if name == "bert" else torch.float32)
        for name in (*NAMES, "llama-untied")
    }


@pytest.fixture(scope="module")
def runs(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("bnb")
    made = {
        f"{name}-{kind}": quantize(sources[name], root / f"{name}-{kind}", recipe(form))
        for name in NAMES
        for kind, form in FORMS.items()
    }
    step = {"targets": ("attention", "mlp", "head"), "overrides": (Override("blocks:1", skip=True),)}
    for kind, form in FORMS.items():
        made[f"part-{kind}"] = quantize(sources["llama-untied"], root / f"part-{kind}", recipe(form, **step))
    return made


@pytest.fixture(scope="module")
def reloaded(runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
    return reload(runs)


# --- what was written ---


@pytest.mark.parametrize("case", [*CASES, *PARTS])
def test_a_fresh_process_loads_the_model_that_was_compressed(
    case: str, runs: dict[str, Run], reloaded: dict[str, dict[str, Any]]
) -> None:
    found = reloaded[case]
    assert found["imported"] == [], "llmcomp took part in the plain loading"
    assert found["account"] == {}, "keys missing, unexpected or mismatched"
    assert found["class"] == runs[case].report.architecture
    assert found["from_witness"] < (0.05 if case.endswith("int8") else 0.02)
    assert 1e-4 < found["from_original"] < (0.05 if case.endswith("int8") else 0.35)
    assert found["verification"]["passed"], found["verification"]["checks"]
    assert found["verification"]["modules_compressed"] == len(runs[case].report.layers)


@pytest.mark.parametrize("case", CASES)
def test_weights_and_errors_are_the_papers(case: str, runs: dict[str, Run]) -> None:
    """The report's error, and what the files decode to, against float64."""
    run, (name, kind) = runs[case], case.split("-")
    before, stored = tensors(run.source), tensors(run.output)
    papers = reference.nf4 if kind == "nf4" else reference.int8
    for layer in (run.report.layers[0], run.report.layers[-1]):
        dense = before[f"{layer.name}.weight"]
        dense = dense.t().contiguous() if name == "gpt2" else dense
        wanted = torch.from_numpy(papers(dense)[0])
        own = {key.removeprefix(f"{layer.name}."): value for key, value in stored.items() if key.startswith(layer.name)}
        own.pop("bias", None)
        got = bnb.Stored(bnb.NF4 if kind == "nf4" else bnb.INT8, dense.dtype).decode(own)
        encoded = bnb.encode(bnb.NF4 if kind == "nf4" else bnb.INT8, dense)
        assert set(own) == set(encoded) and all(torch.equal(own[key], encoded[key]) for key in own)
        ties = 3e-3 if name == "bert" else 1e-3  # one integer to the other side of a tie is 2e-4; bfloat16 rounds, too
        assert float((got.double() - wanted).norm() / wanted.norm()) < ties
        error = float((got.double() - dense.double()).square().sum() / dense.double().square().sum())
        assert layer.error == pytest.approx(error, rel=1e-3)
        assert layer.bytes_after == sum(value.nbytes for value in own.values())


@pytest.mark.parametrize("case", CASES)
def test_the_report_is_like_the_others(case: str, runs: dict[str, Run]) -> None:
    report = runs[case].report
    kind = case.split("-")[1]
    assert {layer.scheme for layer in report.layers} == {"nf4 g64" if kind == "nf4" else "int8 row"}
    assert {layer.method for layer in report.layers} == {"bitsandbytes"}
    assert {layer.role for layer in report.layers} == {"attention", "mlp"}
    assert all(layer.error is not None and 0 < layer.error < 0.02 for layer in report.layers)
    assert report.size_after is not None and report.size_before is not None
    assert report.size_after.parameters == report.size_before.parameters
    assert report.size_after.bytes_on_disk < (0.75 if kind == "nf4" else 0.9) * report.size_before.bytes_on_disk
    assert {"embeddings not targeted", "head not targeted"} <= set(runs[case].left().values())
    assert "bitsandbytes" in report.machine.versions


@pytest.mark.parametrize("case", CASES)
def test_dense_parts_are_the_source_s(case: str, runs: dict[str, Run]) -> None:
    before, after = tensors(runs[case].source), tensors(runs[case].output)
    packed = {f"{layer.name}.weight" for layer in runs[case].report.layers}
    dense = {key for key in after if key not in packed and not key.endswith(bnb.BESIDE)}
    assert dense == set(before) - packed
    assert all(torch.equal(after[key], before[key]) for key in dense)


@pytest.mark.parametrize("case", ["llama-nf4", "gpt2-int8"])
def test_plan_says_the_bytes(case: str, runs: dict[str, Run]) -> None:
    kind = case.split("-")[1]
    seen = prospect(discover(skeleton(runs[case].source)), recipe(FORMS[kind]), (8, 4), 2**20)
    written = sum(file.stat().st_size for file in runs[case].output.glob("*.safetensors"))
    assert len(seen.rows) == 1 and seen.rows[0].method == "bitsandbytes"
    assert seen.rows[0].bytes_after == pytest.approx(written, rel=0.01)
    assert seen.rows[0].moment == "converting" and seen.rows[0].statistics == 0


def test_the_base_model_loads_too(runs: dict[str, Run]) -> None:
    """AutoModel, as sentence encoders use it: the same hidden states, and a pooler that no file holds."""
    from transformers import AutoModel, AutoModelForMaskedLM

    output, ids = runs["bert-nf4"].output, torch.tensor([[2, 40, 41, 3]])
    with torch.no_grad():
        base = AutoModel.from_pretrained(output).eval()(input_ids=ids).last_hidden_state
        whole = AutoModelForMaskedLM.from_pretrained(output).eval().bert(input_ids=ids).last_hidden_state
    assert torch.equal(base, whole)


@pytest.mark.parametrize("case", PARTS)
def test_skips_and_an_untied_head(case: str, runs: dict[str, Run]) -> None:
    run = runs[case]
    assert {layer.name.split(".")[2] for layer in run.report.layers if layer.block is not None} == {"0"}
    assert "lm_head" in run.schemes() and len(run.schemes()) == 8
    assert sum("skipped" in why for why in run.left().values()) == 7


def test_evaluate_measures_it(runs: dict[str, Run], text: Path) -> None:
    run = runs["llama-int8"]
    settings = Settings(windows=2, cost=False)
    found = api.evaluate(run.output, against=run.source, data=read_texts(str(text)), settings=settings)
    assert found.after is not None and found.before is not None and found.divergence is not None
    assert 0 < found.divergence.kl_mean.value < 0.05
    dense = tensors(run.source)
    matrices = [value for value in dense.values() if value.dim() > 1]
    zeros = sum(int((value == 0).sum()) for value in matrices) / sum(value.numel() for value in matrices)
    assert zeros <= found.after.sparsity < 0.05


# --- saved before any forward ---


@pytest.fixture
def relays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with AVX512-BF16, where the first forward lays 4-bit weights out for the kernel there."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


def converted(run: Run) -> Any:
    """The run's model as transformers makes it of the source."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = json.loads((run.output / "config.json").read_text())["quantization_config"]
    loading = {"quantization_config": BitsAndBytesConfig.from_dict(config), "device_map": {"": "cpu"}}
    return AutoModelForCausalLM.from_pretrained(run.source, **loading).eval()


def saved(model: Any, directory: Path) -> dict[str, Tensor]:
    model.save_pretrained(directory)
    return tensors(directory)


def test_a_forward_before_the_save_corrupts_it(runs: dict[str, Run], tmp_path: Path, relays: None) -> None:
    """The trap itself: scales come back transposed and as bfloat16, so that weights decode to others."""
    model = converted(runs["llama-nf4"])
    before = saved(model, tmp_path / "before")
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    after = saved(model, tmp_path / "after")
    whole = tensors(runs["llama-nf4"].output)
    assert set(whole) == set(before) and all(torch.equal(before[key], whole[key]) for key in whole)
    assert after[f"{UP}.weight.absmax"].dtype == torch.bfloat16
    assert after[f"{UP}.weight.absmax"].shape != before[f"{UP}.weight.absmax"].shape


def test_a_run_saves_before(
    sources: dict[str, Path], runs: dict[str, Run], tmp_path: Path, relays: None
) -> None:
    run = quantize(sources["llama"], tmp_path / "q", recipe("bnb-nf4"))
    assert hashes(run.output) == hashes(runs["llama-nf4"].output)
    assert check(run.output, run.witness, stream=True).passed


def test_verification_refuses_the_trap(runs: dict[str, Run], tmp_path: Path, relays: None) -> None:
    run = runs["llama-nf4"]
    model = converted(run)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    broken = Path(shutil.copytree(run.output, tmp_path / "broken"))
    model.save_pretrained(broken)
    for stream in (False, True):
        with pytest.raises(VerificationFailed):
            check(broken, run.witness, stream)


# --- damage ---


def flip(directory: Path, key: str) -> None:
    edit(directory, lambda held: held[key].view(-1).view(torch.uint8)[1].bitwise_xor_(1 << 5))


def edit(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = directory / "model.safetensors"
    held = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(held)
    save_file(held, path, metadata={"format": "pt"})


def settings(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit_json(directory / "config.json", lambda config: change(config["quantization_config"]))


def dense(directory: Path, name: str) -> None:
    """A module as it was, in file and config.json alike."""

    def change(held: dict[str, Tensor]) -> None:
        for key in [key for key in held if key.startswith(f"{name}.")]:
            del held[key]
        held[f"{name}.weight"] = torch.zeros(128, 128)

    edit(directory, change)
    settings(directory, lambda found: found["llm_int8_skip_modules"].append(name))


DAMAGES: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "a nibble": ("nf4", f"{Q}.weight has other values", lambda d: flip(d, f"{Q}.weight")),
    "a scale": ("nf4", f"{Q}.weight has other values", lambda d: flip(d, f"{Q}.weight.absmax")),
    "an integer": ("int8", f"{Q}.weight has other values", lambda d: flip(d, f"{Q}.weight")),
    "a row's scale": ("int8", f"{Q}.weight has other values", lambda d: flip(d, f"{Q}.SCB")),
    "a norm": ("int8", "model.norm.weight has other values", lambda d: flip(d, "model.norm.weight")),
    "no scales": ("nf4", "fails|cannot be decoded", lambda d: edit(d, lambda h: h.pop(f"{Q}.weight.absmax"))),
    "no scale": ("int8", f"{Q} is compressed by config.json", lambda d: edit(d, lambda h: h.pop(f"{Q}.SCB"))),
    "the other kind": (
        "nf4",
        "is compressed by config.json, but not stored as int8",
        lambda d: settings(d, lambda s: s.update(load_in_4bit=False, load_in_8bit=True)),
    ),
    "a skip too many": (
        "nf4",
        f"{Q} is stored as nf4, but not compressed by config.json",
        lambda d: settings(d, lambda s: s["llm_int8_skip_modules"].append(Q)),
    ),
    "a skip too few": (
        "int8",
        "lm_head is compressed by config.json, but not stored as int8",
        lambda d: settings(d, lambda s: s["llm_int8_skip_modules"].remove("lm_head")),
    ),
    "no section": (
        "nf4",
        "is planned to be, but not stored compressed",
        lambda d: edit_json(d / "config.json", lambda c: c.pop("quantization_config")),
    ),
    "a module left dense": ("nf4", f"{Q} is planned to be, but not stored", lambda d: dense(d, Q)),
}


@pytest.mark.parametrize("stream", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused(name: str, stream: bool, runs: dict[str, Run], tmp_path: Path) -> None:
    kind, said, damage = DAMAGES[name]
    run = runs[f"llama-{kind}"]
    directory = Path(shutil.copytree(run.output, tmp_path / "q"))
    damage(directory)
    with pytest.raises(VerificationFailed, match=said) as caught:
        check(directory, run.witness, stream)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_decoded_one_by_one(case: str, runs: dict[str, Run]) -> None:
    """As where the dense model does not fit into memory."""
    found = check(runs[case].output, runs[case].witness, stream=True)
    assert found.passed and found.streamed and found.modules_compressed == len(runs[case].report.layers)


# --- kills ---


def test_a_killed_run_publishes_nothing_and_starts_afresh(
    sources: dict[str, Path], runs: dict[str, Run], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    doom = Doom(tmp_path_factory.mktemp("doom"))

    def arguments(output: Path) -> list[str]:
        more = ["--format", "bnb-nf4", "--no-evaluate", "--no-verify"]
        return ["quantize", str(sources["llama"]), "-o", str(output), *more]

    whole, output = tmp_path / "whole" / "doomed", tmp_path / "killed" / "doomed"
    whole.parent.mkdir()
    output.parent.mkdir()
    assert doom.run(arguments(whole), whole.name) == 0
    assert doom.run(arguments(output), output.name, doom.moments() // 2) == -signal.SIGKILL
    assert partial_of(output).exists() and not output.exists()
    assert main(arguments(output)) == 0
    assert hashes(output) == hashes(whole) == hashes(runs["llama-nf4"].output)
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name]
    assert json.loads((output / "llmcomp_report.json").read_text())["resumed_blocks"] == 0


# --- requests that contradict the format ---


@pytest.mark.parametrize("form", FORMS.values())
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "gptq"], "method gptq contradicts --format"),
        (["--bits", "3"], "bits 3 contradicts --format"),
        (["--group-size", "32"], "group_size 32 contradicts --format"),
        (["--asymmetric"], "--asymmetric contradicts --format"),
        (["--calibration", "sample"], "reads no text"),
        (["--samples", "4"], "reads no text"),
        (["--override", "q_proj bits=2"], "override of q_proj contradicts --format"),
        (["--override", "mlp method=rtn"], "override of mlp contradicts --format"),
        (["--target", "embeddings"], "no embeddings that can be saved"),
        (["--target", "head"], "lm_head shares its storage with the embeddings"),
        (["--target", "nonsense"], "matches no weight"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(
    form: str, flags: list[str], said: str, llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "q"
    for verb in (["quantize", str(llama), "-o", str(output)], ["plan", str(llama)]):
        status = main([*verb, "--format", form, *flags])
        told = capfd.readouterr().err
        assert status == 2 and told.count("llmcomp: ") == 1 and said in told and "Traceback" not in told
    assert not output.exists() and not partial_of(output).exists()


def test_too_little_memory(command: Command, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", lambda: Little)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe("bnb-nf4").to_yaml())
    said = command.refused(2, llama, "--recipe", str(path), "--no-evaluate", "--no-verify")
    assert "needs the whole model in memory" in said and untouched(command)


def test_not_a_number_is_named(llama: Path, command: Command, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "nan"))
    edit(model, lambda held: held[f"{UP}.weight"][3, 4].fill_(float("nan")))
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe("bnb-int8").to_yaml())
    assert f"{UP}.weight" in command.refused(1, model, "--recipe", str(path), "--no-evaluate", "--no-verify")


def test_the_recipe_repeats_the_run(runs: dict[str, Run]) -> None:
    read = Recipe.load(runs["llama-nf4"].output / "llmcomp_recipe.yaml")
    assert read == recipe("bnb-nf4")
    bare = Recipe.from_yaml("format: bnb-int8\nsteps: [{kind: quantize}]")
    assert bare == recipe("bnb-int8")
    assert dataclasses.replace(bare, format="bnb-nf4") != recipe("bnb-nf4")
