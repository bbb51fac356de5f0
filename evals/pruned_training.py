"""Movement beside gradual magnitude pruning: the same model, data, steps and seeds, accuracy on SST-2's test sentences.

    python -m evals.pruned_training --threads 1                                     # 3 seeds, 15% and 10% kept
    python -m evals.pruned_training --threads 1 --seeds 0 --steps 40 --batch-size 8 --kept 0.15    # a look

Sanh, Wolf and Rush (arXiv:2005.07683) find movement above magnitude where few weights are kept, on SQuAD, MNLI and QQP.
Model and data are `models/minilm-sst2` and `data/sst2` below LLMCOMP_ASSETS. Whether each sentence is right is kept
below LLMCOMP_EVAL_CACHE, so a run that was broken off, or a further seed, trains only what is missing. The difference
is paired: both methods start from the same weights and read the same batches, and seeds and sentences are drawn anew
(`common.py`). In some hundred steps movement did not leave chance (docs/methods/training-time-pruning.md); the papers
take tens of thousands, for which `--device cuda`.
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

from evals.common import assets_root, cache_root, markdown, paired_interval, sentence_labels
from evals.process import machine
from llmcomp import prune_in_training
from llmcomp.matmul import fast_matmul
from llmcomp.measure.bootstrap import interval
from llmcomp.training.pruning_plan import PruningPlan

MODEL, TRAIN, TEST = "models/minilm-sst2", "data/sst2/train.jsonl", "data/sst2/test.jsonl"
METHODS = ("gradual", "movement")  # the second is held against the first
BATCH = 64  # sentences of a forward that is measured


def plan_of(args: argparse.Namespace, method: str, kept: float, seed: int) -> PruningPlan:
    """Everything but the method is the same for both."""
    root = assets_root()
    return PruningPlan(
        model=str(root / args.model), data=str(root / TRAIN), text_column="sentence", label_column="label",
        sequence_length=48, method=method, sparsity=1 - kept, scope=args.scope, begin=args.begin, end=args.end,
        every=args.every, learning_rate=args.learning_rate, steps=args.steps, batch_size=args.batch_size, seed=seed,
        teacher=str(root / args.teacher) if args.teacher else None, device=args.device, evaluate=False, verify=False,
    )  # fmt: skip


def correct(directory: Path, rows: Path) -> np.ndarray:
    """Whether each sentence of a file is classified right, bool [rows]."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [json.loads(line)["sentence"] for line in rows.read_text(encoding="utf-8").splitlines()]
    by_length = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # little of a batch is then padding
    found = np.empty(len(texts), dtype=np.int64)
    with torch.inference_mode(), fast_matmul():
        for start in range(0, len(texts), BATCH):
            chosen = by_length[start : start + BATCH]
            batch = tokenizer([texts[row] for row in chosen], padding=True, return_tensors="pt")
            found[chosen] = model(**batch).logits.argmax(-1).numpy()
    return found == sentence_labels(rows)


def trained(plan: PruningPlan, rows: Path) -> np.ndarray:
    """`correct` of the model that a plan makes; measured once."""
    root = str(assets_root())
    said = {key: str(value).replace(root, "") for key, value in plan.said().items()}
    key = hashlib.sha256(json.dumps([said, rows.name], sort_keys=True).encode()).hexdigest()[:24]
    kept = cache_root() / "pruned_training" / f"{key}.npy"
    if kept.exists():
        return np.asarray(np.load(kept))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pruned"
        result = prune_in_training(replace(plan, output=str(output)))
        right = correct(output, rows)
    pruning = result.report.pruning
    assert pruning is not None
    kept.parent.mkdir(parents=True, exist_ok=True)
    np.save(kept, right)
    line = f"{plan.method} seed {plan.seed}: {pruning.removed:.1%} removed, accuracy {right.mean():.2%}"
    print(f"{line}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return right


def rows_of(args: argparse.Namespace) -> list[list[str]]:
    """One row for each share kept."""
    rows, found = assets_root() / args.rows, []
    for kept in args.kept:
        right = {name: np.stack([trained(plan_of(args, name, kept, seed), rows) for seed in args.seeds])
                 for name in METHODS}  # fmt: skip
        cells = [f"{kept:.0%}"]
        for name in METHODS:
            rights = right[name].mean(0)  # of each sentence the share of seeds that are right
            spread = interval(lambda drawn: drawn.mean(-1), float(rights.mean()), rights)
            seeds = ", ".join(f"{one:.2%}" for one in right[name].mean(1))
            cells.append(f"{spread.value:.2%} [{spread.low:.2%}, {spread.high:.2%}] ({seeds})")
        gain = paired_interval(right[METHODS[1]], right[METHODS[0]])
        found.append([*cells, f"{100 * gain.mean:+.2f} [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}]"])
    return found


def main(argv: list[str] | None = None) -> int:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kept", type=float, nargs="+", default=[0.15, 0.10], help="shares of the weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--begin", type=float, default=0.1)
    parser.add_argument("--end", type=float, default=0.7)
    parser.add_argument("--scope", choices=("layer", "global"), default="layer")
    parser.add_argument("--model", default=MODEL, help="below LLMCOMP_ASSETS, or a directory")
    parser.add_argument("--teacher", help="below LLMCOMP_ASSETS, or a directory: teaches both methods")
    parser.add_argument("--every", type=int, default=2, help="steps between changes of the mask")
    parser.add_argument("--rows", default=TEST, help="below LLMCOMP_ASSETS; choices are made on validation.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(json.dumps(machine(args.threads)))
    dense = correct(assets_root() / args.model, assets_root() / args.rows)
    print(f"\n{args.steps} steps of {args.batch_size}, training starts from a dense model of {dense.mean():.2%}\n")
    header = ["kept", *(f"{name} [95%] (seeds)" for name in METHODS), "movement − gradual, points [95%]"]
    print(markdown(header, rows_of(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
