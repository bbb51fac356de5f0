"""How fast a student trains by a teacher on disk, beside one whose teacher runs and one that has none.

    python -m evals.teacher_cache --threads 1                            # a classifier and a decoder, 5 rounds
    python -m evals.teacher_cache --threads 1 --only lm --rounds 3 --steps 20

Teachers and data are those below LLMCOMP_ASSETS. Every round trains the same student three times on the same batches,
one way after the other. What is timed is the training itself (`llmcomp.training.trainer.train`), without what goes
before and after it: seconds on a GPU; on a CPU those of its threads, which are the same on a machine that does nothing
else. The teacher is asked in a run before the rounds, whose time is given apart: it is spent once. Ratios are medians
over rounds, with the least and the greatest.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from evals.common import assets_root, markdown
from evals.process import machine
from evals.pruned_training import MODEL, TRAIN
from llmcomp import DistillPlan, distill, distillation

NONE, LIVE, CACHED = "none", "runs", "on disk"
HEADER = ["student", "no teacher, samples/s", "teacher runs", "teacher on disk", "on disk / none [least, greatest]",
          "on disk / runs", "asked once, s", "cache, MB"]  # fmt: skip


def plans(args: argparse.Namespace) -> dict[str, DistillPlan]:
    """What is trained, by name; each reads all of its samples."""
    root, count = assets_root(), args.steps * args.batch_size
    shared = {"samples": count, "steps": args.steps, "batch_size": args.batch_size, "save_every": args.steps,
              "device": args.device, "evaluate": False, "verify": False, "method": "logits"}  # fmt: skip
    found = {
        "classifier": DistillPlan(
            str(root / MODEL), "layers=3", data=str(root / TRAIN), text_column="sentence", label_column="label",
            sequence_length=48, **shared,
        ),
        "lm": DistillPlan(
            str(root / "models" / "lm"), "layers=3", data=str(root / "data" / "books" / "train.txt"),
            sequence_length=128, cached_classes=args.classes, temperature=1.0, **shared,
        ),
    }  # fmt: skip
    return {name: plan for name, plan in found.items() if args.only in (None, name)}


def seconds(plan: DistillPlan) -> tuple[float, float]:
    """Of the training, and of asking the teacher before it."""
    clock = time.process_time if plan.device == "cpu" else time.perf_counter
    spent: dict[str, list[float]] = {"train": [], "remembered": []}

    def timed(name: str) -> Callable[..., Any]:
        work = getattr(distillation, name)

        def done(*given: Any, **named: Any) -> Any:
            began = clock()
            result = work(*given, **named)
            spent[name].append(clock() - began)
            return result

        return done

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name in spent:
            stack.callback(setattr, distillation, name, getattr(distillation, name))
            setattr(distillation, name, timed(name))
        distill(replace(plan, output=str(Path(folder) / "student")))
    return sum(spent["train"]), sum(spent["remembered"])


def measured(name: str, plan: DistillPlan, rounds: int) -> list[str]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        ways = {NONE: replace(plan, method="labels"), LIVE: plan, CACHED: replace(plan, teacher_cache=folder)}
        asked = seconds(ways[CACHED])[1]
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            for way in list(ways) if number % 2 else reversed(list(ways)):
                times[way].append(seconds(ways[way])[0])
                print(f"{name}, teacher {way}: {times[way][-1]:.2f} s", file=sys.stderr, flush=True)
    ratios = {way: [a / b for a, b in zip(times[way], times[CACHED], strict=True)] for way in (NONE, LIVE)}
    speeds = [f"{plan.steps * plan.batch_size / median(found):.1f}" for found in times.values() if plan.steps]
    alone = ratios[NONE]
    return [name, *speeds, f"{median(alone):.3f} [{min(alone):.3f}, {max(alone):.3f}]",
            f"{median(ratios[LIVE]):.2f}", f"{asked:.1f}", f"{size / 1e6:.1f}"]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["classifier", "lm"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--classes", type=int, default=64, help="kept of a distribution over tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(json.dumps(machine(args.threads)))
    print(f"\n{args.steps} steps of {args.batch_size}, {args.rounds} rounds\n")
    print(markdown(HEADER, [measured(name, plan, args.rounds) for name, plan in plans(args).items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
