"""Integers that are trained on their grid: what is written is what was trained, in the layout that it had."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import parse
from e2e_runs import LENGTH, hashes, quantize, tensors
from recovery_runs import SLOW, WIDE, Made, recover
from tiny import tiny
from torch import Tensor

import llmcomp
from llmcomp import Optimization, Teaching
from llmcomp.errors import BadCheckpoint, BadRecipe, LlmcompError, RunError
from llmcomp.formats.opening import open_checkpoint
from llmcomp.measure.load import load
from llmcomp.recipe import Calibration, Override, QuantizeStep, Recipe, SparsifyStep, Step
from llmcomp.report.schema import Report
from llmcomp.report.summary import reproduce
from llmcomp.training import trainer
from llmcomp.training.grids import Grids

pytestmark = pytest.mark.usefixtures("quick")

IDS = torch.arange(5, 29).view(2, 12)
WIDER = (Override("mlp", bits=3), Override("attention", bits=2, group_size=32))
W4 = QuantizeStep("rtn", group_size=64)
CASES: dict[str, tuple[str, tuple[Step, ...], str, torch.dtype]] = {
    "packed 2": ("llama", (replace(W4, bits=2, symmetric=False),), "llmcomp", torch.float32),
    "public 3": ("llama", (replace(W4, bits=3),), "compressed-tensors", torch.bfloat16),
    "embeddings": ("llama", (replace(W4, bits=8, group_size=None, overrides=(Override("embeddings", bits=4),)),),
                   "llmcomp", torch.float32),
    "conv1d of two widths": ("gpt2", (replace(W4, overrides=WIDER),), "compressed-tensors", torch.float32),
    "zero points of two widths": ("llama", (replace(W4, symmetric=False, overrides=WIDER),), "compressed-tensors",
                                  torch.float32),
    "encoder": ("bert", (replace(W4, bits=2),), "compressed-tensors", torch.float32),
    "experts": ("mixtral", (replace(W4, group_size=None),), "compressed-tensors", torch.float32),
    "activations": ("llama", (QuantizeStep("rtn", bits=8, group_size=None, activations="int8-dynamic"),), "llmcomp",
                    torch.float32),
    "sparse": ("llama", (SparsifyStep("magnitude"), W4), "llmcomp", torch.float32),
    "sparse in public": ("llama", (SparsifyStep("magnitude"), W4), "compressed-tensors", torch.float32),
}  # fmt: skip
DEFAULT = ("packed 2", "public 3", "conv1d of two widths", "sparse")
NAMES = [name if name in DEFAULT else pytest.param(name, marks=SLOW) for name in CASES]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Made:
    root = tmp_path_factory.mktemp("qat")

    def make(name: str) -> Path:
        model, steps, format, dtype = CASES[name]
        source = root / f"{model}-{dtype}"
        if not source.exists():
            tiny(model, source, tokenizer=True, dtype=dtype)
        return quantize(source, root / name.replace(" ", "-"), Recipe(steps, Calibration(str(text), 8, LENGTH),
                                                                     format=format)).output  # fmt: skip

    return Made(make)


def trained_logits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Of `IDS`, as the model computes them when its training ends, before anything is rounded for the file."""
    found: list[Tensor] = []
    settle: Callable[..., None] = Grids.settle

    def keep(self: Grids, model: Any) -> None:
        with torch.no_grad():
            wide = copy.deepcopy(model)
            for value in wide.parameters():  # and not the buffers: learned scales are rounded to their dtype
                value.data = value.float()
            found.append(wide(input_ids=IDS).logits)
        settle(self, model)

    monkeypatch.setattr(Grids, "settle", keep)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("learn_scales", [False, pytest.param(True, marks=SLOW)])
def test_what_is_written_is_what_was_trained(
    name: str, learn_scales: bool, made: Made, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integers change and lie as before; plain transformers reads what the training computed with."""
    found, output = trained_logits(monkeypatch), tmp_path / "out"
    report = recover(made[name], output, text, "qat", learn_scales=learn_scales)
    recovery = report.recovery
    assert recovery is not None and recovery.history[-1]["loss"] < recovery.history[0]["loss"]
    assert report.verification is not None and report.verification.passed
    before, after = tensors(made[name]), tensors(output)
    assert {key: (one.dtype, one.shape) for key, one in before.items()} == {
        key: (one.dtype, one.shape) for key, one in after.items()
    }
    assert report.format == Report.read(made[name]).format and open_checkpoint(output).kinds == open_checkpoint(
        made[name]
    ).kinds
    for key, one in before.items():
        same = torch.equal(one, after[key])
        if key.endswith("weight_scale"):
            assert same != learn_scales, key
        elif key.endswith(("zero_point", "indices", "shape", "input_scale")):
            assert same, key
        elif key.endswith("weight_packed"):
            assert not same or "expert" in key, key
    model = load(output).eval() if report.format == "compressed-tensors" else llmcomp.load(output)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits.float()
    exact = report.format == "compressed-tensors" and CASES[name][3] == torch.float32
    assert float((logits - found[0]).norm() / found[0].norm()) < (1e-5 if exact else 2e-2)
    words = parse(shlex.split(reproduce(report))[1:])
    assert words["method"] == "qat" and words["learn_scales"] is learn_scales


@pytest.mark.parametrize("name", ["sparse", pytest.param("sparse in public", marks=SLOW)])
def test_what_was_removed_stays_removed(name: str, made: Made, text: Path, tmp_path: Path) -> None:
    recover(made[name], tmp_path / "out", text, "qat", learn_scales=True)
    before, after = (open_checkpoint(path) for path in (made[name], tmp_path / "out"))
    for layer in Report.read(made[name]).layers:
        old, new = before.quantized(layer.name), after.quantized(layer.name)
        removed = old.dense() == 0 if old.mask is None else ~old.mask  # a kept one may have been rounded to zero
        assert bool(removed.any()) and bool((new.dense()[removed] == 0).all())
        assert not torch.equal(old.values, new.values)


def test_the_bits_that_a_report_names_are_kept_in_wider_words(made: Made, text: Path, tmp_path: Path) -> None:
    """Of two widths a Conv1D's file has one; what was made of 2 bits has four values a group after training, too."""
    name = "conv1d of two widths"
    recover(made[name], tmp_path / "out", text, "qat")
    opened = open_checkpoint(tmp_path / "out")
    bits = {layer.name: 2 if "int2" in layer.scheme else 3 for layer in Report.read(made[name]).layers}
    for module, held in bits.items():
        values = opened.quantized(module).values
        assert -(1 << (held - 1)) <= int(values.min()) and int(values.max()) < 1 << (held - 1)
    assert set(bits.values()) == {2, 3} and {scheme.bits for scheme in opened.schemes.values()} == {3}


def test_without_the_dense_model_training_starts_from_the_integers(made: Made, text: Path, tmp_path: Path) -> None:
    """And from there it computes the same at its first step."""
    alone = Path(shutil.copytree(made["packed 2"], tmp_path / "alone"))
    report = Report.read(alone)
    (alone / "llmcomp_report.json").write_text(replace(report, source=str(tmp_path / "gone")).to_json())
    first = []
    for directory in (made["packed 2"], alone):
        report = recover(directory, tmp_path / f"{directory.name}-out", text, "qat")
        assert report.recovery is not None
        first.append(report.recovery.history[0]["loss"])
        assert any("starts from the integers alone" in note for note in report.notes) == (directory == alone)
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    one, other = (tensors(tmp_path / f"{directory.name}-out") for directory in (made["packed 2"], alone))
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_a_teacher_is_followed(made: Made, text: Path, tmp_path: Path) -> None:
    source = Report.read(made["packed 2"]).source
    report = recover(
        made["packed 2"], tmp_path / "out", text, "qat", teaching=Teaching(source, 1.0, 1.0), evaluate=True,
        eval_data=str(text), optimization=replace(WIDE, learning_rate=1e-3, steps=16),
    )  # fmt: skip
    found = report.recovery
    assert found is not None and report.divergence is not None and found.divergence is not None
    assert report.divergence.kl_mean.value < found.divergence.kl_mean.value and found.won_back["kl_mean"] > 0


@SLOW
def test_a_broken_run_ends_bit_identical(made: Made, text: Path, tmp_path: Path) -> None:
    def stop(self: Any, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if state.global_step == 7:
            raise RunError("stopped by the test")

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    recover(made["packed 2"], whole, text, "qat", learn_scales=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Watch, "on_step_end", stop)
        with pytest.raises(RunError, match="stopped by the test"):
            recover(made["packed 2"], broken, text, "qat", learn_scales=True)
    report = recover(made["packed 2"], broken, text, "qat", learn_scales=True)
    assert report.recovery is not None and report.recovery.resumed == 6
    assert hashes(broken) == hashes(whole)


def test_a_checkpoint_that_says_other_weights_is_refused_in_verification(
    made: Made, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fresh process would see integers that are not those that were trained."""
    tensors_of = Grids.tensors

    def shifted(self: Grids, model: Any) -> dict[str, Tensor]:
        found = tensors_of(self, model)
        key = next(key for key in found if key.endswith("weight_packed"))
        found[key] = found[key].flip(0).contiguous()
        return found

    monkeypatch.setattr(Grids, "tensors", shifted)
    with pytest.raises(RunError, match="has other values than the model that was compressed"):
        recover(made["packed 2"], tmp_path / "out", text, "qat")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "more", "error", "said"),
    [
        ("llama 2:4", {}, BadRecipe, "holds none; take --method full"),
        ("dense int4", {}, BadRecipe, "dense weights, which do not say their grid; take --method lora"),
        ("llama int4", {"method": "full"}, BadRecipe, "integers, which have no gradients; take --method qat or lora"),
        ("llama int4", {"method": "lora", "learn_scales": True}, BadRecipe, "--learn-scales goes with --method qat"),
        ("all lies", {}, BadCheckpoint, "in another way than llmcomp writes it"),
        ("one lies", {}, BadCheckpoint, "off the grid of int2 g64, which its report says it has"),
        ("llama int4", {"optimization": Optimization(learning_rate=3.0)}, BadRecipe, "--learning-rate 3.0 cannot be"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(
    name: str, more: dict[str, Any], error: type[LlmcompError], said: str, compressed: Made, made: Made, text: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    which = {"one lies": made["conv1d of two widths"]}
    directory = which.get(name) or compressed[name if name.startswith("llama") else "llama int4"]
    if name == "dense int4":
        directory = quantize(Path(Report.read(directory).source), tmp_path / "dense",
                             Recipe((W4,), Calibration(str(text), 8, LENGTH), format="dense")).output  # fmt: skip
    if "lies" in name:
        directory = Path(shutil.copytree(directory, tmp_path / "lies"))
        report = Report.read(directory)
        last = {"one lies": report.layers[-1].name}.get(name, "")
        layers = [replace(layer, scheme=re.sub(r"int\d", "int2", layer.scheme)) if layer.name.endswith(last) else layer
                  for layer in report.layers]  # fmt: skip
        (directory / "llmcomp_report.json").write_text(replace(report, layers=layers).to_json())
    output = tmp_path / "out"
    with pytest.raises(error, match=said.replace("(", r"\(")):
        llmcomp.recover(directory, str(text), **{"method": "qat", "output": output, "evaluate": False,
                                                 "sequence_length": LENGTH, "samples": 8, **more})  # fmt: skip
    assert not output.exists()
