"""Checkpoints of sparse and low-rank weights beside their witness: whole ones pass, others are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import Written, bert, gpt2, linears, llama, write
from damage import flip
from safetensors import safe_open

from llmcomp.errors import VerificationFailed
from llmcomp.formats.verify import check, verify
from llmcomp.kinds import Kind, LowRank, Sparse
from llmcomp.patterns import Pattern
from llmcomp.schemes import Scheme

TWO_FOUR = Pattern(2, 4)
FLOATING: list[Kind] = [Sparse(TWO_FOUR), LowRank(24)]
MIXED: list[Kind] = [
    *FLOATING, Sparse(TWO_FOUR, Scheme(4, 64, False)), Sparse(Pattern(4, 8), Scheme(8, activations="int8-static")),
    LowRank(32, Scheme(4, 32), Scheme(8)), LowRank(8, Scheme(8), Scheme(8), Scheme(4, 64)), Scheme(4, 128),
]  # fmt: skip
MODELS = {
    "llama": (llama, MIXED), "bf16": (lambda: llama(tied=True, dtype=torch.bfloat16), MIXED), "gpt2": (gpt2, MIXED),
    "bert": (bert, FLOATING),
}  # fmt: skip


def made(name: str, folder: Path) -> Written:
    make, kinds = MODELS[name]
    model = make()
    return write(folder, model, {one: kinds[n % len(kinds)] for n, one in enumerate(linears(model))}, "llmcomp")


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_checkpoint_passes(name: str, tmp_path: Path) -> None:
    whole = made(name, tmp_path)
    for stream in (False, True):
        result = check(whole.directory, whole.witness, stream)
        assert result.passed and result.modules_compressed == len(whole.sizes)
    if name == "bert":  # nothing is rounded, so nothing is allowed but another order of sums
        assert any("allowed 1e-04" in line for line in check(whole.directory, whole.witness).checks)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return made("llama", tmp_path_factory.mktemp("kinds"))


def test_in_a_fresh_process(written: Written) -> None:
    assert verify(written.directory, written.witness, timeout=300).passed


def key_of(directory: Path, end: str) -> str:
    """A tensor whose name ends so."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for key in sorted(shard.keys()):
                if key.endswith(end):
                    return str(key)
    raise AssertionError(f"{directory} holds nothing that ends on {end}")


@pytest.mark.parametrize("stream", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize("end", [".weight_values", ".left.weight", ".right.weight", ".base.weight_packed"])
def test_other_values_are_refused(end: str, stream: bool, written: Written, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    shutil.copytree(written.directory, directory)
    key = key_of(directory, end)
    flip(directory, key, byte=2, bit=3)
    with pytest.raises(VerificationFailed, match=f"{key.removesuffix(end)}.weight has other values"):
        check(directory, written.witness, stream)


def test_a_module_that_config_forgets_is_named(written: Written, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    shutil.copytree(written.directory, directory)
    config = json.loads((directory / "config.json").read_text())
    weights = config["quantization_config"]["weights"]
    names = next(group["modules"] for group in weights if group["kind"] == "sparse" and group["values"] is None)
    gone = names.pop()
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationFailed, match=f"{gone} is stored compressed, but not compressed by config.json"):
        check(directory, written.witness)
