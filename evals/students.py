"""What the tables of distillation share: ways to train a student, each trained and measured once.

A way is a method of `llmcomp distill` with what it is told otherwise, written 'METHOD' or 'METHOD,key=value,…' with the
keys of a plan's YAML file, such as 'logits,divergence=reverse' or 'tinybert,attention_weight=0'.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from evals.common import Interval, assets_root, cache_root, paired_interval
from llmcomp import DistillPlan, distill
from llmcomp.building import said
from llmcomp.training.distill_plan import distill_plan

ALONE = "labels"  # the way in which no teacher runs
Measured = dict[str, np.ndarray]  # of each text, what was measured of each of its rows or windows


@dataclass(frozen=True)
class Bench:
    """One student's course, in which only the way, the seed and the rate change.

    Attributes:
        base: fields of the plan that are the same for all; data: of a seed, what is trained on.
        texts: names of what `measure` measures a checkpoint on.
    """

    base: Mapping[str, Any]
    data: Callable[[int], Path]
    texts: Sequence[str]
    measure: Callable[[Path], Measured]

    def plan(self, way: str, seed: int, rate: float) -> DistillPlan:
        """A checked plan; the rate is that of a way which names none.

        Raises:
            BadRecipe: a way that cannot be.
        """
        method, *settings = way.split(",")
        course = {**self.base, "data": str(self.data(seed)), "seed": seed, "learning_rate": rate}
        return distill_plan({**course, "method": method, **said(settings)}, f"'{way}'")

    def trained(self, way: str, seed: int, rate: float) -> Measured:
        """What is measured of the student that a way makes; trained once, ever."""
        plan = self.plan(way, seed, rate)
        kept = cache_root() / "distill" / f"{identity(plan, self.texts)}.npz"
        if not kept.exists():
            began, busy = time.perf_counter(), time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "student"
                report = distill(replace(plan, output=str(output), save_every=plan.steps)).report
                found = self.measure(output)
            _keep(kept, found)
            means = ", ".join(f"{name} {one.mean():.4f}" for name, one in found.items())
            seconds, busy = time.perf_counter() - began, time.process_time() - busy
            took = f"{seconds:.0f} s, of which training {report.phases['train']:.0f} s; {busy:.0f} s of processor"
            print(f"{way} at {plan.learning_rate:g}, seed {seed}: {means}; {took}", file=sys.stderr, flush=True)
        with np.load(kept) as arrays:
            return {name: arrays[name] for name in self.texts}

    def seeds(self, way: str, seeds: Sequence[int], rate: float) -> Measured:
        """The same for several, arrays [seeds, rows]."""
        found = [self.trained(way, seed, rate) for seed in seeds]
        return {name: np.stack([one[name] for one in found]) for name in self.texts}

    def tuned(self, way: str, rates: Sequence[float], seed: int, text: str, *, least: bool) -> tuple[float, str]:
        """The rate at which a way does best on a text that no table is of, and what was found, in words.

        Args:
            least: whether the best is the least mean, as of losses.
        """
        if len(rates) == 1:
            return rates[0], f"learning rate {rates[0]:g}"
        means = {rate: float(self.trained(way, seed, rate)[text].mean()) for rate in rates}
        best = (min if least else max)(rates, key=lambda rate: means[rate])
        tried = ", ".join(f"{rate:g}: {mean:.4f}" for rate, mean in means.items())
        return best, f"learning rate {best:g}, best of those tried for '{way}' on {text} with seed {seed} ({tried})"


def identity(plan: DistillPlan, texts: Sequence[str]) -> str:
    """A short name of all that makes a student and of what it is measured on, wherever files lie."""
    words = {}
    for key, value in plan.said().items():
        words[key] = str(value).replace(str(assets_root()), "").replace(str(cache_root()), "")
    return hashlib.sha256(json.dumps([words, list(texts)], sort_keys=True).encode()).hexdigest()[:24]


def _keep(path: Path, arrays: Measured) -> None:
    """Whole or not at all: a run may be killed while it writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    with beside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    beside.replace(path)


def spread(values: np.ndarray) -> Interval:
    """The mean of [seeds, rows] and its interval, seeds and rows drawn anew."""
    return paired_interval(values, np.zeros_like(values))


def shown(interval: Interval, form: str = ".2%") -> str:
    """'mean [low, high]'."""
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def add_course(parser: argparse.ArgumentParser, *, steps: int, batch_size: int, rates: Sequence[float]) -> None:
    """Flags that the tables share."""
    parser.add_argument("--student", default="layers=3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=list(rates), metavar="RATE",
        help="of several the one that is best for the table's first student, on held-out text, with the first seed",
    )  # fmt: skip
    parser.add_argument("--any-length", action="store_true", help="of a batch, as drawn; padding costs what it does")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")


def course(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of a plan that those flags say."""
    named = ("student", "steps", "batch_size", "device")
    given = {name: getattr(args, name) for name in named}
    return {**given, "group_by_length": not args.any_length, "evaluate": False, "verify": False}
