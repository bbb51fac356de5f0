"""The checkpoints that `evals.packed` compares: random weights in two shapes, quantized by each tool, and kept.

Rounding to nearest everywhere: how integers were chosen changes neither time nor memory. llmcomp's head is in INT8,
as its recipe for speed has it; bitsandbytes and gptqmodel leave theirs in bf16, which is what they ship.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from evals.common import cache_root
from evals.make_model import make_bert, make_model, make_windows
from evals.process import environment
from evals.setup_peers import peer_python
from llmcomp.measure.bench import Subject
from llmcomp.measure.bench_process import Job

BASE, PEERS = "dense bf16", ("bitsandbytes nf4", "bitsandbytes int8", "gptqmodel INT4 g128")
OURS = {"INT4": "llmcomp INT4 g128", "INT8": "llmcomp INT8, weights only", "W8A8": "llmcomp INT8, W8A8"}
_RTN = ("--method", "rtn", "--format", "llmcomp")
_BLOCKS = ("--target", "attention", "--target", "mlp")
_HEAD = ("--target", "head", "--override", "head bits=8 group_size=channel")
_QUANTIZED = {
    OURS["INT4"]: ("--bits", "4", "--group-size", "128", *_RTN),
    OURS["INT8"]: ("--bits", "8", "--group-size", "channel", *_RTN),
    OURS["W8A8"]: ("--bits", "8", "--group-size", "channel", "--activations", "int8-dynamic", *_RTN),
    "bitsandbytes nf4": ("--format", "bnb-nf4"),
    "bitsandbytes int8": ("--format", "bnb-int8"),
}
# Exports of our own checkpoints: name → (whose, format, module that times it).
_EXPORTS = {
    "llama.cpp, of INT4": (OURS["INT4"], "gguf", "evals.peers.llama_cpp_bench"),
    "llama.cpp, of INT8": (OURS["INT8"], "gguf", "evals.peers.llama_cpp_bench"),
    "onnxruntime, of INT4": (OURS["INT4"], "onnx", "evals.peers.onnx_bench"),
    "onnxruntime, of W8A8": (OURS["W8A8"], "onnx", "evals.peers.onnx_bench"),
}


@dataclass(frozen=True)
class Shape:
    """One of the two models.

    Attributes:
        make: writes it: (directory, layers, dtype=…).
        inputs: (batch, tokens) of what is read; new_tokens: whether it writes.
    """

    name: str
    layers: int
    make: Callable[..., None]
    inputs: tuple[tuple[int, int], ...]
    writes: bool


SHAPES = {
    "llama": Shape("llama-1.1b-shape", 22, make_model, ((1, 128), (1, 512)), True),
    "bert": Shape("bert-base-shape", 12, make_bert, ((1, 128), (32, 128)), False),
}


def contenders(shape: Shape, llama_cpp: bool, onnx: bool) -> list[str]:
    """The rows of a shape's table. llama.cpp writes text only; gptqmodel opens no BERT."""
    names = [BASE, "dense fp32", *_QUANTIZED]
    if shape.writes:
        names.append("gptqmodel INT4 g128")
    exports = {"gguf": llama_cpp and shape.writes, "onnx": onnx}
    return names + [name for name, (_, kind, _) in _EXPORTS.items() if exports[kind]]


def subject(name: str, shape: Shape, layers: int, job: Job, llama_python: Path | None) -> Subject:
    """A contender, its checkpoint made where the cache has none.

    Raises:
        subprocess.CalledProcessError: its tool could not make it; `stderr` says why.
    """
    directory = checkpoint(name, shape, layers)
    one = replace(job, directory=str(directory))
    if name in _EXPORTS:
        module = _EXPORTS[name][2]
        return Subject(name, one, module, llama_python if module.endswith("llama_cpp_bench") else None)
    if name.startswith("gptqmodel"):
        return Subject(name, replace(one, imports=("gptqmodel",)), python=peer_python("gptqmodel"))
    return Subject(name, one)


def checkpoint(name: str, shape: Shape, layers: int) -> Path:
    """The directory of a contender's checkpoint, written once."""
    folder = cache_root() / "packed" / f"{shape.name}-{layers}-layers" / name.replace(" ", "-").replace(",", "")
    if (folder / "config.json").exists() or (folder / "model.gguf").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if name.startswith("dense"):
        shape.make(folder, layers, dtype=torch.bfloat16 if name == BASE else torch.float32)
        return folder
    if name in _EXPORTS:
        source, kind, _ = _EXPORTS[name]
        _run(sys.executable, "llmcomp", "export", checkpoint(source, shape, layers), folder, "--format", kind)
        return folder
    base = checkpoint(BASE, shape, layers)
    if name.startswith("gptqmodel"):
        windows = folder.parent / "windows.safetensors"
        make_windows(windows)  # its script reads them, rounding to nearest does not
        arguments = ["--model", base, "--windows", windows, "--output", folder, "--method", "rtn"]
        _run(peer_python("gptqmodel"), "evals.peers.gptqmodel_run", *arguments)
        return folder
    extra = (*_BLOCKS, *(_HEAD if shape.writes else ())) if name in OURS.values() else ()
    given = ["--no-evaluate", "--no-verify", "--output", folder]
    _run(sys.executable, "llmcomp", "quantize", base, *_QUANTIZED[name], *extra, *given)
    return folder


def _run(python: str | Path, module: str, *arguments: object) -> None:
    command = [str(python), "-m", module, *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment(2))
