"""The whole loop on a GPU that is pretended (tests/pretend.py): nothing it computes with is left on the CPU, nothing it
writes on the GPU, and since the CPU's own kernels compute, every bit of the checkpoint is that of the CPU's run."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from broken import failing_after
from crew import Crew
from e2e_runs import LENGTH, SAMPLES, broken_run, hashes, quantize, recipe_of
from loud_models import loud
from pretend import pretend_gpu
from tiny import tiny

from llmcomp.cli.main import main
from llmcomp.formats import witness
from llmcomp.formats.save import partial_of
from llmcomp.recipe import Calibration, PruneStep, QuantizeStep, Recipe
from llmcomp.report.schema import Report

ENDS = ("attention", "mlp", "embeddings", "head")
LEARNED = {"iterations": 3, "learning_rate": 0.1}
# What models, statistics and methods multiply and round with.
HEAVY = {"linear", "matmul", "__matmul__", "bmm", "addmm_", "addr_", "round_", "linalg_cholesky_ex", "embedding"}

# name → (tiny model, loud where scales are to be found; the step, parts after which a first run is stopped)
CASES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "rtn": ("llama", {"method": "rtn", "targets": ENDS}, None),
    "gptq, stopped": ("llama", {"group_size": 64, "symmetric": False, "targets": ENDS}, 2),
    "awq, stopped": ("loud llama", {"method": "awq", "bits": 3}, 1),
    "gptq-signround": ("llama", {"method": "gptq-signround", "bits": 3, "options": LEARNED}, None),
    "int8-static, stopped": ("loud llama", {"bits": 8, "activations": "int8-static"}, 1),
    "mixture of experts": ("mixtral", {"group_size": 64}, None),
    "one block run twice": ("albert", {"group_size": 64}, None),
}

# Each runs twice, so the rest waits for the slow suite: what it adds is a method's or an adapter's, not the loop's.
USUAL = ("gptq, stopped", "awq, stopped", "gptq-signround")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pretended")


@pytest.mark.parametrize(
    "case", [case if case in USUAL else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_the_checkpoint_is_that_of_the_cpu(case: str, models: Path, text: Path, tmp_path: Path) -> None:
    name, step, stopped = CASES[case]
    source = models / name
    if name == "loud llama":
        loud("llama", source, torch.float32)
    elif not source.exists():
        tiny(name, source, tokenizer=True)
    recipe = recipe_of(text, **step)
    cpu = quantize(source, tmp_path / "cpu", recipe, device="cpu")
    with pretend_gpu() as gpu:
        if stopped is not None:
            broken_run(source, tmp_path / "gpu", recipe, stopped)
            gpu.host.clear()
        run = quantize(source, tmp_path / "gpu", recipe, activation_memory=0)  # `auto` finds it
    assert hashes(run.output) == hashes(cpu.output)
    assert (run.report.resumed_blocks > 0) == (stopped is not None)
    assert run.report.machine.device == "cuda (pretended)" and cpu.report.machine.device == "cpu"
    assert (run.output / "llmcomp_recipe.yaml").read_bytes() == (cpu.output / "llmcomp_recipe.yaml").read_bytes()
    assert [layer.error for layer in run.report.layers] == [layer.error for layer in cpu.report.layers]
    assert witness.load(run.witness).device == "cuda" and witness.load(cpu.witness).device == "cpu"
    scaled = any((layer.scaling or "").startswith("inputs scaled") for layer in run.report.layers)
    assert scaled == ("awq" in case or "static" in case)
    assert {"linear", "round_"} <= gpu.calls and not gpu.host & HEAVY


@pytest.mark.parametrize("method", ["activation", pytest.param("magnitude", marks=pytest.mark.slow)])
def test_a_pruned_checkpoint_is_that_of_the_cpu(method: str, models: Path, text: Path, tmp_path: Path) -> None:
    source = models / "deep llama"
    if not source.exists():
        tiny("llama", source, tokenizer=True, num_hidden_layers=3)
    steps = PruneStep(method, heads=0.5, mlp=0.5, layers=1), QuantizeStep(group_size=64)
    recipe = Recipe(steps, Calibration(str(text), SAMPLES, LENGTH))
    cpu = quantize(source, tmp_path / "cpu", recipe, device="cpu")
    with pretend_gpu() as gpu:
        broken_run(source, tmp_path / "gpu", recipe, 1)
        run = quantize(source, tmp_path / "gpu", recipe, activation_memory=0)
    assert hashes(run.output) == hashes(cpu.output) and run.report.removed == cpu.report.removed
    assert run.report.resumed_blocks == 1
    assert {"linear", "round_", "linalg_cholesky_ex"} <= gpu.calls


def test_an_unfinished_run_of_another_device_is_discarded(models: Path, text: Path, tmp_path: Path) -> None:
    """Sums in another order are other bits, and a checkpoint of two kinds would be neither's."""
    source = tiny("llama", models / "discarded", tokenizer=True)
    recipe = recipe_of(text, method="rtn")
    broken_run(source, tmp_path / "q", recipe, 1)
    with pretend_gpu():
        report = quantize(source, tmp_path / "q", recipe).report
    assert report.resumed_blocks == 0
    assert any("on another device" in note for note in report.notes)


@pytest.mark.parametrize("format", ["compressed-tensors", "bnb-nf4"])
def test_a_gpu_that_is_not_there_is_one_sentence(
    format: str, llama: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", str(llama), "--device", "cuda", "--format", format, "-o", str(tmp_path / "q")]
    assert main(arguments) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "--device" in said.err
    assert list(tmp_path.iterdir()) == []


# --- two ranks ---


def on_a_gpu(arguments: list[str], heard: Path, stopped: int) -> int:
    """The command in one rank, which fails after so many parts; what it exchanged goes to `heard`."""
    exchanged: list[tuple[str, str]] = []

    def listening(name: str) -> Any:
        function = getattr(dist, name)

        def exchange(tensor: Any, *more: Any, **named: Any) -> Any:
            one = tensor[0] if isinstance(tensor, list) else tensor
            exchanged.append((name, one.device.type))
            return function(tensor, *more, **named)

        return exchange

    with pytest.MonkeyPatch.context() as patch, pretend_gpu(int(os.environ["LOCAL_RANK"]), 2), failing_after(stopped):
        for name in ("all_reduce", "broadcast", "all_gather"):
            patch.setattr(dist, name, listening(name))
        status = main(arguments)
    heard.write_text(json.dumps(exchanged))
    return status


def test_ranks_exchange_what_lies_on_the_same_kind_of_device(
    llama: Path, text: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """gloo carries tensors of CPUs, NCCL those of GPUs: a sum of which one rank gave to either would wait forever."""
    crew = Crew(tmp_path_factory.mktemp("crew"))
    arguments = [
        "quantize", str(llama), "--calibration", str(text), "--samples", str(SAMPLES), "--sequence-length", str(LENGTH),
        "--activations", "int8-static", "-o", str(tmp_path / "q"), "--no-evaluate", "--no-verify",
    ]  # fmt: skip
    heard = [tmp_path / f"heard-{rank}.json" for rank in range(2)]
    for stopped, status in ((1, 1), (99, 0)):
        ended = crew.run(on_a_gpu, *[[arguments, own, stopped] for own in heard])
        assert [one.status for one in ended] == [status] * 2, ended
        assert partial_of(tmp_path / "q").exists() == bool(status)
    first, second = (json.loads(own.read_text()) for own in heard)
    assert first == second
    assert {kind for _, kind in first} == {"cpu", "cuda"}
    # A rank that has ended breaks gloo's connection, and NCCL's not.
    assert all(before == ["all_reduce", "cpu"] for before, (_, kind) in pairwise(first) if kind == "cuda")
    assert Report.read(tmp_path / "q").resumed_blocks == 1
