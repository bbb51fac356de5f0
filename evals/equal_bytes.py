"""Quantization, sparsity, low rank, pruning and their combinations at the bytes that they take, in one chart.

    python -m evals.equal_bytes [--threads 1] [--seed 0] [--kept] [--only NAME …] [--chart evals/equal_bytes.png]

Each row is one recipe of `llmcomp compress` on `models/lm`, calibrated on the same 64 windows of 256 tokens. Bytes
are those of all tensors of the blocks as they lie in the checkpoint, over those of the source (float32); embeddings and
head, which no recipe touches, are left out. Perplexity is that of the decoded weights in float32.

A row **loses** where another takes no more bytes and has a lower perplexity on both texts. Results lie below
LLMCOMP_EVAL_CACHE, where `--kept` takes them from, so that a run that was broken off goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import llmcomp
import llmcomp.hf  # its layout becomes known to transformers
from evals.common import assets_root, cache_root, evaluation_windows, markdown, window_losses
from evals.parts import PARTS
from evals.process import machine
from evals.quality import windows_file
from llmcomp.formats.opening import open_checkpoint
from llmcomp.formats.reading import model_config
from llmcomp.recipe import Recipe
from llmcomp.shards import read_shard

Step = dict[str, Any]
_SHARES = (0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)  # of bytes, marked on the chart's axis
_LETTER, _MARK = 7, 4  # size of the chart's letters, half of that of its marks, in points of print
FAMILIES = {"quantized": "o", "sparse": "s", "low rank": "^", "pruned": "v", "combined": "D"}


def quantize(bits: int, group: int | None = 128, **more: Any) -> Step:
    """A step of GPTQ."""
    return {"kind": "quantize", "method": "gptq", "bits": bits, "group_size": group or "channel", **more}


def sparsify(pattern: str = "2:4", **more: Any) -> Step:
    """A step of SparseGPT, by default 2:4."""
    return {"kind": "sparsify", "method": "sparsegpt", "pattern": pattern, **more}


def factorize(**more: Any) -> Step:
    """A step of SVD-LLM."""
    return {"kind": "factorize", "method": "svd-llm", **more}


@dataclass(frozen=True)
class Box:
    """A rectangle of the chart."""

    left: float
    low: float
    right: float
    high: float

    def within(self, other: Box) -> bool:
        """Whether nothing of it lies outside of `other`."""
        inside = self.left >= other.left and self.low >= other.low
        return inside and self.right <= other.right and self.high <= other.high

    def covers(self, other: Box) -> float:
        """The area that both share."""
        across = min(self.right, other.right) - max(self.left, other.left)
        up = min(self.high, other.high) - max(self.low, other.low)
        return max(0.0, across) * max(0.0, up)


@dataclass(frozen=True)
class Row:
    """One recipe: its name, what family it is of, its steps, and the format that stores it smallest."""

    name: str
    family: str
    steps: tuple[Step, ...]
    format: str = "llmcomp"


ROWS = (
    Row("INT8 channel", "quantized", (quantize(8, None),)),
    *(Row(f"INT{bits} g128", "quantized", (quantize(bits),)) for bits in (4, 3)),
    Row("INT4 channel", "quantized", (quantize(4, None),)),
    Row("INT2 g64", "quantized", (quantize(2, 64),)),
    Row("2:4", "sparse", (sparsify(),)),
    Row("2:4 updated", "sparse", (sparsify(update=True),)),
    Row("4:8", "sparse", (sparsify("4:8"),)),
    Row("50%", "sparse", (sparsify("unstructured", sparsity=0.5),), "dense"),
    *(Row(f"rank, ratio {ratio}", "low rank", (factorize(ratio=ratio),)) for ratio in (0.8, 0.6, 0.4)),
    *(Row(f"neurons −{share:.0%}", "pruned", ({"kind": "prune", "mlp": share},), "dense") for share in (0.25, 0.5)),
    Row("2:4 + INT8 channel", "combined", (sparsify(), quantize(8, None))),
    Row("2:4 + INT4 g128", "combined", (sparsify(), quantize(4))),
    Row("2:4 updated + INT4 g128", "combined", (sparsify(update=True), quantize(4))),
    Row("rank 0.8 + INT8", "combined", (factorize(ratio=0.8), quantize(8, None))),
    Row("rank 0.8 + INT4 g32", "combined", (factorize(ratio=0.8), quantize(4, 32))),
    Row("rank 0.6 + INT4 g32", "combined", (factorize(ratio=0.6), quantize(4, 32))),
    Row("neurons −25% + INT4 g128", "combined", ({"kind": "prune", "mlp": 0.25}, quantize(4)), "compressed-tensors"),
    Row("INT4 g128 + rank 4", "combined", (quantize(4), factorize(rank=4))),
    Row("INT3 g128 + rank 8", "combined", (quantize(3), factorize(rank=8))),
    Row("INT2 g64 + rank 16", "combined", (quantize(2, 64), factorize(rank=16))),
)


def recipe_of(row: Row, windows: Path) -> Recipe:
    """As `llmcomp compress` reads it from a file."""
    calibration = {"source": str(windows), "samples": 64, "sequence_length": 256}
    written = {"seed": 0, "format": row.format, "steps": list(row.steps), "calibration": calibration}
    return Recipe.from_yaml(yaml.safe_dump(written))


def block_bytes(folder: Path) -> int:
    """Bytes of all tensors of the blocks, as they lie in the files."""
    sizes = (info.nbytes for file in folder.glob("*.safetensors") for name, info in read_shard(file).tensors.items()
             if ".layers." in name)  # fmt: skip
    return sum(sizes)


def decoded(folder: Path) -> torch.nn.Module:
    """The model in float32 with the weights that the checkpoint decodes to."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(model_config(folder), dtype=torch.float32)
    weights = {name: tensor.float() for name, tensor in open_checkpoint(folder).dense()}
    lacking = set(model.load_state_dict(weights, strict=False).missing_keys) - set(model.all_tied_weights_keys)
    if lacking:
        raise SystemExit(f"{folder} lacks {sorted(lacking)[:3]}")
    model.tie_weights()
    return model.eval()


def losses(folder: Path) -> dict[str, list[float]]:
    """Loss of every window of every text."""
    from transformers import AutoTokenizer

    model, tokenizer = decoded(folder), AutoTokenizer.from_pretrained(folder)
    texts = PARTS["lm"].texts
    return {
        name: window_losses(model, evaluation_windows(tokenizer, assets_root() / path)).tolist()
        for name, path in texts.items()
    }


def measured(row: Row, seed: int, windows: Path, kept: bool) -> dict[str, Any]:
    """Bytes and losses of one row; with `kept` from the cache, if they are there."""
    key = json.dumps([row.format, row.steps, seed, torch.__version__], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    path = cache_root() / f"equal-bytes-{row.name.replace(' ', '_')}-{digest}.json"
    if kept and path.exists():
        return json.loads(path.read_text())
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        llmcomp.compress(
            str(assets_root() / PARTS["lm"].model), recipe_of(row, windows), output=output, evaluate=False
        )
        found = {"bytes": block_bytes(output), "losses": losses(output)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


def loses(name: str, found: dict[str, dict[str, Any]]) -> str:
    """The row of the lowest perplexity on books among those that beat this one everywhere; empty if none does."""
    def mean(one: str, text: str) -> float:
        return float(np.mean(found[one]["losses"][text]))

    texts = tuple(PARTS["lm"].texts)
    better = [
        other for other in found
        if other != name and found[other]["bytes"] <= found[name]["bytes"]
        and all(mean(other, text) < mean(name, text) for text in texts)
    ]  # fmt: skip
    return min(better, key=lambda other: mean(other, texts[0]), default="")


def free_places(points: np.ndarray, widths: Sequence[float], height: float, limits: Box) -> list[tuple[float, float]]:
    """Where labels go so that none covers another or a point: the lower left corner of each, as points are ordered.

    The label of the point with most neighbours is put first, each at the nearest free place of several directions and
    distances; where none is free, at the one that covers least.

    Args:
        points: [points, 2], in points of print. widths: of the labels. height: of each. limits: what they stay inside.
    """
    marks = [Box(x - _MARK, y - _MARK, x + _MARK, y + _MARK) for x, y in points]
    near = np.linalg.norm(points[:, None] - points[None], axis=2)
    found: dict[int, Box] = {}
    for index in np.argsort(-np.exp(-near / 40).sum(1), kind="stable").tolist():
        (x, y), width = points[index], widths[index]
        choices = [
            Box(left, low, left + width, low + height)
            for distance in (_MARK + 2, 14, 22, 32, 44, 58, 74, 92)
            for angle in np.linspace(0, 2 * np.pi, 24, endpoint=False).tolist()
            for left in [x + distance * np.cos(angle) - width * (0.5 - 0.5 * np.cos(angle))]
            for low in [y + distance * np.sin(angle) - height / 2]
        ]
        inside = [one for one in choices if one.within(limits)] or choices
        taken = [*marks, *found.values()]
        found[index] = min(inside, key=lambda one: sum(one.covers(other) for other in taken))
    return [(found[index].left, found[index].low) for index in range(len(points))]


def chart(rows: Sequence[Row], found: dict[str, dict[str, Any]], source: dict[str, Any], path: Path) -> None:
    """Perplexity over bytes, both logarithmic, one panel a text; a thin line leads from a point to its name."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

    texts = tuple(PARTS["lm"].texts)
    figure = Figure(figsize=(9.5, 5.8 * len(texts)), dpi=130)
    shown = FuncFormatter(lambda value, _: f"{value:g}")
    panels = figure.subplots(len(texts), 1)
    figure.subplots_adjust(left=0.07, right=0.98, top=0.97, bottom=0.05, hspace=0.16)
    for axes, text in zip(np.atleast_1d(panels), texts, strict=True):
        dense = float(np.exp(np.mean(source["losses"][text])))
        x = np.array([found[row.name]["bytes"] / source["bytes"] for row in rows])
        y = np.array([float(np.exp(np.mean(found[row.name]["losses"][text]))) for row in rows])
        axes.axhline(dense, linewidth=0.8, color="grey")
        axes.set(xscale="log", yscale="log", title=text, xlim=(x.min() / 1.12, 1.25))
        axes.set(ylim=(min(y.min(), dense) / 1.1, y.max() * 1.06))
        axes.set(xlabel="bytes of the blocks, of the source's", ylabel="perplexity")
        axes.xaxis.set(major_locator=FixedLocator(_SHARES), major_formatter=shown, minor_formatter=NullFormatter())
        axes.yaxis.set(major_locator=MaxNLocator(9), major_formatter=shown, minor_formatter=NullFormatter())
        colours = {}
        for family, marker in FAMILIES.items():
            some = np.array([row.family == family for row in rows])
            colours[family] = axes.scatter(x[some], y[some], marker=marker, label=family, s=28).get_facecolor()[0]
        axes.legend(fontsize=8, loc="upper right")
        _name_points(axes, rows, x, y, colours)
    figure.savefig(path)


def _name_points(axes: Any, rows: Sequence[Row], x: np.ndarray, y: np.ndarray, colours: dict[str, Any]) -> None:
    scale = 72 / axes.figure.dpi  # places are worked out in points of print, as sizes of letters are
    points = axes.transData.transform(np.stack([x, y], axis=1)) * scale
    bounds = axes.get_window_extent()
    limits = Box(*(value * scale for value in (bounds.x0 + 3, bounds.y0 + 3, bounds.x1 - 3, bounds.y1 - 3)))
    widths = [0.64 * _LETTER * len(row.name) for row in rows]
    corners = free_places(points, widths, 1.25 * _LETTER, limits)
    for row, point, corner in zip(rows, points, corners, strict=True):
        axes.annotate(
            row.name, axes.transData.inverted().transform(point / scale), fontsize=_LETTER, color=colours[row.family],
            xytext=(corner[0] - point[0], corner[1] - point[1]), textcoords="offset points", va="bottom",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": colours[row.family], "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], help="default: all")
    parser.add_argument("--kept", action="store_true", help="take what was measured before from the cache")
    parser.add_argument("--chart", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(json.dumps(machine(args.threads)))
    rows = [row for row in ROWS if args.only is None or row.name in args.only]
    model, found = assets_root() / PARTS["lm"].model, {}
    with tempfile.TemporaryDirectory() as folder:
        windows = windows_file(PARTS["lm"], args.seed, Path(folder))
        for row in rows:
            found[row.name] = measured(row, args.seed, windows, args.kept)
            print(f"{row.name}: {found[row.name]['bytes']:,} bytes", file=sys.stderr, flush=True)
    source = {"bytes": block_bytes(model), "losses": losses(model)}
    texts = tuple(PARTS["lm"].texts)
    lines = [["(source)", "–", "1.000", *(f"{np.exp(np.mean(source['losses'][text])):.2f}" for text in texts), ""]]
    for row in sorted(rows, key=lambda row: -found[row.name]["bytes"]):
        one = found[row.name]
        shown = [f"{np.exp(np.mean(one['losses'][text])):.2f}" for text in texts]
        lines.append([row.name, row.family, f"{one['bytes'] / source['bytes']:.3f}", *shown, loses(row.name, found)])
    print("\n" + markdown(["recipe", "family", "bytes", *texts, "loses to"], lines))
    if args.chart:
        chart(rows, found, source, args.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
