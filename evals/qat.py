"""Quantization-aware training beside what post-training methods make of the same grid: perplexity, paired.

    python -m evals.qat --threads 1                                   # 3 seeds, 2-bit g64 and 3-bit g128
    python -m evals.qat --threads 1 --seeds 0 --settings "2-bit g64" --steps 60    # a look

The model is `models/lm` below LLMCOMP_ASSETS. Post-training methods read 64 windows of 256 tokens of
`books/calibration.txt`, each seed others (`common.py`). `llmcomp recover --method qat` goes on from what `--start` has
made of them on `books/train.txt`, which the model itself was trained on, with the dense model as teacher and no labels.
So it sees more text and takes longer than what it is compared with; the table says how long. Checkpoints and the loss
of every window are kept below LLMCOMP_EVAL_CACHE, so a further seed makes only what is missing. The last column is QAT
minus the best post-training method on that text, paired over windows and seeds: wholly below zero says that QAT is
better.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evals.common import (
    assets_root,
    cache_root,
    evaluation_windows,
    markdown,
    paired_interval,
    percent,
    window_losses,
)
from evals.process import machine
from evals.quality import PARTS, Setting, windows_file

PART = PARTS["lm"]
SETTINGS = {setting.name: setting for setting in PART.settings}
TRAIN, SAMPLES = "data/books/train.txt", 64
QAT, SCALES = "qat", "qat, scales learned"


def identity(said: dict[str, Any]) -> str:
    """A short name of what makes a checkpoint."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:24]


def kept(said: dict[str, Any], make: Callable[[Path], None]) -> tuple[Path, float]:
    """A checkpoint, made once, and the seconds that it took."""
    output = cache_root() / "qat" / identity(said)
    took = output.with_suffix(".json")
    if not took.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        make(output)
        seconds = time.perf_counter() - began
        took.write_text(json.dumps({**said, "seconds": seconds}))
        print(f"{said}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return output, float(json.loads(took.read_text())["seconds"])


def compressed(setting: Setting, method: str, seed: int) -> tuple[Path, float]:
    """By a post-training method, on the windows that every tool gets."""
    from llmcomp.cli.main import main as command

    group = "channel" if setting.group_size is None else str(setting.group_size)

    def make(output: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            words = ["quantize", str(assets_root() / PART.model), "--bits", str(setting.bits), "--group-size", group]
            words += ["--calibration", str(windows_file(PART, seed, Path(folder))), "--samples", str(SAMPLES)]
            if command([*words, "--method", method, "--no-evaluate", "--output", str(output), "--overwrite"]):
                raise SystemExit(f"llmcomp quantize failed for {method}")

    return kept({"setting": setting.name, "method": method, "seed": seed}, make)


def trained(args: argparse.Namespace, setting: Setting, name: str, seed: int) -> tuple[Path, float]:
    """By quantization-aware training, from what a post-training method has made; seconds are of both."""
    from llmcomp import Optimization, Teaching, recover

    start, before = compressed(setting, args.start, seed)
    course = {"steps": args.steps, "batch_size": args.batch_size, "learning_rate": args.learning_rate}

    def make(output: Path) -> None:
        recover(
            start, str(assets_root() / TRAIN), method="qat", learn_scales=name == SCALES, sequence_length=256,
            samples=args.steps * args.batch_size, teaching=Teaching(str(assets_root() / PART.model), 1.0, 1.0),
            optimization=Optimization(seed=seed, **course), output=output, overwrite=True, evaluate=False,
            device=args.device,
        )  # fmt: skip

    said = {"setting": setting.name, "method": name, "start": args.start, "seed": seed, **course}
    output, seconds = kept(said, make)
    return output, before + seconds


def losses(directory: Path, text: str) -> np.ndarray:
    """Of every window of a text, float64 [windows], measured once, as a plain reader of the checkpoint has it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = directory.with_name(f"{directory.name}-{text}.npy")
    if directory.parent == cache_root() / "qat" and file.exists():
        return np.asarray(np.load(file))
    windows = evaluation_windows(AutoTokenizer.from_pretrained(directory), assets_root() / PART.texts[text])
    found = window_losses(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), windows)
    if directory.parent == cache_root() / "qat":
        np.save(file, found)
    return found


def rows_of(args: argparse.Namespace, setting: Setting) -> list[list[str]]:
    """One row for each text and way of training, the best post-training method beside it."""
    after = {name: [compressed(setting, name, seed) for seed in args.seeds] for name in args.methods}
    ours = {name: [trained(args, setting, name, seed) for seed in args.seeds] for name in args.ways}
    found = []
    for text in PART.texts:
        of = {name: np.stack([losses(path, text) for path, _ in made]) for name, made in {**after, **ours}.items()}
        dense = losses(assets_root() / PART.model, text)
        best = min(after, key=lambda name: of[name].mean())
        for name in ours:
            gain = percent(paired_interval(of[name], of[best]))
            cells = [setting.name, text, f"{np.exp(dense.mean()):.2f}"]
            cells += [f"{np.exp(of[one].mean()):.2f}" for one in after]
            seconds = np.mean([took for _, took in ours[name]])
            cells += [name, f"{np.exp(of[name].mean()):.2f}", f"{seconds:.0f}"]
            found.append([*cells, f"{gain.mean:+.2f}% [{gain.low:+.2f}, {gain.high:+.2f}] vs {best}"])
    return found


def main(argv: list[str] | None = None) -> int:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=["2-bit g64", "3-bit g128"])
    parser.add_argument("--methods", nargs="+", default=["gptq", "gptq-signround"], help="post-training methods")
    parser.add_argument("--ways", nargs="+", choices=(QAT, SCALES), default=[QAT])
    parser.add_argument("--start", default="gptq-signround", help="the method that training goes on from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(json.dumps(machine(args.threads)))
    rows = [row for name in args.settings for row in rows_of(args, SETTINGS[name])]
    header = ["setting", "text", "dense", *args.methods, "way", "perplexity", "seconds", "QAT − best (perplexity, 95%)"]
    course = f"{args.steps} steps of {args.batch_size} windows of 256 tokens at {args.learning_rate:g}"
    print(f"\n{course}, from {args.start}; {len(args.seeds)} seeds\n\n{markdown(header, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
