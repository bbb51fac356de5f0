"""Small runs for the end-to-end tests, with the witness kept; one fresh process reloads many outputs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import stopped_after
from safetensors import safe_open
from tiny import tiny
from torch import Tensor

from llmcomp import api, session
from llmcomp.formats.save import partial_of
from llmcomp.recipe import Calibration, FactorizeStep, QuantizeStep, Recipe, Step
from llmcomp.report.schema import Report

SAMPLES, LENGTH = 8, 32
RELOAD = Path(__file__).with_name("reload.py")


@dataclass(frozen=True)
class Run:
    """A published checkpoint, what it was made from, and the evidence that was gathered on the way."""

    source: Path
    output: Path
    witness: Path
    report: Report

    def left(self) -> dict[str, str]:
        return {left.name: left.reason for left in self.report.left}

    def schemes(self) -> dict[str, str]:
        return {layer.name: layer.scheme for layer in self.report.layers}


@dataclass(frozen=True)
class Case:
    """A run: of which tiny model, by which steps, into which format; factors are held by llmcomp's own alone."""

    model: str
    steps: tuple[Step, ...]
    format: str | None = None
    dtype: torch.dtype = torch.float32

    @property
    def stored(self) -> str:
        """The format, where none is given that in which a recipe's own steps are stored."""
        factors = any(isinstance(step, FactorizeStep) for step in self.steps)
        return self.format or ("llmcomp" if factors else "dense")


def recipe_of_case(text: Path, case: Case) -> Recipe:
    """Its steps, calibrated on SAMPLES windows of LENGTH tokens of a text file."""
    return Recipe(case.steps, Calibration(str(text), SAMPLES, LENGTH), format=case.stored)


def runs_of(cases: Mapping[str, Case], root: Path, text: Path) -> dict[str, Run]:
    """Every case's run by its name; those of one model and dtype are of one source."""
    made = {}
    for name, case in cases.items():
        source = root / f"{case.model}-{case.dtype}"
        if not source.exists():
            tiny(case.model, source, tokenizer=True, dtype=case.dtype)
        made[name] = quantize(source, root / name.replace(" ", "-"), recipe_of_case(text, case))
    return made


def recipe_of(text: Path, *, format: str = "compressed-tensors", **step: Any) -> Recipe:
    """One quantize step, calibrated on SAMPLES windows of LENGTH tokens of a text file."""
    return Recipe((QuantizeStep(**step),), Calibration(str(text), SAMPLES, LENGTH), format=format)


def quantize(source: Path, output: Path, recipe: Recipe, *, page: bool = False, **options: Any) -> Run:
    """Quantize without what is slow and seldom looked at: verification, evaluation, and (unless `page`) the plots of
    the report's page. The witness is copied to `<output>.witness` before publishing."""
    kept = output.with_name(f"{output.name}.witness")

    def publish(partial: Path, *arguments: Any) -> None:
        shutil.copytree(partial / "witness", kept)
        keep(partial, *arguments)

    keep = session.publish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "publish", publish)
        if not page:
            patch.setattr(session, "render", lambda report: "<!doctype html>")
        settings = {"output": output, "evaluate": False, "verify": False, **options}
        result = api.quantize(str(source), recipe=recipe, **settings)
    return Run(source, result.output, kept, result.report)


def broken_run(source: Path, output: Path, recipe: Recipe, after: int) -> Path:
    """A run that failed after `after` finished parts; its partial directory."""
    with stopped_after(after):
        quantize(source, output, recipe)
    assert not output.exists()
    return partial_of(output)


def reload(runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
    """What a fresh process finds when it loads the outputs plainly (see reload.py), by the runs' names."""
    cases = {
        name: {"output": str(run.output), "source": str(run.source), "witness": str(run.witness)}
        for name, run in runs.items()
    }
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    child = subprocess.run(
        [sys.executable, str(RELOAD)], input=json.dumps(cases), env=environment, text=True,
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    found: dict[str, dict[str, Any]] = json.loads(child.stdout.strip().splitlines()[-1])
    return found


def tensors(directory: Path) -> dict[str, Tensor]:
    """Every stored tensor of a checkpoint."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a dict)
    return found


def hashes(directory: Path) -> dict[str, str]:
    """{weight file: SHA-256 of its bytes}."""
    files = sorted(directory.glob("*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def reads(model: Any, ids: Tensor, name: str) -> Tensor:
    """float64 [tokens, in]: what a linear reads."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return found[0].double().flatten(0, 1)


def rows_kept(source: Tensor, left: Tensor) -> Tensor:
    """Which rows of `source` [n, k] are in `left` [m, k], in its order."""
    same = (left.unsqueeze(1) == source.unsqueeze(0)).all(-1)
    assert bool((same.sum(1) == 1).all())
    found = same.int().argmax(1)
    assert bool((found.diff() > 0).all())  # in the order that they had
    return found
