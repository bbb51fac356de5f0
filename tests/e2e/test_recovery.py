"""What was compressed, trained in the form that it has: masks that hold, adapters beside integers, runs that resume to
the same bits, and one sentence for what cannot be."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import parse
from e2e_runs import LENGTH, hashes, quantize, tensors
from packed import packed
from tiny import tiny
from torch import Tensor

import llmcomp
from llmcomp import Lora, Optimization, Teaching, api, lora, training_run
from llmcomp.calibration.data import read_texts
from llmcomp.cli.main import main
from llmcomp.errors import NumericalError, RunError
from llmcomp.formats.opening import open_checkpoint
from llmcomp.formats.save import partial_of
from llmcomp.formats.verify import check
from llmcomp.kinds import LowRank, Sparse
from llmcomp.measure.load import load_tokenizer, task_of
from llmcomp.recipe import Calibration, QuantizeStep, Recipe, SparsifyStep, Step
from llmcomp.report.schema import Recovery, Report
from llmcomp.report.summary import reproduce, won_back
from llmcomp.training import trainer
from llmcomp.training.data import collator, samples_of

STEPS, WIDE = 8, Optimization(learning_rate=2e-3, steps=8, batch_size=4, save_every=3)
SLOW = pytest.mark.slow
INT4, RANKS = QuantizeStep("rtn", group_size=64, symmetric=False), "model.layers.1"
MADE: dict[str, tuple[str, tuple[Step, ...], str, torch.dtype]] = {
    "llama 2:4": ("llama", (SparsifyStep("wanda"),), "dense", torch.float32),
    "llama packed 2:4": ("llama", (SparsifyStep("magnitude"),), "llmcomp", torch.bfloat16),
    "gpt2 60%": ("gpt2", (SparsifyStep("magnitude", "unstructured", 0.6),), "dense", torch.float32),
    "mixtral 4:8": ("mixtral", (SparsifyStep("magnitude", "4:8"),), "dense", torch.float32),
    "llama int4": ("llama", (INT4,), "compressed-tensors", torch.bfloat16),
    "llama 2:4 int4": ("llama", (SparsifyStep("magnitude"), INT4), "llmcomp", torch.float32),
    "bert int8": ("bert", (QuantizeStep("rtn", bits=8),), "llmcomp", torch.float32),
    "classifier 2:4": ("bert-classifier", (SparsifyStep("magnitude"),), "dense", torch.float32),
}
DEFAULT = [
    ("llama 2:4", "full"), ("llama 2:4", "lora"), ("llama packed 2:4", "full"), ("gpt2 60%", "lora"),
    ("llama int4", "lora"), ("bert int8", "lora"), ("classifier 2:4", "full"), ("llama ranks", "full"),
]  # fmt: skip
FURTHER = [
    ("llama packed 2:4", "lora"), ("gpt2 60%", "full"), ("mixtral 4:8", "full"), ("llama 2:4 int4", "lora"),
    ("classifier 2:4", "lora"), ("llama ranks", "lora"),
]  # fmt: skip
CASES = [*DEFAULT, *(pytest.param(*case, marks=pytest.mark.slow) for case in FURTHER)]
SPARSE = [case for case in CASES if any(mark in str(case) for mark in (":", "%"))]


class Made(dict[Any, Path]):
    """Directories by name, each made when it is first asked for."""

    def __init__(self, make: Callable[[Any], Path]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: Any) -> Path:
        self[name] = self._make(name)
        return self[name]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Checkpoints are verified in this process, and pages are not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "verify", check)
        patch.setattr(training_run, "render", lambda report: "<!doctype html>")
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recovery")


@pytest.fixture(scope="module")
def rows(root: Path) -> Path:
    """Rows with labels 0 to 2, by their first words."""
    path = root / "rows.jsonl"
    made = [{"text": f"{word} return the value {n}", "label": label}
            for n in range(8) for label, word in enumerate(("list", "string", "number"))]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compressed(root: Path, text: Path) -> Made:
    def make(name: str) -> Path:
        if name == "llama ranks":
            return of_two_factors(root / "ranks", found["llama 2:4"])
        model, steps, format, dtype = MADE[name]
        source = root / f"{model}-{dtype}"
        if not source.exists():
            tiny(model, source, tokenizer=True, dtype=dtype)
        recipe = Recipe(steps, Calibration(str(text), 8, LENGTH), format=format)
        return quantize(source, root / name.replace(" ", "-").replace("%", ""), recipe).output

    found = Made(make)
    return found


def of_two_factors(directory: Path, other: Path) -> Path:
    """Factors of random numbers, with a report made of another one."""
    kinds = {"up_proj": LowRank(8), "q_proj": LowRank(16)}
    packed("llama", directory, lambda name: kinds.get(name.rpartition(".")[2]))
    report = Report.read(other)
    chosen = [layer for layer in report.layers if layer.name.endswith(tuple(kinds))]
    layers = [replace(one, scheme=kinds[one.name.rpartition(".")[2]].label) for one in chosen]
    (directory / "llmcomp_report.json").write_text(replace(report, layers=layers, source="gone").to_json())
    return directory


def recover(directory: Path, output: Path, data: Path, method: str, **more: Any) -> Report:
    settings = {
        "method": method, "sequence_length": LENGTH, "samples": 24, "optimization": WIDE, "lora": Lora(4),
        "evaluate": False, "output": output, **more,
    }  # fmt: skip
    return api.recover(directory, str(data), **settings).report


def loss_of(directory: Path, data: Path) -> float:
    """On what was trained on, as a reader of the checkpoint has it."""
    model, tokenizer = llmcomp.load(directory), load_tokenizer(directory)
    task = task_of(directory)
    samples = samples_of(read_texts(str(data)), tokenizer, model, task, length=LENGTH, count=24, seed=0)
    torch.manual_seed(0)
    batch = collator(task, tokenizer)([samples[n] for n in range(len(samples))])
    objective = trainer.Objective()
    with torch.no_grad():
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "scored")}
        return float(objective.loss(model(**inputs).logits, batch))


@pytest.fixture(scope="module")
def recovered(compressed: Made, root: Path, text: Path, rows: Path) -> Made:
    def make(case: tuple[str, str]) -> Path:
        name, method = case
        output = root / f"{compressed[name].name}-{method}"
        recover(compressed[name], output, rows if "classifier" in name else text, method)
        return output

    return Made(make)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_reader_finds_what_was_trained(
    name: str, method: str, compressed: Made, recovered: Made, text: Path, rows: Path
) -> None:
    case = name, method
    report, data = Report.read(recovered[case]), rows if "classifier" in name else text
    assert report.command == "recover" and report.recovery is not None and report.recovery.steps == STEPS
    assert report.verification is not None and report.verification.passed
    assert parse(shlex.split(reproduce(report))[1:])["samples"] == 24
    assert report.layers and {layer.scheme for layer in report.layers} == {
        layer.scheme for layer in Report.read(compressed[case[0]]).layers
    }
    assert loss_of(recovered[case], data) < loss_of(compressed[case[0]], data) - 1e-3


@pytest.mark.parametrize(("name", "method"), SPARSE)
def test_what_was_removed_stays_removed(name: str, method: str, compressed: Made, recovered: Made) -> None:
    case = name, method
    before, after = (dict(open_checkpoint(path).dense()) for path in (compressed[case[0]], recovered[case]))
    assert before.keys() == after.keys()
    for layer in Report.read(compressed[case[0]]).layers:
        old, new = before[f"{layer.name}.weight"], after[f"{layer.name}.weight"]
        assert bool((new[old == 0] == 0).all()) and bool((old == 0).any())
        integers = "int4" in layer.scheme
        assert torch.equal(old, new) if integers else not torch.equal(old, new), layer.name


def test_places_of_packed_weights_stay(compressed: Made, recovered: Made) -> None:
    directories = compressed["llama packed 2:4"], recovered["llama packed 2:4", "full"]
    before, after = (open_checkpoint(one) for one in directories)
    assert before.kinds == after.kinds and all(isinstance(kind, Sparse) for kind in after.kinds.values())
    for name in before.tensors:
        if name.endswith("weight_indices"):
            assert torch.equal(before.tensor(name), after.tensor(name))


def test_lora_leaves_what_it_does_not_target(
    compressed: Made, recovered: Made, root: Path, text: Path
) -> None:
    old, new = tensors(compressed["llama 2:4"]), tensors(recovered["llama 2:4", "lora"])
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"{layer.name}.weight" for layer in Report.read(compressed["llama 2:4"]).layers}
    output = root / "values"
    recover(compressed["llama 2:4"], output, text, "lora", lora=Lora(4, targets=("v_proj",)))
    values = tensors(output)
    assert all(torch.equal(old[name], values[name]) != name.endswith("v_proj.weight") for name in old)


_READ = """
import json, sys, torch
{}
for directory in json.loads(sys.argv[1]):
    model = load(directory).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(5, 29).view(2, 12)).logits.float(), directory + "/{}.pt")
"""
_PLAIN = """
from peft import PeftModel
from transformers import AutoModelForCausalLM
def load(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    model(input_ids=torch.ones(1, 1, dtype=torch.long))
    assert "llmcomp" not in sys.modules
    return PeftModel.from_pretrained(model, directory + "/adapter")
"""
_OURS = "from llmcomp import load"


def read_by(head: str, kind: str, directories: list[Path]) -> None:
    """Logits of each directory in a fresh process, as <kind>.pt in it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    program = [sys.executable, "-c", _READ.format(head, kind), json.dumps([str(one) for one in directories])]
    subprocess.run(program, env=environment, check=True, capture_output=True, timeout=300)


def logits_of(directory: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = llmcomp.load(directory)(input_ids=torch.arange(5, 29).view(2, 12)).logits.float()
    return found


def test_adapters_beside_packed_weights_in_a_fresh_process(recovered: Made) -> None:
    directories = [recovered["llama int4", "lora"], recovered["bert int8", "lora"]]
    read_by(_OURS, "ours", directories)
    for directory in directories:
        assert torch.equal(torch.load(directory / "ours.pt"), logits_of(directory))


@SLOW
def test_compressed_tensors_with_an_adapter_need_nothing_of_llmcomp(recovered: Made) -> None:
    directory = recovered["llama int4", "lora"]
    read_by(_PLAIN, "plain", [directory])
    wanted = logits_of(directory)
    assert float((torch.load(directory / "plain.pt") - wanted).norm() / wanted.norm()) < 3e-2  # packed kernels, bf16


def test_packed_weights_are_copied_to_the_bit(
    compressed: Made, recovered: Made
) -> None:
    for name in ("llama int4", "bert int8"):
        assert hashes(recovered[name, "lora"]) == hashes(compressed[name])
        assert (recovered[name, "lora"] / lora.FOLDER / lora.WEIGHTS).is_file()


# --- a run that ends early ---


def stopping(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    def stop(self: Any, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if state.global_step == step:
            raise RunError("stopped by the test")

    monkeypatch.setattr(trainer.Watch, "on_step_end", stop)


@pytest.mark.parametrize(
    ("name", "method", "more"),
    [("bert int8", "lora", {"accumulate": 2}), pytest.param("classifier 2:4", "full", {"steps": 8}, marks=SLOW),
     pytest.param("llama 2:4", "lora", {"evaluate_every": 2, "patience": 2, "save_every": None}, marks=SLOW)],
)  # fmt: skip
def test_a_broken_run_ends_bit_identical(
    name: str, method: str, more: dict[str, Any], compressed: Made, tmp_path: Path, text: Path, rows: Path
) -> None:
    """With dropout, masked tokens drawn on the way, accumulated steps, and weights chosen by what was held out."""
    data, settings = rows if "classifier" in name else text, replace(WIDE, **more)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    recover(compressed[name], whole, data, method, optimization=settings, lora=Lora(4, dropout=0.1))
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, 7)
        with pytest.raises(RunError, match="stopped by the test"):
            recover(compressed[name], broken, data, method, optimization=settings, lora=Lora(4, dropout=0.1))
    assert not broken.exists()
    states = sorted(partial_of(broken).glob("training/checkpoint-*"))
    (states[-1] / "trainer_state.json").write_text('{"torn')  # killed while it was written: an older one is taken
    report = recover(compressed[name], broken, data, method, optimization=settings, lora=Lora(4, dropout=0.1))
    assert report.recovery is not None and 0 < report.recovery.resumed < 7
    assert hashes(broken) == hashes(whole)
    if (whole / lora.FOLDER).is_dir():
        assert hashes(broken / lora.FOLDER) == hashes(whole / lora.FOLDER)
    assert not partial_of(broken).exists()


@SLOW
def test_a_run_that_was_trained_to_its_end_is_not_trained_further(
    compressed: Made, recovered: Made, tmp_path: Path, text: Path
) -> None:
    def fail(*unused: Any) -> None:
        raise RunError("no verification today")

    output = tmp_path / "late"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "verify", fail)
        with pytest.raises(RunError, match="no verification"):
            recover(compressed["llama 2:4"], output, text, "full")
    report = recover(compressed["llama 2:4"], output, text, "full")
    assert report.recovery is not None and report.recovery.resumed == report.recovery.steps == STEPS
    assert hashes(output) == hashes(recovered["llama 2:4", "full"])


def test_a_loss_that_is_no_number_ends_the_run(
    compressed: Made, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = trainer.Objective.loss, 0

    def broken(self: Any, *given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return loss(self, *given) * (float("nan") if calls == 5 else 1)

    monkeypatch.setattr(trainer.Objective, "loss", broken)
    with pytest.raises(NumericalError, match="loss of step 5 is not a finite number; the state of step 3 is kept"):
        recover(compressed["llama 2:4"], tmp_path / "out", text, "full")
    assert not (tmp_path / "out").exists()
    assert (partial_of(tmp_path / "out") / "training" / "checkpoint-3" / trainer.WEIGHTS).is_file()


# --- a teacher ---


def test_a_teacher_is_followed(compressed: Made, root: Path, text: Path, rows: Path) -> None:
    """By its logits alone, without labels, and from rows without labels."""
    source = Path(Report.read(compressed["llama 2:4"]).source)
    report = recover(
        compressed["llama 2:4"], root / "taught", text, "full", teaching=Teaching(str(source), 2.0, 1.0), evaluate=True,
        eval_data=str(text), optimization=replace(WIDE, steps=16),
    )  # fmt: skip
    found = report.recovery
    assert found is not None and found.teacher == str(source) and found.original is not None
    assert report.divergence is not None and found.divergence is not None
    assert report.divergence.kl_mean.value < found.divergence.kl_mean.value
    assert 0 < found.won_back["kl_mean"] < 1
    plain = root / "plain.jsonl"
    lines = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    plain.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    teacher = Path(Report.read(compressed["classifier 2:4"]).source)
    output = root / "taught-classifier"
    recover(compressed["classifier 2:4"], output, plain, "lora", teaching=Teaching(str(teacher)))
    assert Report.read(output).verification


def test_shares_are_of_what_was_lost() -> None:
    from llmcomp.report.schema import Interval, Measured, Quality, Size

    def side(value: float) -> Measured:
        return Measured(Size(1, 1), 0.0, Quality({"perplexity": Interval(value, value - 1, value + 1)}, 1, 1, ""))

    def report(original: float, compressed: float, recovered: float) -> dict[str, float]:
        found = Recovery("full", "", "m", "m", "", None, 1, 1, 0, [], original=side(original))
        made = Report.__new__(Report)
        made.recovery, made.before, made.after, made.divergence = found, side(compressed), side(recovered), None
        return won_back(made)

    assert report(20, 30, 22) == {"perplexity": pytest.approx(0.8)}
    assert report(20, 30, 35) == {"perplexity": pytest.approx(-0.5)}
    assert report(20, 20.5, 20) == {} and report(20, 15, 14) == {}  # within chance; nothing was lost


# --- the command ---


@SLOW
def test_the_command_in_fresh_processes(
    compressed: Made, tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Verified by one of its own, and said so that it can be done again."""
    from llmcomp.formats.verify import verify

    output = tmp_path / "out"
    arguments = [
        "recover", str(compressed["llama int4"]), "--data", str(text), "--steps", "2", "--samples", "8",
        "--sequence-length", "16", "--rank", "2", "--target", "mlp", "--no-evaluate", "-o", str(output),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "verify", verify)
        assert main(arguments) == 0
    printed = capfd.readouterr().out
    assert "What was won back" in printed and "kept beside the packed weights" in printed
    report = Report.read(output)
    assert report.verification is not None and any("adapter" in check for check in report.verification.checks)
    again = reproduce(report)
    assert all(part in again for part in ("--steps 2", "--rank 2", "--target mlp", "--sequence-length 16"))


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("llama 2:4", [], "needs something to train on"),
        ("llama 2:4", ["--data", "nothing-there.txt"], "does not exist"),
        ("llama 2:4", ["--data", "EMPTY"], "is empty"),
        ("llama 2:4", ["--data", "TEXT", "--method", "half"], "--method half cannot be"),
        ("llama 2:4", ["--data", "TEXT", "--rank", "0"], "--rank 0 cannot be"),
        ("llama 2:4", ["--data", "TEXT", "--learning-rate", "3"], "--learning-rate 3.0 cannot be"),
        ("llama 2:4", ["--data", "TEXT", "--patience", "2"], "--evaluate-every"),
        ("llama 2:4", ["--data", "TEXT", "--target", "convolutions"], "matches no compressed linear"),
        ("llama 2:4", ["--data", "TEXT", "--teacher", "TEACHER"], "has another vocabulary"),
        ("llama 2:4", ["--data", "TEXT", "--teacher", "CLASSIFIER"], "is for sequence-classification"),
        ("llama int4", ["--data", "TEXT", "--method", "full"], "take --method lora"),
        ("classifier 2:4", ["--data", "TEXT"], "has no labels for a classifier"),
        ("classifier 2:4", ["--data", "WRONG"], "is none of the model's 3 classes"),
        ("classifier 2:4", ["--data", "ROWS", "--teacher", "LABELS"], "has the labels"),
        ("source", ["--data", "TEXT"], "expected a directory that llmcomp wrote"),
        ("nobody/nothing", ["--data", "TEXT"], "nobody/nothing"),
        ("recovered", ["--data", "TEXT"], "has an adapter already"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(
    name: str, flags: list[str], said: str, compressed: Made, recovered: Made,
    root: Path, text: Path, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "empty.txt").touch()
    (tmp_path / "wrong.jsonl").write_text('{"text": "a b c", "label": 7}')
    source = Report.read(compressed["llama 2:4"]).source
    if "TEACHER" in flags:
        shutil.copytree(source, tmp_path / "teacher")
        from tiny import write_tokenizer

        write_tokenizer(tmp_path / "teacher", encoder=False, text=["one or two"])
    if "LABELS" in flags:
        tiny("bert-classifier", tmp_path / "labels", tokenizer=True, num_labels=2)
    names = {
        "TEXT": str(text), "ROWS": str(rows), "EMPTY": str(tmp_path / "empty.txt"),
        "WRONG": str(tmp_path / "wrong.jsonl"), "TEACHER": str(tmp_path / "teacher"),
        "CLASSIFIER": str(compressed["classifier 2:4"]), "LABELS": str(tmp_path / "labels"),
    }  # fmt: skip
    made = {**compressed, "source": Path(source), "recovered": recovered["llama int4", "lora"]}
    output = tmp_path / "out"
    capfd.readouterr()
    arguments = ["recover", str(made.get(name, name)), *(names.get(flag, flag) for flag in flags), "-o", str(output)]
    assert main([*arguments, "--sequence-length", "16", "--no-evaluate"]) == 2
    sentences = [line for line in capfd.readouterr().err.splitlines() if line.startswith("llmcomp: ")]
    assert len(sentences) == 1 and said in sentences[0], sentences
    assert not output.exists() and not partial_of(output).exists()
