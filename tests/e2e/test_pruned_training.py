"""Weights removed while a model is trained: exact zeros in ordinary checkpoints, runs that resume to the same bits, and
one sentence for what cannot be."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from e2e_runs import LENGTH, hashes, tensors
from stopped import stopped
from tiny import tiny
from transformers import AutoModelForSequenceClassification

from llmcomp import prune_in_training, training_run
from llmcomp.errors import NumericalError, VerificationFailed
from llmcomp.formats import witness
from llmcomp.formats.opening import open_checkpoint
from llmcomp.formats.save import partial_of
from llmcomp.formats.verify import check
from llmcomp.patterns import Pattern, holds
from llmcomp.report.schema import Report
from llmcomp.report.summary import PLAN_NAME, reproduce
from llmcomp.report.trained import pruning_lines
from llmcomp.training import trainer
from llmcomp.training.pruning import masks_of
from llmcomp.training.pruning_plan import PruningPlan, read_plan

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prune_in_training.py"
SLOW = pytest.mark.slow
PLAN = PruningPlan(
    "sample:classifier", samples=24, sequence_length=24, steps=8, batch_size=4, learning_rate=1e-3, save_every=3,
    evaluate=False, device="cpu",
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "gradual": {"method": "gradual", "sparsity": 0.7, "every": 2},
    "gradual 2:4": {"method": "gradual", "pattern": "2:4", "weight_decay": 0.1},
    "gradual together": {"method": "gradual", "sparsity": 0.9, "scope": "global", "initial_sparsity": 0.3},
    "movement": {"method": "movement", "sparsity": 0.8, "teacher": "sample:classifier"},
    "movement 1:4 together": {"method": "movement", "pattern": "1:4", "scope": "global", "accumulate": 2},
    "soft": {"method": "soft-movement", "threshold": 0.48, "penalty": 50.0, "score_learning_rate": 0.05},
    "lottery": {"method": "lottery", "sparsity": 0.75, "rounds": 2, "rewind": 0.25},
    "lottery from the start": {"method": "lottery", "pattern": "2:4", "rounds": 2, "rewind": 0.0, "targets": ("mlp",)},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Checkpoints are verified in this process, and pages are not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "verify", check)
        patch.setattr(training_run, "render", lambda report: "<!doctype html>")
        yield


@pytest.fixture(scope="module")
def source() -> Path:
    from llmcomp import hub

    return hub.resolve("sample:classifier").path


def run(output: Path, **settings: Any) -> Report:
    return prune_in_training(replace(PLAN, output=str(output), **settings)).report


# --- what comes out ---


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=SLOW) if name in ("gradual together", "lottery") else name for name in CASES
])  # fmt: skip
def test_an_ordinary_checkpoint_with_exact_zeros(name: str, source: Path, tmp_path: Path) -> None:
    case, output = CASES[name], tmp_path / "out"
    report = run(output, **case)
    before, after = tensors(source), tensors(output)
    assert {key: (value.shape, value.dtype) for key, value in before.items()} == {
        key: (value.shape, value.dtype) for key, value in after.items()
    }
    model, info = AutoModelForSequenceClassification.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()) and json.loads((output / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    zeros, weights = 0, 0
    pattern = Pattern.parse(case.get("pattern", "unstructured"), case.get("sparsity"))
    for layer in report.layers:
        weight = after[f"{layer.name}.weight"]
        gone = int((weight == 0).sum())
        zeros, weights = zeros + gone, weights + weight.numel()
        assert torch.equal(model.state_dict()[f"{layer.name}.weight"], weight) and layer.method == case["method"]
        if pattern.group is not None:
            assert holds(pattern, weight != 0) and layer.scheme == pattern.label
        elif case["method"] != "soft-movement" and case.get("scope") != "global":
            assert gone == pattern.removes(weight.numel()), layer.name
        assert not torch.equal(weight[weight != 0], before[f"{layer.name}.weight"][weight != 0])
    found = report.pruning
    assert found is not None and found.removed == pytest.approx(zeros / weights, abs=1e-4)
    if case["method"] == "soft-movement":
        assert 0.02 < found.removed < 0.98
    else:
        assert zeros == pattern.removes(weights) or abs(zeros - pattern.removes(weights)) <= len(report.layers)
    pruned = {f"{layer.name}.weight" for layer in report.layers}
    assert all(bool((value == 0).sum() <= (before[key] == 0).sum() + 2) for key, value in after.items()
               if key not in pruned)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("llama", {"method": "movement", "pattern": "2:4", "targets": ("attention", "mlp", "head")}),
        ("gpt2", {"method": "gradual", "pattern": "2:4"}),
        pytest.param("mixtral", {"method": "gradual", "sparsity": 0.5}, marks=SLOW),
        pytest.param("bert", {"method": "movement", "sparsity": 0.5}, marks=SLOW),
    ],
)
def test_language_models(model: str, settings: dict[str, Any], text: Path, tmp_path: Path) -> None:
    """With a teacher; GPT-2 holds [in, out], of which N:M is along the inputs; Mixtral's experts are taken apart."""
    head = {"tie_word_embeddings": False} if "head" in settings.get("targets", ()) else {}
    source, output = tiny(model, tmp_path / "source", tokenizer=True, **head), tmp_path / "out"
    report = run(
        output, model=str(source), teacher=str(source), data=str(text), sequence_length=LENGTH, **settings
    )
    assert report.verification is not None and report.verification.passed
    after = dict(open_checkpoint(output).dense())  # by the model's names, which are not always the file's
    pattern = Pattern.parse(settings.get("pattern", "unstructured"), settings.get("sparsity"))
    assert report.layers and report.task == ("masked-lm" if model == "bert" else "causal-lm")
    for layer in report.layers:
        weight = after[f"{layer.name}.weight"]
        weight = weight.t() if model == "gpt2" else weight
        assert holds(pattern, weight != 0)
        assert int((weight == 0).sum()) == pattern.removes(weight.numel()), layer.name
    assert any(layer.role == "head" for layer in report.layers) == bool(head)


def test_the_report_says_what_was_done(tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = run(output, **CASES["lottery"], evaluate=True)
    assert Report.read(output) == report and report.command == "prune-in-training"
    found, verification = report.pruning, report.verification
    assert found is not None and verification is not None
    assert (found.rounds, found.steps, found.resumed) == (3, 24, 0)
    assert {entry["round"] for entry in found.history} == {0, 1, 2}
    assert any("zeros counted in 24 matrices" in line for line in verification.checks)
    assert report.before is not None and report.after is not None and report.divergence is not None
    assert "accuracy" in (report.before.quality.metrics if report.before.quality else {})
    assert report.after.sparsity > 0.25 and report.before.sparsity < 0.01
    assert "75.0% of" in pruning_lines(report)[0] and "in 3 rounds" in pruning_lines(report)[0]
    assert reproduce(report).endswith(f"--config {PLAN_NAME}")
    again = read_plan(output / PLAN_NAME, [f"output={tmp_path / 'again'}", "evaluate=false", "device=cpu"])
    prune_in_training(again)
    assert hashes(tmp_path / "again") == hashes(output)


def test_a_wrong_number_of_zeros_is_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh process counts by itself."""
    kept: dict[str, Any] = {}

    def save(directory: Path, **given: Any) -> None:
        kept.update(given["pruned"])
        name = next(iter(kept))
        given["pruned"] = {**kept, name: replace(kept[name], zeros=kept[name].zeros - 1)}
        real(directory, **given)

    real = witness.save
    monkeypatch.setattr(witness, "save", save)
    with pytest.raises(VerificationFailed, match=r"has [\d,]+ zeros, where"):
        run(tmp_path / "out", **CASES["gradual 2:4"])
    assert not (tmp_path / "out").exists() and all((one.kept, one.of) == (2, 4) for one in kept.values())


def test_soft_movement_that_removes_nothing_says_so(tmp_path: Path) -> None:
    report = run(tmp_path / "out", method="soft-movement", steps=2)
    assert report.pruning is not None and report.pruning.removed == 0
    assert any(note.startswith("No weight was removed") for note in report.notes)


def test_gradual_masks_are_of_magnitude(source: Path, tmp_path: Path) -> None:
    """In one change, before anything has been trained, by the smallest of what the file holds."""
    run(tmp_path / "out", method="gradual", sparsity=0.6, begin=0.0, end=0.1, initial_sparsity=0.6, steps=1,
        learning_rate=1e-9)  # fmt: skip
    before, after = tensors(source), tensors(tmp_path / "out")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    wanted = masks_of({name: before[name].float().abs()}, Pattern.parse("unstructured", 0.6), 0.6)[name]
    assert torch.equal(after[name] != 0, wanted)


def test_a_ticket_goes_back_to_an_early_step(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the begin of the second round what is kept has the weights of step k of the first, also behind the mask."""
    seen: list[dict[str, Any]] = []
    begin, end = trainer.Watch.on_train_begin, trainer.Watch.on_step_end

    def note(self: Any, args: Any, state: Any, control: Any, **unused: Any) -> None:
        begin(self, args, state, control)
        seen.append({"step": state.global_step, **trainer.held_state(self.trainer.model)})

    def note_step(self: Any, args: Any, state: Any, control: Any, **unused: Any) -> None:
        end(self, args, state, control)
        if state.global_step == 2 and len(seen) == 1:
            seen.append({"step": 2, **trainer.held_state(self.trainer.model)})

    monkeypatch.setattr(trainer.Watch, "on_train_begin", note)
    monkeypatch.setattr(trainer.Watch, "on_step_end", note_step)
    run(tmp_path / "out", method="lottery", sparsity=0.5, rounds=1, rewind=0.25)
    start, early, second = seen
    assert [one["step"] for one in seen] == [0, 2, 2]
    for name, value in early.items():
        if name == "step":
            continue
        if name.endswith(".mask"):
            assert bool(value.all()) and not bool(second[name].all())
        else:
            assert torch.equal(second[name], value) and not torch.equal(start[name], value), name


@SLOW
def test_the_example_on_a_trained_classifier(assets: Path, tmp_path: Path) -> None:
    """MiniLM on SST-2, with itself as teacher, for some steps: better than chance with half of its weights. By
    magnitude: scores of movement know nothing yet after so few."""
    model, data = assets / "models" / "minilm-sst2", assets / "data" / "sst2"
    plan = read_plan(SCRIPT.parents[1] / "examples" / "movement-sst2.yaml", [
        f"model={model}", f"teacher={model}", f"data={data / 'train.jsonl'}", f"eval_data={data / 'test.jsonl'}",
        f"output={tmp_path / 'out'}", "steps=12", "sparsity=0.5", "device=cpu", "batch_size=16", "method=gradual",
    ])  # fmt: skip
    report = prune_in_training(plan)
    assert report.report.after is not None and report.report.after.quality is not None
    assert report.report.after.quality.metrics["accuracy"].low > 0.6
    for layer in report.report.layers:
        assert layer.scheme == "unstructured 50%"


# --- a run that ends early ---


@pytest.mark.parametrize(
    ("name", "after"),
    [("movement", 5), ("lottery", 11), pytest.param("gradual", 7, marks=SLOW),
     pytest.param("lottery from the start", 12, marks=SLOW),
     pytest.param("movement 1:4 together", 7, marks=SLOW), pytest.param("soft", 5, marks=SLOW),
     pytest.param("lottery", 3, marks=SLOW), pytest.param("lottery", 20, marks=SLOW),
     pytest.param("lottery from the start", 21, marks=SLOW)],
)  # fmt: skip
def test_a_broken_run_ends_bit_identical(name: str, after: int, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, **CASES[name])
    with stopped(after):
        run(broken, **CASES[name])
    assert not broken.exists()
    states = sorted(partial_of(broken).glob("training/**/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    states[-1].write_text('{"torn')  # killed while it was written: an older one is taken
    report = run(broken, **CASES[name])
    assert hashes(broken) == hashes(whole)
    assert report.pruning is not None and report.pruning.resumed < 8
    assert not partial_of(broken).exists()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, calls = trainer.Objective.loss, 0

    def broken(self: Any, *given: Any) -> Any:
        nonlocal calls
        calls += 1
        return loss(self, *given) * (float("nan") if calls == 5 else 1)

    monkeypatch.setattr(trainer.Objective, "loss", broken)
    with pytest.raises(NumericalError, match="loss of step 5 is not a finite number; the state of step 3 is kept"):
        run(tmp_path / "out", **{**CASES["movement"], "teacher": None})
    assert not (tmp_path / "out").exists()


# --- the script ---


def script(arguments: list[str]) -> int:
    found: int = runpy.run_path(str(SCRIPT))["main"](arguments)
    return found


def test_the_script_runs_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config, output = tmp_path / "plan.yaml", tmp_path / "out"
    said = {"model": "sample:classifier", "method": "movement", "sparsity": 0.5, "samples": 8, "steps": 9}
    config.write_text(yaml.safe_dump(said) + "learning_rate: 1e-4\n")
    capfd.readouterr()
    settings = ["steps=2", "targets=[mlp]", "evaluate=false", "device=cpu", f"output={output}"]
    assert script(["--config", str(config), *settings]) == 0
    printed = capfd.readouterr().out
    assert "How it was trained" in printed and "50.0% of 524 k weights removed by movement" in printed
    report = Report.read(output)
    assert report.pruning is not None and report.pruning.steps == 2
    assert report.recipe["learning_rate"] == 1e-4 and report.recipe["targets"] == ["mlp"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["method=magnitude"], "method magnitude cannot be: choose one of gradual, movement"),
        (["sparsity=1.5"], "sparsity 1.5 cannot be"),
        (["pattern=2:4", "sparsity=0.7"], "leave sparsity out"),
        (["pattern=3:7"], "does not divide the widths"),
        (["sparsty=0.5"], "unknown key 'sparsty'; did you mean 'sparsity'?"),
        (["method=movement", "rounds=3"], "rounds is of lottery, not of method movement"),
        (["method=soft-movement", "sparsity=0.5"], "sparsity is of gradual and movement and lottery"),
        (["begin=0.8"], "begin 0.8 and end 0.7 cannot be"),
        (["scope=block"], "scope block cannot be"),
        (["targets=[convolutions]"], "target 'convolutions' matches no weight"),
        (["targets=mlp"], "must be a list such as [attention, mlp]"),
        (["targets=[embeddings]"], "embeddings are looked up"),
        (["learning_rate=3"], "learning_rate 3 cannot be"),
        (["steps=many"], "'steps' must be int or None"),
        (["seed"], "'seed' is no setting; give KEY=VALUE"),
        (["data=nothing-there.txt"], "does not exist"),
        (["data=TEXT"], "name their column with label_column, or give a teacher"),
        (["model=nobody/nothing"], "nobody/nothing"),
        (["model=DIRECTORY"], "has no config.json"),
        (["teacher=sample:lm"], "is for causal-lm and sample:classifier for sequence-classification"),
        (["rewind=1", "method=lottery"], "rewind 1 cannot be"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(
    settings: list[str], said: str, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, output = tmp_path / "plan.yaml", tmp_path / "out"
    config.write_text(f"model: sample:classifier\nsteps: 2\noutput: {output}\nevaluate: false\n")
    given = [one.replace("TEXT", str(text)).replace("DIRECTORY", str(tmp_path)) for one in settings]
    capfd.readouterr()
    assert script(["--config", str(config), *given]) == 2
    sentences = [line for line in capfd.readouterr().err.splitlines() if line.startswith("prune_in_training: ")]
    assert len(sentences) == 1 and said in sentences[0], sentences
    assert not output.exists() and not partial_of(output).exists()


def test_a_config_that_cannot_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for text, said in (("- a\n", "must be a mapping"), ("steps: 2\n", "names no model"), ("a: [", "is not YAML")):
        (tmp_path / "plan.yaml").write_text(text)
        assert script(["--config", str(tmp_path / "plan.yaml")]) == 2
        assert said in capfd.readouterr().err
    assert script(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "--config" in capfd.readouterr().err


def test_a_head_that_is_the_embeddings_too_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny("llama", tmp_path / "tied", tokenizer=True, tie_word_embeddings=True)
    (tmp_path / "plan.yaml").write_text(f"model: {tmp_path / 'tied'}\ntargets: [mlp, head]\n")
    assert script(["--config", str(tmp_path / "plan.yaml")]) == 2
    assert "leave head out of targets" in capfd.readouterr().err


def test_what_is_compressed_already_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from packed import packed

    from llmcomp.schemes import Scheme

    packed("llama", tmp_path / "packed", lambda name: Scheme(4, 32))
    (tmp_path / "plan.yaml").write_text(f"model: {tmp_path / 'packed'}\noutput: {tmp_path / 'out'}\n")
    assert script(["--config", str(tmp_path / "plan.yaml")]) == 2
    assert "is already quantized" in capfd.readouterr().err
