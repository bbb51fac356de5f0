"""Checkpoints to recover and what has become of them, each made when it is first asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_runs import LENGTH, quantize
from packed import packed
from tiny import tiny

import llmcomp
from llmcomp import Lora, Optimization
from llmcomp.kinds import LowRank
from llmcomp.recipe import Calibration, QuantizeStep, Recipe, SparsifyStep, Step
from llmcomp.report.schema import Report

STEPS, WIDE = 8, Optimization(learning_rate=2e-3, steps=8, batch_size=4, save_every=3)
SLOW = pytest.mark.slow
INT4, RANKS = QuantizeStep("rtn", group_size=64, symmetric=False), "model.layers.1"
MADE: dict[str, tuple[str, tuple[Step, ...], str, torch.dtype]] = {
    "llama 2:4": ("llama", (SparsifyStep("wanda"),), "dense", torch.float32),
    "llama packed 2:4": ("llama", (SparsifyStep("magnitude"),), "llmcomp", torch.bfloat16),
    "gpt2 packed 2:4": ("gpt2", (SparsifyStep("magnitude"),), "llmcomp", torch.float32),
    "gpt2 60%": ("gpt2", (SparsifyStep("magnitude", "unstructured", 0.6),), "dense", torch.float32),
    "mixtral 4:8": ("mixtral", (SparsifyStep("magnitude", "4:8"),), "dense", torch.float32),
    "llama int4": ("llama", (INT4,), "compressed-tensors", torch.bfloat16),
    "llama 2:4 int4": ("llama", (SparsifyStep("magnitude"), INT4), "llmcomp", torch.float32),
    "bert int8": ("bert", (QuantizeStep("rtn", bits=8),), "llmcomp", torch.float32),
    "classifier 2:4": ("bert-classifier", (SparsifyStep("magnitude"),), "dense", torch.float32),
}


class Made(dict[Any, Path]):
    """Directories by name, each made when it is first asked for."""

    def __init__(self, make: Callable[[Any], Path]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: Any) -> Path:
        self[name] = self._make(name)
        return self[name]


def compressed_in(root: Path, text: Path) -> Made:
    """Checkpoints by the names of `MADE`, and 'llama ranks'."""
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
    return llmcomp.recover(directory, str(data), **settings).report


def recovered_of(compressed: Made, root: Path, text: Path, rows: Path) -> Made:
    """What recovery makes of them, by name and method."""
    def make(case: tuple[str, str]) -> Path:
        name, method = case
        output = root / f"{compressed[name].name}-{method}"
        recover(compressed[name], output, rows if "classifier" in name else text, method)
        return output

    return Made(make)


def labelled_rows(path: Path) -> Path:
    """Rows with labels 0 to 2, by their first words."""
    made = [{"text": f"{word} return the value {n}", "label": label}
            for n in range(8) for label, word in enumerate(("list", "string", "number"))]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    return path
