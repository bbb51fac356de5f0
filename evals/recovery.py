"""What `llmcomp recover` wins back: sparse, low-rank, pruned and few-bit checkpoints, trained in the form they have.

    python -m evals.recovery [--seeds 0] [--steps 300] [--only NAME …] [--ways NAME …] [--texts books wikitext]

Each checkpoint is made of `models/lm` below LLMCOMP_ASSETS by one recipe from 64 windows of 256 tokens, then trained
on the text that those come from (`data/books/calibration.txt`, 8 windows of 256 tokens a step), by all of its weights
or by LoRA, with labels alone or with the source model's logits, too. Integers take LoRA only. Perplexity is over the
first 65,536 tokens of each text, of which books is in the domain that is trained on and WikiText is not. *Won back* is
the share of the loss on the first text that compressing had cost, 100% being the source model's loss; the last columns
say what training changed, paired over windows and seeds, which calibrate and train. Losses lie below
LLMCOMP_EVAL_CACHE, so a run that was broken off, or one with more seeds, measures only what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import llmcomp
from evals.common import (
    assets_root,
    cache_root,
    evaluation_windows,
    markdown,
    paired_interval,
    percent,
    window_losses,
)
from evals.equal_bytes import Row, factorize, quantize, recipe_of, sparsify
from evals.parts import PARTS
from evals.process import machine
from evals.quality import windows_file
from llmcomp.training.settings import FULL, LORA, Optimization, Teaching

PART = PARTS["lm"]
Losses = dict[str, list[float]]  # of every window, by text
TRAIN = "data/books/calibration.txt"


@dataclass(frozen=True)
class Way:
    """How a checkpoint is trained."""

    name: str
    method: str
    taught: bool


WAYS = (
    Way("full", FULL, False),
    Way("full, teacher", FULL, True),
    Way("LoRA", LORA, False),
    Way("LoRA, teacher", LORA, True),
)
ROWS = (
    Row("2:4", "sparse", (sparsify(),), "dense"),
    Row("rank, ratio 0.6", "low rank", (factorize(ratio=0.6),)),
    Row("neurons −25%", "pruned", ({"kind": "prune", "mlp": 0.25},), "dense"),
    Row("INT3 g128", "quantized", (quantize(3),)),
    Row("INT2 g64", "quantized", (quantize(2, 64),)),
)


def ways_of(row: Row) -> tuple[Way, ...]:
    """Those that a checkpoint can be trained by: integers have no gradients."""
    return tuple(way for way in WAYS if row.family != "quantized" or way.method == LORA)


def losses(folder: Path, texts: Sequence[str]) -> Losses:
    """Loss of every window of every text, with an adapter where the checkpoint has one."""
    from transformers import AutoTokenizer

    model, tokenizer = llmcomp.load(folder), AutoTokenizer.from_pretrained(folder)
    return {
        name: window_losses(model, evaluation_windows(tokenizer, assets_root() / PART.texts[name])).tolist()
        for name in texts
    }


class Bench:
    """Losses of checkpoints and of what training made of them, from the cache where they are there."""

    def __init__(self, steps: int, texts: Sequence[str]) -> None:
        self._steps, self._texts = steps, tuple(texts)

    def source(self) -> Losses:
        """Of the model that is compressed."""
        return self._kept(["source"], lambda: losses(assets_root() / PART.model, self._texts))

    def row(self, row: Row, ways: Sequence[Way], seed: int) -> dict[str, Losses]:
        """{'' for the compressed model or the name of a way: losses}."""
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "compressed"

            def compressed() -> Path:
                if not made.exists():
                    recipe = recipe_of(row, windows_file(PART, seed, Path(folder)))
                    llmcomp.compress(str(assets_root() / PART.model), recipe, output=made, evaluate=False, verify=False)
                return made

            def trained(way: Way) -> Losses:
                output = Path(folder) / way.name
                self._recover(compressed(), way, seed, output)
                return losses(output, self._texts)

            key = [row.format, row.steps, seed]
            found = {"": self._kept(key, lambda: losses(compressed(), self._texts))}
            for way in ways:
                found[way.name] = self._kept([*key, asdict(way), self._steps], partial(trained, way))
                print(f"{row.name}, {way.name}, seed {seed}", file=sys.stderr, flush=True)
        return found

    def _recover(self, compressed: Path, way: Way, seed: int, output: Path) -> None:
        teacher = str(assets_root() / PART.model) if way.taught else None
        llmcomp.recover(
            compressed, str(assets_root() / TRAIN), method=way.method, teaching=Teaching(teacher),
            optimization=Optimization(steps=self._steps, seed=seed), output=output, evaluate=False, verify=False,
            device="cpu",
        )  # fmt: skip

    def _kept(self, key: list[Any], measure: Callable[[], Losses]) -> Losses:
        said = json.dumps([*key, self._texts, torch.__version__, version("llmcomp")], sort_keys=True)
        path = cache_root() / "recovery" / f"{hashlib.sha256(said.encode()).hexdigest()[:24]}.json"
        if not path.exists():
            found = measure()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))
        kept: Losses = json.loads(path.read_text())
        return kept


def won_back(source: float, compressed: float, trained: float) -> str:
    """The share of the loss that compressing had cost; nothing where it had cost none."""
    cost = compressed - source
    return f"{(compressed - trained) / cost:.0%}" if cost > 0 else "–"


def lines(row: Row, seeds: Sequence[dict[str, Losses]], source: Losses) -> list[list[str]]:
    """The table's lines of one checkpoint: as it was compressed, and by each way.

    Args:
        seeds: what `Bench.row` gives, for each seed.
    """
    texts, found = tuple(source), []
    before = {text: np.array([one[""][text] for one in seeds]) for text in texts}
    for name in seeds[0]:
        after = {text: np.array([one[name][text] for one in seeds]) for text in texts}
        cells = [row.name, name or "–", *(f"{np.exp(after[text].mean()):.2f}" for text in texts)]
        if not name:
            found.append([*cells, "", *("" for _ in texts)])
            continue
        means = (float(np.mean(source[texts[0]])), float(before[texts[0]].mean()), float(after[texts[0]].mean()))
        changes = [percent(paired_interval(after[text], before[text])) for text in texts]
        shown = [f"{one.mean:+.2f}% [{one.low:+.2f}, {one.high:+.2f}]" for one in changes]
        found.append([*cells, won_back(*means), *shown])
    return found


def main(argv: list[str] | None = None) -> int:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], help="default: all")
    parser.add_argument("--ways", nargs="+", choices=[way.name for way in WAYS], help="default: all")
    parser.add_argument("--texts", nargs="+", choices=tuple(PART.texts), default=tuple(PART.texts))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(json.dumps(machine(args.threads)))
    bench = Bench(args.steps, args.texts)
    source = bench.source()
    table = [["(source)", "–", *(f"{np.exp(np.mean(source[text])):.2f}" for text in source), "", *("" for _ in source)]]
    for row in ROWS:
        if args.only is None or row.name in args.only:
            ways = [way for way in ways_of(row) if args.ways is None or way.name in args.ways]
            table += lines(row, [bench.row(row, ways, seed) for seed in args.seeds], source)
    first = next(iter(source))
    header = ["compressed", "trained", *source, f"won back on {first}", *(f"{text}, change (95%)" for text in source)]
    print(f"\n{args.steps} steps of 8 × 256 tokens; {len(args.seeds)} seeds\n\n{markdown(header, table)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
