"""The shipped models are small, load plainly, and are good enough that losing bits shows."""

import ast
import copy
import json
import math
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from llmcomp import samples
from llmcomp.calibration.stats import InputStats
from llmcomp.errors import UserError
from llmcomp.methods.gptq import gptq
from llmcomp.schemes import Scheme

MODULES = json.loads((Path(samples.__file__).parent / "modules.json").read_text())
HELD_OUT = sorted(name for area in MODULES["areas"].values() for name in area["held_out"])
TRAINING = {name for area in MODULES["areas"].values() for name in area["training"]}
WINDOW = 256


def round_to_nearest(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Symmetric, each group of a row scaled so that its largest magnitude meets the end of the grid."""
    groups = weight.reshape(-1, group)
    scale = groups.abs().amax(1, keepdim=True).clamp_min(1e-8) / ((2**bits - 1) / 2)
    integers = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (integers * scale).reshape(weight.shape)


def block_linears(model: PreTrainedModel) -> list[torch.nn.Linear]:
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    assert len(linears) == 7 * model.config.num_hidden_layers
    return linears


def rounded(model: PreTrainedModel, bits: int, group: int) -> PreTrainedModel:
    model = copy.deepcopy(model)
    for linear in block_linears(model):
        linear.weight.data = round_to_nearest(linear.weight.data, bits, group)
    return model


@torch.no_grad()
def solved(model: PreTrainedModel, windows: torch.Tensor) -> PreTrainedModel:
    """GPTQ at 4 bits in groups of 128, all Gram matrices from the dense model."""
    model = copy.deepcopy(model)
    grams: dict[torch.nn.Module, torch.Tensor] = {}

    def gather(linear: torch.nn.Module, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        tokens = inputs[0].flatten(0, 1)
        grams[linear] = grams.get(linear, torch.zeros(tokens.shape[1])) + tokens.T @ tokens

    handles = [linear.register_forward_hook(gather) for linear in block_linears(model)]
    for batch in windows.split(8):
        model(input_ids=batch)
    for handle in handles:
        handle.remove()
    for linear in block_linears(model):
        gram, diagonal = grams[linear], grams[linear].diagonal().clone()
        stats = InputStats(gram=gram, absmax=diagonal.sqrt(), diagonal=diagonal, tokens=windows.numel())
        solution = gptq(linear.weight.data, stats, Scheme(4, 128), torch.bfloat16)
        linear.weight.data = solution.weight.dense().float()
    return model


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Over non-overlapping windows [n, 256] without a beginning token."""
    total = 0.0
    for batch in windows.split(8):
        logits = model(input_ids=batch).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / windows[:, 1:].numel())


@pytest.fixture(scope="module")
def lm() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(samples.sample_path("sample:lm"), dtype=torch.float32).eval()


def windows_of(text: Path) -> torch.Tensor:
    """[n, 256], non-overlapping, the tail dropped."""
    tokenizer = AutoTokenizer.from_pretrained(samples.sample_path("sample:lm"))
    tokens = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    return tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """A third of the held-out text, evenly spaced."""
    return windows_of(samples.validation_text())[::3]


@pytest.fixture(scope="module")
def dense(lm: PreTrainedModel, windows: torch.Tensor) -> float:
    return perplexity(lm, windows)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", sorted(samples.SAMPLES))
def test_at_most_four_megabytes(name: str) -> None:
    assert sum(file.stat().st_size for file in samples.sample_path(name).iterdir()) <= 4_000_000


@pytest.mark.parametrize("name", sorted(samples.SAMPLES))
def test_block_widths_suit_groups_of_64_and_128(name: str) -> None:
    with safe_open(samples.sample_path(name) / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys() if ".layer" in key]  # noqa: SIM118
    wide = [shape for shape in shapes if len(shape) == 2]
    assert wide and all(shape[1] % 128 == 0 for shape in wide)


def test_text_is_small_enough_to_ship() -> None:
    folder = samples.validation_text().parent
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_500_000


def test_unknown_sample_is_named_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'sample:bert'.*sample:classifier and sample:lm"):
        samples.sample_path("sample:bert")


def test_importing_samples_imports_nothing_heavy() -> None:
    check = "import sys, llmcomp.samples; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_both_models_load_offline_in_a_fresh_process() -> None:
    check = (
        "import sys; from transformers import AutoModelForCausalLM as L, AutoTokenizer as T;"
        "from transformers import AutoModelForSequenceClassification as C\n"
        "for kind, path in ((L, sys.argv[1]), (C, sys.argv[2])):\n"
        "    model, loading = kind.from_pretrained(path, output_loading_info=True)\n"
        "    logits = model(**T.from_pretrained(path)('Return a string.', return_tensors='pt')).logits\n"
        "    odd = loading['missing_keys'] or loading['unexpected_keys']\n"
        "    print(odd or 'complete', bool(logits.isfinite().all()))"
    )
    paths = [str(samples.sample_path(name)) for name in ("sample:lm", "sample:classifier")]
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", check, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split("\n")[:2] == ["complete True"] * 2


def test_two_bits_rounded_to_nearest_cost_a_fifth(
    lm: PreTrainedModel, windows: torch.Tensor, dense: float
) -> None:
    assert perplexity(rounded(lm, 2, 64), windows) >= 1.2 * dense


def test_four_bits_cost_at_most_a_fiftieth(lm: PreTrainedModel, windows: torch.Tensor, dense: float) -> None:
    calibration = windows_of(samples.calibration_text())
    compressed = perplexity(solved(lm, calibration[:: len(calibration) // 64]), windows)
    assert compressed <= 1.02 * dense
    assert compressed < perplexity(rounded(lm, 4, 128), windows) <= 1.06 * dense


def test_language_model_has_learned_more_than_word_frequencies(windows: torch.Tensor, dense: float) -> None:
    """A model that knew only the held-out text's own word frequencies would have this perplexity."""
    share = torch.bincount(windows[:, 1:].flatten()).float() / windows[:, 1:].numel()
    frequencies = torch.special.entr(share).sum().exp().item()
    assert dense < frequencies / 5


@torch.no_grad()
def test_classifier_beats_the_majority_on_held_out_modules() -> None:
    path = samples.sample_path("sample:classifier")
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    found, right = rows(samples.classifier_validation()), 0
    for start in range(0, len(found), 32):
        part = found[start : start + 32]
        encoded = tokenizer([r["text"] for r in part], truncation=True, padding=True, return_tensors="pt")
        predicted = model(**encoded).logits.argmax(-1)
        right += int((predicted == torch.tensor([r["label"] for r in part])).sum())
    majority = max(Counter(r["label"] for r in found).values())
    assert right >= 1.5 * majority


def test_labels_are_the_areas_and_balanced() -> None:
    config = json.loads((samples.sample_path("sample:classifier") / "config.json").read_text())
    assert list(config["id2label"].values()) == list(MODULES["areas"])
    for path in (samples.classifier_calibration(), samples.classifier_validation()):
        counts = Counter(row["label"] for row in rows(path))
        assert set(counts) == {int(label) for label in config["id2label"]}
        assert min(counts.values()) >= 0.04 * counts.total() and max(counts.values()) <= 0.3 * counts.total()


def test_split_is_by_module() -> None:
    assert not TRAINING & set(HELD_OUT)
    assert {row["module"] for row in rows(samples.classifier_validation())} == set(HELD_OUT)
    assert {row["module"] for row in rows(samples.classifier_calibration())} <= TRAINING


def test_no_long_line_is_in_both_texts() -> None:
    calibration, validation = (
        {line.strip() for line in path.read_text(encoding="utf-8").splitlines() if len(line.strip()) >= 40}
        for path in (samples.calibration_text(), samples.validation_text())
    )
    assert len(calibration) > 1000 and len(validation) > 1000
    assert not calibration & validation


def test_held_out_modules_own_docstrings_are_in_validation_only() -> None:
    """Read afresh from this Python's sources; another version may have reworded a few."""
    library = Path(sysconfig.get_paths()["stdlib"])
    calibration = samples.calibration_text().read_text(encoding="utf-8")
    validation = samples.validation_text().read_text(encoding="utf-8")
    found = []
    for name in HELD_OUT:
        source = library / f"{name}.py"
        source = source if source.exists() else library / name / "__init__.py"
        doc = ast.get_docstring(ast.parse(source.read_bytes())) if source.exists() else None
        if doc and len(doc) >= 40:
            assert doc not in calibration, name
            found.append(doc.strip() in validation)
    assert len(found) >= 10 and sum(found) >= 0.6 * len(found)
