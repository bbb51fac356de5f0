"""A decoder of half the depth with a teacher beside the same one without: perplexity, the same text, steps and seeds.

    python -m evals.distill_lm --threads 1                                        # 3 seeds, 3 of 6 blocks
    python -m evals.distill_lm --threads 1 --learning-rates 3e-4 1e-3 3e-3        # the student's own best rate
    python -m evals.distill_lm --threads 1 --seeds 0 --steps 20 --ways logits     # a look, in minutes

The teacher is `models/lm` below LLMCOMP_ASSETS, trained on is `books/train.txt`: as many windows of 256 tokens as the
steps read, each seed others. Of several --learning-rates the one is taken at which the student *without* a teacher does
best on `books/calibration.txt`, which no table is of, and it is everybody's. Perplexity is over the first 65,536 tokens
of `books/validation.txt` and of WikiText-2's test text, as `common.py` has it. The loss of each window is kept below
LLMCOMP_EVAL_CACHE: a run that was broken off, or a further seed, trains only what is missing.

Differences are paired with the student without a teacher: both start from the same weights and read the same windows;
seeds and windows are drawn anew. What is closed of the gap to the teacher is in nats: (alone − taught) / (alone −
teacher).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from evals.common import (
    assets_root,
    evaluation_windows,
    markdown,
    paired_interval,
    paired_ratio,
    percent,
    window_losses,
)
from evals.process import machine
from evals.students import ALONE, Bench, Measured, add_course, course, shown
from llmcomp.errors import UserError

MODEL, TRAIN = "models/lm", "data/books/train.txt"
HELD_OUT = "calibration"
TEXTS = {
    "books": "data/books/validation.txt",
    "wikitext": "data/wikitext-2-raw/test.txt",
    HELD_OUT: "data/books/calibration.txt",
}
# Soft targets at a temperature of one: of a distribution over thousands of tokens a higher one is mostly tail.
TAUGHT = (
    "logits,temperature=1",
    "logits,temperature=1,hard_weight=0",
    "logits,temperature=1,divergence=reverse",
    "distilbert,temperature=1",
)


def measure(directory: Path) -> Measured:
    """Loss of each window in nats, float64 [windows] of each text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return {name: window_losses(model, evaluation_windows(tokenizer, assets_root() / path))
            for name, path in TEXTS.items()}  # fmt: skip


def bench_of(args: argparse.Namespace) -> Bench:
    """Everything but how the student is taught."""
    base = {**course(args), "teacher": str(assets_root() / MODEL), "sequence_length": args.length,
            "samples": args.steps * args.batch_size}  # fmt: skip
    return Bench(base, lambda seed: assets_root() / TRAIN, tuple(TEXTS), measure)


def line(text: str, name: str, loss: np.ndarray, alone: np.ndarray | None, teacher: np.ndarray) -> list[str]:
    """One row of the table.

    Args:
        loss: of a student, [seeds, windows]; alone: without a teacher, None for that student itself.
        teacher: [windows].
    """
    seeds = ", ".join(f"{one:.2f}" for one in np.exp(loss.mean(1)))
    cells = [text, name, f"{np.exp(loss.mean()):.2f} ({seeds})"]
    if alone is None:
        return [*cells, "", "", ""]
    change = percent(paired_interval(loss, alone))
    gap = paired_ratio(alone - loss, alone - np.broadcast_to(teacher, alone.shape))
    return [*cells, shown(change, "+.2f"), "yes" if change.high < 0 else "no", shown(gap, ".0%")]


def table(bench: Bench, ways: list[str], args: argparse.Namespace) -> str:
    """All that is printed behind the machine: what was done, and the rows."""
    for way in ways:
        bench.plan(way, args.seeds[0], args.learning_rates[0])  # refused before anything is trained
    rate, told = bench.tuned(ALONE, args.learning_rates, args.seeds[0], HELD_OUT, least=True)
    teacher = measure(assets_root() / MODEL)
    alone = bench.seeds(ALONE, args.seeds, rate)
    taught = {way: bench.seeds(way, args.seeds, rate) for way in ways}
    rows = []
    for text in (name for name in TEXTS if name != HELD_OUT):
        rows.append([text, "the teacher", f"{np.exp(teacher[text].mean()):.2f}", "", "", ""])
        rows.append(line(text, "no teacher", alone[text], None, teacher[text]))
        rows += [line(text, way, loss[text], alone[text], teacher[text]) for way, loss in taught.items()]
    header = ["text", "student", "perplexity (seeds)", "over no teacher, % of perplexity [95%]", "below zero",
              "of the gap closed [95%]"]  # fmt: skip
    what = f"{args.steps} steps of {args.batch_size} windows of {args.length} tokens, {args.student}"
    return f"{what}, {told}\n\n{markdown(header, rows)}"


def main(argv: list[str] | None = None) -> int:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", metavar="METHOD[,key=value…]", default=list(TAUGHT))
    parser.add_argument("--length", type=int, default=256, help="tokens of a training window")
    add_course(parser, steps=400, batch_size=8, rates=[1e-3])
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(json.dumps(machine(args.threads)))
    try:
        print("\n" + table(bench_of(args), args.ways, args))
    except UserError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
