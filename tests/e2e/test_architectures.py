"""Every family, quantized at 4 bits, reloaded plainly by a fresh process, and compared."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from architecture_table import PROVEN
from e2e_runs import Run, quantize, recipe_of, reload, tensors
from safetensors.torch import load_file, save_file
from tiny import BEYOND_TEXT, DECODERS, TINY, TWO_CHAINS, VISION_LANGUAGE, tiny
from tiny_media import write_data

from llmcomp.errors import BadRecipe, VerificationFailed
from llmcomp.formats.verify import check

# Linears of a block: q k v o and gate up down; q, k and v fused, o and two; else q k v o and two.
GATED = (
    "llama", "llama-untied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "stablelm", "olmo2", "smollm3",
    "cohere", "granite",
)  # fmt: skip
FUSED = ("gpt2", "modernbert", "phi3", "gpt-neox", "bloom", "falcon", "falcon-alibi")
LINEARS = dict.fromkeys(GATED, 7) | dict.fromkeys(FUSED, 4)
LINEARS |= {"mixtral": 4 + 4 * 3, "qwen3-moe": 4 + 4 * 3}  # attention, and three of each expert
# 6 or 7 of an encoder's block, 10 or 11 of a decoder's
LINEARS |= {"t5": 8, "bart": 8, "whisper": 8, "flan-t5": 9} | dict.fromkeys(VISION_LANGUAGE, 7)
BLOCKS = {"modernbert": 4, "albert": 1} | dict.fromkeys(TWO_CHAINS, 4)
BODIES = tuple(name for name in TINY if not name.endswith("-classifier"))
SHARED = "shared by parts of an encoder-decoder, so it stays as it is"
PARTS = ("_packed", "_scale", "_shape")
MIXTURES = ("mixtral", "qwen3-moe", "deepseek-v3")
DRAWN = ("llama", "bert-classifier", "albert", "deepseek-v3", "t5", "whisper", "llava")  # one of each kind of blocks
TASKS = {"classifier": "sequence-classification", "masked": "masked-lm", "causal": "causal-lm"}


def task_of(name: str) -> str:
    beyond = {"whisper": "speech-seq2seq", "vit-classifier": "image-classification"}
    beyond |= dict.fromkeys(VISION_LANGUAGE, "image-text-to-text")
    if name in beyond:
        return beyond[name]
    if name in TWO_CHAINS:
        return "seq2seq-lm"
    return TASKS["classifier" if name.endswith("classifier") else "causal" if name in DECODERS else "masked"]


def data_for(name: str, root: Path, text: Path) -> Path:
    return write_data(name, root / f"{name}-data") if name in BEYOND_TEXT else text


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Run]:
    """By GPTQ."""
    root = tmp_path_factory.mktemp("families")
    return {
        name: quantize(
            tiny(name, root / name, tokenizer=True), root / f"{name}-q", recipe_of(data_for(name, root, text)),
            page=name in DRAWN,
        )
        for name in TINY
    }


@pytest.fixture(scope="module")
def rounded(runs: dict[str, Run], text: Path) -> dict[str, Run]:
    """Each body once more, without calibration."""
    recipe = recipe_of(text, method="rtn")
    sources = {name: run.source for name, run in runs.items() if name in BODIES}
    return {name: quantize(path, path.with_name(f"{name}-rtn"), recipe) for name, path in sources.items()}


@pytest.fixture(scope="module")
def reloaded(runs: dict[str, Run], rounded: dict[str, Run]) -> dict[str, dict[str, Any]]:
    return reload({**runs, **{f"{name} rtn": run for name, run in rounded.items()}})


@pytest.mark.parametrize("name", TINY)
def test_a_fresh_process_loads_the_model_that_was_compressed(
    name: str, runs: dict[str, Run], reloaded: dict[str, dict[str, Any]]
) -> None:
    for found in [reloaded[name], *([reloaded[f"{name} rtn"]] if name in BODIES else [])]:
        assert found["imported"] == [], "llmcomp took part in the plain loading"
        assert found["account"] == {}, "keys missing, unexpected or mismatched"
        assert found["class"] == runs[name].report.architecture
        assert found["from_witness"] < 1e-4
        assert found["verification"]["passed"], found["verification"]["checks"]
        assert found["verification"]["modules_compressed"] == len(runs[name].report.layers)


@pytest.mark.parametrize("name", TINY)
def test_outputs_stay_near_the_originals(name: str, reloaded: dict[str, dict[str, Any]]) -> None:
    """The witness is llmcomp's own account; the original model is not."""
    assert 1e-3 < reloaded[name]["from_original"] < 0.35


def test_the_page_of_architectures_names_the_methods_that_ran(runs: dict[str, Run], rounded: dict[str, Run]) -> None:
    ran = [{run.report.layers[0].method for run in some.values()} for some in (runs, rounded)]
    assert ran == [{method} for method in PROVEN]


@pytest.mark.parametrize("name", BODIES)
def test_calibration_takes_a_third_off_the_error_of_rounding(name: str, reloaded: dict[str, dict[str, Any]]) -> None:
    """It would not, with statistics of other inputs than those that the linears read."""
    assert reloaded[name]["from_original"] < 0.65 * reloaded[f"{name} rtn"]["from_original"]


@pytest.mark.parametrize("name", TINY)
def test_the_report_accounts_for_every_linear(name: str, runs: dict[str, Run]) -> None:
    report = runs[name].report
    family = name.removesuffix("-classifier")
    blocks = BLOCKS.get(family, 2)
    if family == "deepseek-v3":  # five of attention, three of an MLP, or of each of eight experts and a shared one
        assert len(report.layers) == (5 + 3) + (5 + 8 * 3 + 3)
    else:
        assert len(report.layers) == blocks * LINEARS.get(family, 6)
    assert {layer.block for layer in report.layers} == set(range(blocks))
    assert {layer.role for layer in report.layers} == {"attention", "mlp"}
    assert {layer.scheme for layer in report.layers} == {"int4 g128"}
    starved = [layer for layer in report.layers if layer.method != "gptq"]
    assert bool(starved) == (family in MIXTURES)
    assert all("fewer than its width" in (layer.fallback or "") and ".experts." in layer.name for layer in starved)
    assert all(layer.fallback is None for layer in report.layers if layer.method == "gptq")
    assert all(layer.error is not None and 0 < layer.error < 0.05 for layer in report.layers)
    assert all(layer.bytes_after < layer.bytes_before / 6 for layer in report.layers)
    assert report.task == task_of(name)
    assert report.calibration["samples"] == 8
    if name == "vit-classifier":
        assert report.calibration["tokens"] == 8 * (4 * 4 + 1)
    elif name not in BEYOND_TEXT:  # a decoder begins with one more
        assert report.calibration["tokens"] == 8 * (33 if name in TWO_CHAINS else 32)
    assert report.resumed_blocks == 0 and report.verification is None and report.after is None


@pytest.mark.parametrize("name", TINY)
def test_what_was_left_alone_has_a_reason(name: str, runs: dict[str, Run]) -> None:
    left = runs[name].left()
    if name.endswith("classifier"):
        assert "classifier: its outputs are the answer itself" in left.values()
    elif name not in TWO_CHAINS:
        assert "head not targeted" in left.values()
    if name != "vit-classifier":
        assert (SHARED if name in TWO_CHAINS else "embeddings not targeted") in left.values()
    assert not set(left) & set(runs[name].schemes()), "a linear both compressed and left"


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_keep_the_names_of_the_source(name: str, runs: dict[str, Run]) -> None:
    """As llm-compressor writes them and other software reads them: one packed weight for each expert."""
    source, output = tensors(runs[name].source), tensors(runs[name].output)
    packed = {key for key in source if f"{key}_packed" in output}
    assert {key for key in source if ".experts." in key} <= packed
    assert {key.removesuffix(part) for key in output for part in PARTS if key.endswith(part)} <= set(source)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", MIXTURES)
def test_verification_sees_one_changed_bit_of_an_expert(
    name: str, stream: bool, runs: dict[str, Run], tmp_path: Path
) -> None:
    run = runs[name]
    damaged = Path(shutil.copytree(run.output, tmp_path / "q"))
    assert check(damaged, run.witness, stream).passed
    key = sorted(key for key in tensors(damaged) if re.search(r"\.experts\.3\..*_packed", key))[0]
    path = next(path for path in damaged.glob("*.safetensors") if key in load_file(path))
    stored = load_file(path)
    stored[key][0, 0] ^= 1
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(VerificationFailed, match=r"experts\.3\.\w+\.weight has other values"):
        check(damaged, run.witness, stream)


@pytest.mark.parametrize("name", TINY)
def test_what_travels_along(name: str, runs: dict[str, Run]) -> None:
    run = runs[name]
    names = {path.name for path in run.output.iterdir()}
    assert {"config.json", "llmcomp_recipe.yaml"} <= names
    assert {path.name for path in run.source.glob("*.json")} - {"model.safetensors.index.json"} <= names
    assert {"llmcomp_recipe.yaml", "llmcomp_report.json", "llmcomp_report.html"} <= names
    assert ("generation_config.json" in names) == (run.source / "generation_config.json").is_file()
    assert run.report.size_after is not None and run.report.size_before is not None
    assert run.report.size_after.bytes_on_disk < 0.7 * run.report.size_before.bytes_on_disk
    weights = sum(path.stat().st_size for path in run.output.glob("*.safetensors"))
    assert weights < 0.7 * sum(path.stat().st_size for path in run.source.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_the_whole_run_with_its_own_verification(name: str, tmp_path: Path, text: Path) -> None:
    source = tiny(name, tmp_path / name, tokenizer=True)
    run = quantize(source, tmp_path / "q", recipe_of(data_for(name, tmp_path, text)), verify=True)
    verification = run.report.verification
    assert verification is not None and verification.passed and not verification.streamed
    assert verification.modules_compressed == len(run.report.layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_blocks_of_every_architecture_learn(name: str, tmp_path: Path, text: Path) -> None:
    """Gradients flow through the model's own code, with factors in bf16 where the CPU multiplies those faster."""
    source = tiny(name, tmp_path / name, tokenizer=True)
    options = {"iterations": 4, "learning_rate": 0.02}
    recipe = recipe_of(data_for(name, tmp_path, text), method="signround", options=options)
    if name.startswith("albert"):
        with pytest.raises(BadRecipe, match="runs one block 2 times in a row; take gptq"):
            quantize(source, tmp_path / "q", recipe)
        return
    run = quantize(source, tmp_path / "q", recipe)
    learned = [layer for layer in run.report.layers if layer.method == "signround"]
    assert learned and all(layer.block_error is not None for layer in learned)
    assert all(layer.block_error <= layer.block_error_start for layer in learned)  # type: ignore[operator]
    assert any(layer.block_error < layer.block_error_start for layer in learned)  # type: ignore[operator]
