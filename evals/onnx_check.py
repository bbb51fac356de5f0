"""Encoders in onnxruntime beside torch: latency, interleaved in one process, and accuracy; markdown tables on stdout.

    python -m evals.onnx_check [--layers 12] [--rounds 9] [--threads 1] [--shapes 1x128 32x128] [--rows 872]
                               [--parts bert-base minilm accuracy] [--without NAME …]

A BERT-base shape of random weights (`--layers` of its 12), and minilm-sst2, are rounded to nearest by llmcomp in four
ways and exported. Every round runs every contender once, in turn, so that a drift of the machine meets all of them;
what is shown is the median with the fastest and the slowest round, and the ratio of medians to torch in float32.
Accuracy is on SST-2's validation rows, sixteen to a batch, padded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from evals.common import assets_root, markdown, padded_tokens, sentence_labels
from evals.process import machine, versions
from llmcomp import api
from llmcomp.exports import EXPORTS
from llmcomp.formats.opening import open_checkpoint
from llmcomp.recipe import Calibration, QuantizeStep, Recipe

Call = Callable[[dict[str, torch.Tensor]], np.ndarray]
# Steps of a recipe; "dense" is what onnxruntime makes of the model as it is.
WAYS: dict[str, dict[str, Any] | None] = {
    "onnx float32": None,
    "onnx INT8, inputs by token": {"bits": 8, "group_size": "channel", "activations": "int8-dynamic"},
    "onnx MatMulNBits INT8 g128": {"bits": 8, "group_size": 128},
    "onnx MatMulNBits INT4 g128": {"bits": 4, "group_size": 128},
    "onnx MatMulNBits INT4 g32": {"bits": 4, "group_size": 32},
}
TORCH = {"torch float32": torch.float32, "torch bfloat16": torch.bfloat16}
SHOWN = "torch float32"
BATCH = 16


def bert_base(folder: Path, layers: int) -> Path:
    """A BERT-base classifier of random weights, with a tokenizer that nothing reads."""
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(num_hidden_layers=layers)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((assets_root() / "models/minilm-sst2" / name).read_bytes())
    return folder


def contenders(source: Path, folder: Path, threads: int, without: list[str]) -> dict[str, Call]:
    """Everything that is compared on one model, ready to be called."""
    made: dict[str, Call] = {}
    for name, dtype in TORCH.items():
        if name not in without:
            made[name] = torch_call(source, dtype)
    for name, step in WAYS.items():
        if name not in without:
            made[name] = onnx_call(exported(source, folder / name.replace(" ", "-"), step), threads)
    return made


def exported(source: Path, folder: Path, step: dict[str, Any] | None) -> Path:
    """The ONNX file of a model, rounded to nearest as `step` says, or dense."""
    if step is not None:
        recipe = Recipe((QuantizeStep(method="rtn", **step),), Calibration())
        result = api.quantize(str(source), recipe=recipe, output=folder / "packed", evaluate=False, verify=False)
        source = result.output
    target = folder / "onnx"
    target.mkdir(parents=True)
    for note in EXPORTS["onnx"](open_checkpoint(source), target):
        say(f"{folder.name}: {note}")
    say(f"{folder.name}: {sum(file.stat().st_size for file in target.iterdir()) / 1e6:.1f} MB")
    return target / "model.onnx"


def torch_call(source: Path, dtype: torch.dtype) -> Call:
    model: Any = AutoModelForSequenceClassification.from_pretrained(source, dtype=dtype).eval()

    def call(inputs: dict[str, torch.Tensor]) -> np.ndarray:
        with torch.inference_mode():
            return model(**inputs).logits.float().numpy()

    return call


def onnx_call(file: Path, threads: int) -> Call:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    wants = {one.name for one in session.get_inputs()}

    def call(inputs: dict[str, torch.Tensor]) -> np.ndarray:
        feed = {name: value.numpy() for name, value in inputs.items()}
        feed |= {name: np.zeros_like(feed["input_ids"]) for name in wants - set(feed)}
        return session.run(None, feed)[0]

    return call


def latencies(calls: dict[str, Call], rows: int, tokens: int, rounds: int) -> list[list[str]]:
    """A table row for each contender: shape, median, fastest, slowest in ms, median over torch float32's."""
    ids = torch.randint(1000, 2000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call(inputs)
            if turn:  # the first is a warm-up
                taken[name].append((time.perf_counter() - start) * 1e3)
    base = statistics.median(taken[SHOWN])
    table = []
    for name, times in taken.items():
        median = statistics.median(times)
        figures = [f"{value:.1f}" for value in (median, min(times), max(times))]
        table.append([f"{rows} × {tokens}", name, *figures, f"{base / median:.2f}×"])
    return table


def accuracy(calls: dict[str, Call], source: Path, count: int) -> str:
    """Share of SST-2's validation rows that each gets right, and that it answers as torch in float32 does."""
    file = assets_root() / "data/sst2/validation.jsonl"
    sentences = [json.loads(line)["sentence"] for line in file.read_text(encoding="utf-8").splitlines()][:count]
    labels, found = sentence_labels(file)[:count], {}
    for name, call in calls.items():
        parts = [call(padded_tokens(source, sentences[i : i + BATCH])) for i in range(0, len(sentences), BATCH)]
        found[name] = np.concatenate(parts)
    base = found[SHOWN]
    rows = []
    for name, logits in found.items():
        same = (logits.argmax(1) == base.argmax(1)).mean()
        gap = np.sqrt(np.square(logits - base).mean()) / base.std()
        rows.append([name, f"{(logits.argmax(1) == labels).mean():.2%}", f"{same:.2%}", f"{gap:.4f}"])
    return markdown(["minilm-sst2", "accuracy", "answers as torch float32", "logits, rms / std"], rows)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=["1x128", "32x128"])
    parser.add_argument("--rows", type=int, default=872)
    parser.add_argument("--parts", nargs="+", default=["bert-base", "minilm", "accuracy"])
    parser.add_argument("--without", nargs="+", default=[], choices=[*TORCH, *WAYS])
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(json.dumps(machine(args.threads)))
    print(json.dumps(versions(Path(sys.executable), ["llmcomp", "torch", "transformers", "onnxruntime"])), flush=True)
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    header = ["shape", "contender", "median ms", "fastest", "slowest", "times as fast"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "bert-base" in args.parts:
            calls = contenders(bert_base(folder / "bert", args.layers), folder / "base", args.threads, args.without)
            rows = [row for shape in shapes for row in latencies(calls, *shape, args.rounds)]
            print(f"\nBERT-base shape, {args.layers} layers\n\n{markdown(header, rows)}", flush=True)
        if {"minilm", "accuracy"} & set(args.parts):
            source = assets_root() / "models/minilm-sst2"
            calls = contenders(source, folder / "minilm", args.threads, args.without)
            if "minilm" in args.parts:
                rows = [row for shape in shapes for row in latencies(calls, *shape, args.rounds)]
                print(f"\nminilm-sst2\n\n{markdown(header, rows)}", flush=True)
            if "accuracy" in args.parts:
                print(f"\n{accuracy(calls, source, args.rows)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
