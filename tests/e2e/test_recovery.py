"""What was compressed, trained in the form that it has: masks that hold, adapters beside integers, a teacher."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import parse
from e2e_runs import LENGTH, hashes, tensors
from recovery_runs import SLOW, STEPS, WIDE, Made, recover
from torch import Tensor

import llmcomp
from llmcomp import Lora, Teaching, lora
from llmcomp.calibration.data import read_texts
from llmcomp.formats.opening import open_checkpoint
from llmcomp.kinds import Sparse
from llmcomp.measure.load import load_tokenizer, task_of
from llmcomp.report.schema import Recovery, Report
from llmcomp.report.summary import reproduce, won_back
from llmcomp.training import trainer
from llmcomp.training.data import collator, samples_of

pytestmark = pytest.mark.usefixtures("quick")

DEFAULT = [
    ("llama 2:4", "full"), ("llama 2:4", "lora"), ("llama packed 2:4", "full"), ("gpt2 60%", "lora"),
    ("llama int4", "lora"), ("bert int8", "lora"), ("classifier 2:4", "full"), ("llama ranks", "full"),
]  # fmt: skip
FURTHER = [
    ("llama packed 2:4", "lora"), ("gpt2 60%", "full"), ("gpt2 packed 2:4", "full"), ("mixtral 4:8", "full"),
    ("llama 2:4 int4", "lora"), ("classifier 2:4", "lora"), ("llama ranks", "lora"),
]  # fmt: skip
CASES = [*DEFAULT, *(pytest.param(*case, marks=pytest.mark.slow) for case in FURTHER)]
SPARSE = [case for case in CASES if any(mark in str(case) for mark in (":", "%"))]


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
    earlier = Report.read(compressed[case[0]]).calibration
    assert report.calibration == {key: said for key, said in earlier.items() if key != "warnings"}
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
