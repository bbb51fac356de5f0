"""The whole loop on CUDA GPUs, beside the CPU's; what tests/e2e/test_gpu_pretended.py cannot show.

    python -m pytest -m gpu

A GPU sums in another order, so activations are rounded otherwise (in bf16, at the eighth bit), statistics follow, and a
weight near a rounding edge may go the other way: as many up as down, which leaves the error that a method is to keep
small as it was. So errors and perplexity are compared, not bits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crew import Crew
from e2e_runs import LENGTH, SAMPLES, broken_run, hashes, quantize, recipe_of
from tiny import tiny

import llmcomp
from llmcomp.adapters.discover import discover, skeleton
from llmcomp.cli.main import main
from llmcomp.measure.run import Settings
from llmcomp.methods import METHODS
from llmcomp.pipeline.footprint import footprint
from llmcomp.pipeline.job import plan_recipe
from llmcomp.pipeline.terms import Lanes
from llmcomp.recipe import Calibration, QuantizeStep, Recipe
from llmcomp.run_options import CompressResult

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
LEARNED = {"iterations": 8}
_SPARE = 96 * 2**20  # what cuBLAS and cuSOLVER take for themselves through torch's allocator


def options_of(method: str) -> dict[str, int]:
    return {} if METHODS[method].tune is None else LEARNED


def sample(method: str, device: str, output: Path, **step: object) -> CompressResult:
    made = QuantizeStep(method=method, options=options_of(method), **step)  # type: ignore[arg-type]
    recipe = Recipe((made,), Calibration(samples=32, sequence_length=128))
    return llmcomp.quantize("sample:lm", recipe=recipe, device=device, output=output, evaluate=False)


@pytest.mark.parametrize(
    ("method", "step"),
    [*((method, {"bits": 4}) for method in METHODS), ("gptq", {"bits": 8, "activations": "int8-static"})],
)
def test_as_good_as_the_cpu(method: str, step: dict[str, object], tmp_path: Path) -> None:
    """Verified; the errors of layers and blocks, the perplexity. Signs of gradients next to zero hang on the order of
    sums, so learned rounding takes another way to an error of that size."""
    learned = METHODS[method].tune is not None
    runs = {device: sample(method, device, tmp_path / device, **step) for device in ("cuda", "cpu")}
    report = runs["cuda"].report
    assert report.machine.device.startswith("cuda (") and report.verification is not None and report.verification.passed
    for cuda, cpu in zip(report.layers, runs["cpu"].report.layers, strict=True):
        assert cuda.method == cpu.method and cuda.fallback == cpu.fallback
        assert (cuda.error is None) == (cpu.error is None) == (not METHODS[method].calibrated)
        assert cuda.error is None or cuda.error == pytest.approx(cpu.error, rel=0.1 if learned else 0.03)
        assert cuda.block_error is None or cuda.block_error == pytest.approx(cpu.block_error, rel=0.1)
    settings = Settings(windows=16, cost=False)
    found = llmcomp.evaluate(runs["cuda"].output, against=runs["cpu"].output, settings=settings)
    assert found.before is not None and found.before.quality is not None and found.after.quality is not None
    cuda, cpu = (one.quality.metrics["perplexity"].value for one in (found.after, found.before))
    assert cuda == pytest.approx(cpu, rel=0.03 if learned else 0.02)
    assert found.divergence is not None and found.divergence.kl_mean.value < 0.1


@pytest.mark.parametrize("memory", [0, 1 << 30])
@pytest.mark.parametrize("method", ["gptq", "awq", "gptq-signround"])
def test_a_stopped_run_ends_with_the_same_bits(method: str, memory: int, text: Path, tmp_path: Path) -> None:
    """And so does a second run, wherever activations wait."""
    source = tiny("llama", tmp_path / "llama", dtype=torch.bfloat16, tokenizer=True, num_hidden_layers=4)
    recipe = recipe_of(text, method=method, group_size=64, options=options_of(method))
    whole = quantize(source, tmp_path / "whole", recipe, device="cuda")
    broken_run(source, tmp_path / "q", recipe, 2)
    resumed = quantize(source, tmp_path / "q", recipe, device="cuda", activation_memory=memory)
    assert resumed.report.resumed_blocks == 2
    assert hashes(resumed.output) == hashes(whole.output)


def test_experts_and_other_ways_through_a_model(text: Path, tmp_path: Path) -> None:
    for name in ("mixtral", "albert", "gpt2", "t5", "bert-classifier"):
        source = tiny(name, tmp_path / name, tokenizer=True)
        cuda, cpu = (
            quantize(source, tmp_path / f"{name}-{device}", recipe_of(text, group_size=64), device=device)
            for device in ("cuda", "cpu")
        )
        for one, other in zip(cuda.report.layers, cpu.report.layers, strict=True):
            assert one.error == pytest.approx(other.error, rel=0.05), one.name


@pytest.mark.parametrize("method", ["gptq", "awq", "gptq-signround"])
def test_memory_is_what_the_plan_says_and_the_weights(method: str, text: Path, tmp_path: Path) -> None:
    """What plan counts for the CPU, and what is mapped there and copied here: a block, and all outside of blocks."""
    wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "head_dim": 256}
    source = tiny("llama", tmp_path / "llama", dtype=torch.bfloat16, tokenizer=True, **wide)
    recipe = recipe_of(text, method=method, options=options_of(method))
    adapter = discover(skeleton(source))
    terms = footprint(adapter, plan_recipe(recipe, adapter), Lanes.of(SAMPLES, LENGTH), 1 << 30).terms
    weights = {name: value.nbytes for name, value in adapter.model.state_dict().items()}
    resident = sum(size for name, size in weights.items() if adapter.block_of(name) in (None, 0))
    torch.cuda.empty_cache()
    quantize(source, tmp_path / "q", recipe, device="cuda", activation_memory=1 << 30)
    planned = replace(terms, allocator=0, kernels=0).total + resident
    assert torch.cuda.max_memory_allocated() < 1.1 * planned + _SPARE


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU for each of two ranks")
@pytest.mark.parametrize("method", ["awq-gptq", "signround"])
def test_two_gpus_make_what_one_makes(method: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    crew = Crew(tmp_path_factory.mktemp("crew"))
    arguments = ["quantize", "sample:lm", "--method", method, "--samples", "32", "--sequence-length", "128",
                 "--no-evaluate", "--device", "cuda", "-o"]  # fmt: skip
    assert main([*arguments, str(tmp_path / "one")]) == 0
    ended = crew.run(main, *[[[*arguments, str(tmp_path / "two")]]] * 2)
    assert [one.status for one in ended] == [0, 0], ended
    found = llmcomp.evaluate(tmp_path / "two", against=tmp_path / "one", settings=Settings(windows=16, cost=False))
    assert found.before is not None and found.before.quality is not None and found.after.quality is not None
    two, one = (measured.quality.metrics["perplexity"].value for measured in (found.after, found.before))
    assert two == pytest.approx(one, rel=0.03 if METHODS[method].tune else 0.02)
