"""A student with a teacher beside the same student without one: SST-2's test sentences, the same data, steps and seeds.

    python -m evals.distill --threads 1                         # full labels: ways to teach, 3 seeds, 3 of 6 blocks
    python -m evals.distill --table few --threads 1             # 1,000 labels; the other sentences teach without one
    python -m evals.distill --table ablation --threads 1        # TinyBERT's losses, each left out in turn
    python -m evals.distill --threads 1 --seeds 0 --steps 60 --ways distilbert    # a look, in minutes

Teacher and data are `models/minilm-sst2` and `data/sst2` below LLMCOMP_ASSETS; students are cut from the teacher, which
was trained on all labels. In `few` a seed draws which rows keep their label; the student without a teacher reads those
rows alone, as many steps at the same rate, so more often each. Of several --learning-rates the one is taken at which
the table's first student does best on validation.jsonl, and it is everybody's; a way that names its own keeps it.

Whether each sentence is right is kept below LLMCOMP_EVAL_CACHE: a run that was broken off, or a further seed, trains
only what is missing. Differences are paired with the table's first student: both start from the same weights and read
the same batches, and seeds and sentences are drawn anew.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evals.common import assets_root, cache_root, markdown, paired_interval, paired_ratio
from evals.process import machine
from evals.pruned_training import MODEL, TEST, TRAIN, correct
from evals.students import ALONE, Bench, Measured, add_course, course, shown, spread
from llmcomp.errors import UserError

VALIDATION = "data/sst2/validation.jsonl"
TEXTS = {"test": TEST, "validation": VALIDATION}  # choices are made on the latter
SHARE = 0.97  # of the teacher's accuracy, that a student is to keep
TAUGHT = ("logits", "distilbert", "minilm", "tinybert")
FULL, FEW, ABLATION = TABLES = ("full", "few", "ablation")
LEFT_OUT = {"attention": "attention", "hidden": "hidden", "embedding": "embedding", "prediction": "soft"}


def ways_of(table: str, said: list[str] | None) -> dict[str, str]:
    """{name of a line: way}; the first is what others are held against."""
    if table == ABLATION:
        without = {f"without {name}": f"tinybert,{weight}_weight=0" for name, weight in LEFT_OUT.items()}
        return {"tinybert": "tinybert", **without, **{way: way for way in said or ()}}
    return {"no teacher": ALONE, **{way: way for way in said or TAUGHT}}


def some_labels(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """The same rows in the same order, of which `count` keep their label; the others' is null.

    Args:
        seed: draws which, each set of rows as likely as any other.
    """
    kept = set(np.random.default_rng(seed).choice(len(rows), count, replace=False).tolist())
    return [row if number in kept else {**row, "label": None} for number, row in enumerate(rows)]


def labelled_in_part(count: int, seed: int) -> Path:
    """Such a file of the training rows, made once, whole or not at all: tables may be made side by side."""
    path = cache_root() / "distill" / f"train-{count}-labels-seed-{seed}.jsonl"
    if not path.exists():
        text = (assets_root() / TRAIN).read_text(encoding="utf-8")
        rows = some_labels([json.loads(line) for line in text.splitlines()], count, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        beside.replace(path)
    return path


def measure(directory: Path) -> Measured:
    """Whether each sentence is classified right, bool [rows] of each text."""
    return {name: correct(directory, assets_root() / path) for name, path in TEXTS.items()}


def bench_of(args: argparse.Namespace) -> Bench:
    """Everything but how the student is taught."""
    base = {**course(args), "teacher": str(assets_root() / MODEL), "text_column": "sentence", "label_column": "label",
            "sequence_length": 48}  # fmt: skip
    data = partial(labelled_in_part, args.labels) if args.table == FEW else lambda seed: assets_root() / TRAIN
    return Bench(base, data, tuple(TEXTS), measure)


def line(name: str, right: np.ndarray, first: np.ndarray | None, teacher: np.ndarray) -> list[str]:
    """One row of a table.

    Args:
        right: of a student, bool [seeds, rows]; first: of the one that it is held against, None for that one itself.
        teacher: bool [rows].
    """
    seeds = ", ".join(f"{one:.2%}" for one in right.mean(1))
    share = paired_ratio(right, np.broadcast_to(teacher, right.shape))
    keeps = "no" if share.mean < SHARE else "yes" if share.low < SHARE else "yes, the whole interval"
    cells = [name, f"{shown(spread(right))} ({seeds})", shown(share), keeps]
    if first is None:
        return [*cells, "", ""]
    gain = paired_interval(100.0 * right, 100.0 * first)
    beyond = "more" if gain.low > 0 else "less" if gain.high < 0 else "within"
    return [*cells, shown(gain, "+.2f"), beyond]


def table(bench: Bench, ways: Mapping[str, str], args: argparse.Namespace) -> str:
    """All that is printed behind the machine: what was done, and the rows."""
    first = next(iter(ways))
    for way in ways.values():
        bench.plan(way, args.seeds[0], args.learning_rates[0])  # refused before anything is trained
    rate, told = bench.tuned(ways[first], args.learning_rates, args.seeds[0], "validation", least=False)
    teacher = correct(assets_root() / MODEL, assets_root() / TEXTS[args.on])
    held = bench.seeds(ways[first], args.seeds, rate)[args.on]
    rows = [line(name, bench.seeds(way, args.seeds, rate)[args.on], None if name == first else held, teacher)
            for name, way in ways.items()]  # fmt: skip
    labels = f"{args.labels:,} labels" if args.table == FEW else "all labels"
    header = ["student", "accuracy [95%] (seeds)", "of the teacher's [95%]", f"at least {SHARE:.0%}",
              f"over {first}, points [95%]", "beyond the interval"]  # fmt: skip
    return (
        f"{args.steps} steps of {args.batch_size}, {args.student}, {labels}, {told}; "
        f"the teacher has {teacher.mean():.2%} on {args.on}\n\n{markdown(header, rows)}"
    )


def main(argv: list[str] | None = None) -> int:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, default=FULL)
    parser.add_argument(
        "--ways", nargs="+", metavar="METHOD[,key=value…]",
        help=f"how students are taught: {' '.join(TAUGHT)}; of {ABLATION}, further lines",
    )  # fmt: skip
    parser.add_argument("--labels", type=int, default=1000, help=f"of {FEW}")
    parser.add_argument("--on", choices=tuple(TEXTS), default="test", help="choices are made on validation")
    add_course(parser, steps=600, batch_size=16, rates=[2e-4])
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(json.dumps(machine(args.threads)))
    try:
        print("\n" + table(bench_of(args), ways_of(args.table, args.ways), args))
    except UserError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
