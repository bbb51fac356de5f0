"""A student with a teacher beside the same student without one: SST-2's test sentences, the same data, steps and seeds.

    python -m evals.distill --threads 1                         # 3 seeds, 3 of 6 blocks, DistilBERT's losses
    python -m evals.distill --threads 1 --seeds 0 --steps 60    # a look, in minutes
    python -m evals.distill --methods distilbert tinybert minilm

Teacher and data are `models/minilm-sst2` and `data/sst2` below LLMCOMP_ASSETS; students are cut from the teacher.
Whether each sentence is right is kept below LLMCOMP_EVAL_CACHE, so a further seed trains only what is missing.
Differences are paired: both students start from the same weights and read the same batches, and seeds and sentences are
drawn anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from evals.common import assets_root, cache_root, markdown, paired_interval
from evals.process import machine
from evals.pruned_training import MODEL, TEST, TRAIN, correct
from llmcomp import DistillPlan, distill
from llmcomp.measure.bootstrap import interval

ALONE = "no teacher"


def plan_of(args: argparse.Namespace, method: str, seed: int) -> DistillPlan:
    """Everything but what is learned is the same for all."""
    root = assets_root()
    plan = DistillPlan(
        teacher=str(root / MODEL), student=args.student, data=str(root / TRAIN), text_column="sentence",
        label_column="label", sequence_length=48, learning_rate=args.learning_rate, steps=args.steps,
        batch_size=args.batch_size, seed=seed, device=args.device, evaluate=False, verify=False,
    )  # fmt: skip
    return replace(plan, method="labels" if method == ALONE else method)  # in labels no teacher runs at all


def trained(plan: DistillPlan, name: str, rows: Path) -> np.ndarray:
    """`correct` of the student that a plan makes, bool [rows]; measured once."""
    root = str(assets_root())
    said = {key: str(value).replace(root, "") for key, value in plan.said().items()}
    key = hashlib.sha256(json.dumps([said, rows.name], sort_keys=True).encode()).hexdigest()[:24]
    kept = cache_root() / "distill" / f"{key}.npy"
    if kept.exists():
        return np.asarray(np.load(kept))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "student"
        distill(replace(plan, output=str(output)))
        right = correct(output, rows)
    kept.parent.mkdir(parents=True, exist_ok=True)
    np.save(kept, right)
    line = f"{name} seed {plan.seed}: accuracy {right.mean():.2%}"
    print(f"{line}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return right


def rows_of(args: argparse.Namespace, teacher: float) -> list[list[str]]:
    """One row for each method, the student without a teacher first.

    Args:
        teacher: its accuracy.
    """
    rows, found = assets_root() / args.rows, []
    alone = np.stack([trained(plan_of(args, ALONE, seed), ALONE, rows) for seed in args.seeds])
    for name in (ALONE, *args.methods):
        right = np.stack([trained(plan_of(args, name, seed), name, rows) for seed in args.seeds])
        rights = right.mean(0)  # of each sentence the share of seeds that are right
        spread = interval(lambda drawn: drawn.mean(-1), float(rights.mean()), rights)
        seeds = ", ".join(f"{one:.2%}" for one in right.mean(1))
        gain = "" if name == ALONE else _points(paired_interval(right, alone))
        cells = [name, f"{spread.value:.2%} [{spread.low:.2%}, {spread.high:.2%}] ({seeds})"]
        found.append([*cells, f"{spread.value / teacher:.2%}", gain])
    return found


def _points(gain: object) -> str:
    mean, low, high = (100 * getattr(gain, name) for name in ("mean", "low", "high"))
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def main(argv: list[str] | None = None) -> int:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=["distilbert"])
    parser.add_argument("--student", default="layers=3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--rows", default=TEST, help="below LLMCOMP_ASSETS; choices are made on validation.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(json.dumps(machine(args.threads)))
    teacher = correct(assets_root() / MODEL, assets_root() / args.rows).mean()
    print(f"\n{args.steps} steps of {args.batch_size}, {args.student}, the teacher has {teacher:.2%}\n")
    header = ["student", "accuracy [95%] (seeds)", "of the teacher's", "over no teacher, points [95%]"]
    print(markdown(header, rows_of(args, float(teacher))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
