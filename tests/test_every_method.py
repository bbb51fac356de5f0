"""Every method on a tiny BERT and a tiny Llama, at all bits, from checkpoint to a verified checkpoint; and what
a method must bring along: a file of its own, a config, a source, a test, and nothing anywhere else."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny import VOCABULARY, tiny
from torch import Tensor

import llmcomp
from llmcomp.errors import BadRecipe
from llmcomp.formats.verify import check
from llmcomp.methods import METHODS, Method, _solve
from llmcomp.methods.solution import Solution
from llmcomp.recipe import Calibration, Override, QuantizeStep, Recipe
from llmcomp.run_options import CompressResult
from llmcomp.schemes import BITS, Scheme
from llmcomp.weights import QuantizedWeight

REPOSITORY = Path(llmcomp.__file__).resolve().parent.parent
TESTS = Path(__file__).resolve().parent

# tiny model → (dtype, its Auto class, its compressible linears)
MODELS: dict[str, tuple[torch.dtype, Any, int]] = {
    "llama": (torch.bfloat16, transformers.AutoModelForCausalLM, 7),
    "bert": (torch.float32, transformers.AutoModelForMaskedLM, 6),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One-block models and pre-tokenized calibration data."""
    folder = tmp_path_factory.mktemp("every-method")
    for name, (dtype, _, _) in MODELS.items():
        tiny(name, folder / name, dtype=dtype, num_hidden_layers=1)
    ids = torch.randint(8, VOCABULARY, (6, 64), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, folder / "calibration.safetensors")
    return folder


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The whole verification, but without a process for each; the page of plots has its own tests."""
    monkeypatch.setattr("llmcomp.session.verify", lambda directory, witness: check(directory, witness))
    monkeypatch.setattr("llmcomp.session.render", lambda report: "")
    yield


def quantize(folder: Path, model: str, output: Path, step: QuantizeStep, **options: Any) -> CompressResult:
    recipe = Recipe((step,), Calibration(str(folder / "calibration.safetensors"), 6, 64))
    return llmcomp.quantize(str(folder / model), recipe=recipe, output=output, evaluate=False, **options)


def dense_weights(directory: Path, model: str) -> dict[str, Tensor]:
    """Parameters as plain transformers decodes them (a first forward decompresses)."""
    loaded = MODELS[model][1].from_pretrained(directory, dtype="auto").eval()
    with torch.no_grad():
        loaded(input_ids=torch.tensor([[9, 10, 11]]))
    return {name.removesuffix(".weight"): value for name, value in loaded.state_dict().items()}


# --- the matrix ---


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("model", list(MODELS))
def test_from_checkpoint_to_verified_checkpoint(
    model: str, method: str, symmetric: bool, bits: int, folder: Path, tmp_path: Path
) -> None:
    options = {} if METHODS[method].tune is None else {"iterations": 4, "learning_rate": 0.05}
    step = QuantizeStep(method=method, bits=bits, group_size=64, symmetric=symmetric, options=options)
    result = quantize(folder, model, tmp_path / "out", step)
    layers, report = result.report.layers, result.report
    assert report.verification is not None
    assert report.verification.passed
    assert report.verification.modules_compressed == len(layers) == MODELS[model][2]
    assert {layer.method for layer in layers} == {method}
    assert {layer.scheme for layer in layers} == {Scheme(bits, 64, symmetric).label}
    assert [layer.fallback for layer in layers] == [None] * len(layers)
    source, decoded = dense_weights(folder / model, model), dense_weights(result.output, model)
    # A scale multiplies columns of some weights and divides what makes their input: equal only in what they compute.
    scaled = {one.name for one in layers if (one.scaling or "").startswith("inputs scaled")}
    takers = {(one.scaling or "").rpartition(" ")[2] for one in layers if one.name in scaled}
    moved = {name for name in source if name in scaled or any(f".{taker}" in name for taker in takers)}
    assert not moved or METHODS[method].scale is not None
    for layer in layers:
        before, after = source[layer.name].double(), decoded[layer.name].double()
        levels = {len(group.unique()) for group in after.reshape(-1, 64)}
        assert max(levels) <= 2**bits
        assert max(levels) > min(2**bits, 20) // 2  # all bits are used
        if layer.name in moved:
            continue
        error = float((before - after).norm() / before.norm())
        assert 0 < error < {2: 1.0, 3: 0.45, 4: 0.2, 8: 0.02}[bits]
        if METHODS[method].calibrated:
            assert layer.error is not None
            assert 0 < layer.error < {2: 0.6, 3: 0.1, 4: 0.025, 8: 3e-4}[bits]
        else:
            assert layer.error is None
    untouched = set(decoded) & set(source) - {layer.name for layer in layers} - moved
    assert len(untouched) >= 5
    assert all(torch.equal(source[name], decoded[name]) for name in untouched)


def test_methods_may_be_mixed_and_calibrated_ones_get_their_inputs(folder: Path, tmp_path: Path) -> None:
    overrides = (Override("mlp", method="rtn", bits=8), Override("o_proj", method="rtn-clip"))
    step = QuantizeStep(method="gptq", group_size=64, overrides=overrides, options={"damping": 0.05})
    report = quantize(folder, "llama", tmp_path / "out", step).report
    found = {layer.name.rpartition(".")[2]: (layer.method, layer.damping) for layer in report.layers}
    assert found == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("gptq", 0.05)),
        "o_proj": ("rtn-clip", None),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), ("rtn", None)),
    }
    assert all(layer.error is not None for layer in report.layers)
    assert report.verification is not None
    assert report.verification.passed


def test_gram_matrices_that_do_not_factor_are_counted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_solve, "factorize", lambda *arguments: None)
    report = quantize(folder, "bert", tmp_path / "out", QuantizeStep(group_size=64)).report
    assert all("does not factor" in (layer.fallback or "") for layer in report.layers)
    assert any(note.startswith("6 of 6 weights fell back") for note in report.notes)
    assert report.verification is not None
    assert report.verification.passed


def test_where_activations_wait_changes_no_bit(folder: Path, tmp_path: Path) -> None:
    step = QuantizeStep(group_size=64)
    parked = quantize(folder, "llama", tmp_path / "parked", step, activation_memory=0)
    kept = quantize(folder, "llama", tmp_path / "kept", step, activation_memory=1 << 30)
    shards = sorted(path.name for path in kept.output.glob("*.safetensors"))
    assert shards
    for name in shards:
        assert (parked.output / name).read_bytes() == (kept.output / name).read_bytes()
    assert any("mapped files" in note for note in parked.report.notes)
    assert not any("mapped files" in note for note in kept.report.notes)


# --- what a method is ---


@dataclasses.dataclass(frozen=True)
class FloorConfig:
    """A method as a stranger would add it. `share`: of the step that is subtracted before rounding."""

    share: float = 0.5


def floor(
    weight: Tensor, stats: Any, scheme: Scheme, dtype: torch.dtype, config: FloorConfig = FloorConfig()
) -> Solution:
    """Round down, per channel or group."""
    rows, columns = weight.shape
    grouped = weight.float().reshape(rows, scheme.groups(columns), -1)
    scale = (grouped.abs().amax(-1) / -scheme.qmin).to(dtype)
    points = (grouped / scale.float().unsqueeze(-1) - config.share).round().clamp(scheme.qmin, scheme.qmax)
    values = points.reshape(rows, columns).to(torch.int8)
    return Solution(QuantizedWeight(values, scale, None, scheme), dead_columns=int(config.share * 100))


@pytest.mark.parametrize("calibrated", [True, False])
def test_adding_a_method_takes_one_line_in_one_dict(
    calibrated: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "floor", Method(floor, FloorConfig, calibrated, "rounds down"))
    step = QuantizeStep(method="floor", bits=8, group_size="channel", options={"share": 0.25})
    report = quantize(folder, "llama", tmp_path / "out", step).report
    assert {(layer.method, layer.dead_columns) for layer in report.layers} == {("floor", 25)}
    assert report.verification is not None
    assert report.verification.passed
    assert report.calibration.get("tokens") == (6 * 64 if calibrated else None)
    with pytest.raises(BadRecipe, match="unknown key 'shares'; did you mean 'share'"):
        quantize(folder, "llama", tmp_path / "bad", dataclasses.replace(step, options={"shares": 1.0}))
    assert not (tmp_path / "bad").exists()


def module_of(function: Callable[..., Any]) -> Path:
    return Path(inspect.getsourcefile(function) or "")


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_brings_its_file_its_config_its_source_and_its_test(name: str) -> None:
    entry = METHODS[name]
    path = module_of(entry.function)
    assert path.parent == REPOSITORY / "llmcomp" / "methods"
    assert not path.stem.startswith("_")
    assert module_of(entry.config) == path
    assert dataclasses.is_dataclass(entry.config)
    assert entry.config.__dataclass_params__.frozen
    assert entry.config() == entry.config()  # every setting has a default
    assert inspect.getdoc(entry.config)
    assert inspect.getdoc(entry.function)
    assert entry.summary
    head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|https://", head), "the file's head names no source"
    test = TESTS / "methods" / f"test_{path.stem}.py"
    tree = ast.parse(test.read_text(encoding="utf-8"))
    called = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert entry.function.__name__ in called
    parameters = list(inspect.signature(entry.function).parameters)
    # GPTQ alone also removes weights in its sweep, or keeps removed ones at zero.
    masked = ["pattern", "mask"] if entry.function.__name__ == "gptq" else []
    assert parameters == ["weight", "stats", "scheme", "dtype", "config", *masked]


def test_no_other_part_knows_a_method_by_its_module() -> None:
    own = {module_of(entry.function).stem for entry in METHODS.values()}
    for path in (REPOSITORY / "llmcomp").rglob("*.py"):
        if path.parent.name == "methods":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for imported in names:
                assert imported.removeprefix("llmcomp.methods.") not in own, f"{path} imports {imported}"
