"""Quality side by side: every tool on the same model, windows and text; markdown tables on stdout.

    python -m evals.quality [--part lm|sst2|lm-sparse|lm-lowrank|lm-pruned|sst2-pruned]
                             [--tools NAME …] [--settings NAME …] [--threads 1] [--seeds 0 1 2] [--kept]

For each setting, calibration seed and tool: quantize in the tool's own environment, open the checkpoint as
its user would (`evals/score.py`), keep the loss of every window. Peers' results are kept in a JSON file per
cell under LLMCOMP_EVAL_CACHE, keyed by the tool's version and everything that shapes the result, so a second
run measures only what is missing; llmcomp is always measured again, unless --kept makes one table of cells
that several commands have measured. The last column is llmcomp minus the best peer of that cell (best by
the mean over seeds), paired over windows and seeds: an interval that does not reach above zero says that no
peer is better.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evals.common import (
    SEEDS,
    assets_root,
    cache_root,
    calibration_sentences,
    calibration_windows,
    markdown,
    padded_tokens,
    paired_interval,
    percent,
    sentence_kl,
    sentence_labels,
)
from evals.peers.arguments import CUTTING, FACTORS, PRUNING
from evals.process import RunFailed, environment, machine, run, versions
from evals.setup_peers import peer_python

OURS = "llmcomp"
AUTO = "llmcomp auto"  # where it was measured, it is what stands against the peers
LEARNED = "llmcomp gptq-signround"  # slow; asked for by name


@dataclass(frozen=True)
class Tool:
    """A tool and one of its methods, and how its checkpoint is opened."""

    name: str
    package: str
    method: str
    loader: str = "transformers"

    @property
    def python(self) -> Path:
        """The interpreter that has the tool."""
        return Path(sys.executable) if self.package == OURS else peer_python(self.package)


@dataclass(frozen=True)
class Setting:
    """Bits and group size of the linear layers (None: one scale per output channel), or the pattern by which weights
    are removed: '2:4', or a share."""

    name: str
    bits: int = 16
    group_size: int | None = None
    pattern: str | None = None
    ratio: float | None = None  # of bytes that factors keep
    cut: str | None = None  # what is pruned, as llmcomp's flags say it


@dataclass(frozen=True)
class Part:
    """A model, the texts or sentences it is measured on, and the settings compared; `ours`: the tool that stands
    against the best of the others, where all are llmcomp's."""

    name: str
    task: str
    model: str
    texts: dict[str, str]
    settings: tuple[Setting, ...]
    tools: tuple[str, ...]
    ours: str | None = None


TOOLS = {
    tool.name: tool
    for tool in (
        Tool("llmcomp", OURS, "gptq"),
        Tool(AUTO, OURS, "auto"),
        Tool("llmcomp gptaq", OURS, "gptaq"),
        Tool("llmcomp awq", OURS, "awq"),
        Tool("llmcomp awq-gptq", OURS, "awq-gptq"),
        Tool(LEARNED, OURS, "gptq-signround"),
        *(Tool(f"llmcomp {method}", OURS, method) for method in PRUNING),
        *(Tool(f"llmcompressor {method}", "llmcompressor", method) for method in ("sparsegpt", "wanda")),
        *(Tool(f"llmcomp {method}", OURS, method) for method in (*FACTORS, *CUTTING)),
        Tool("llmcompressor gptq", "llmcompressor", "gptq"),
        Tool("llmcompressor gptq-mse", "llmcompressor", "gptq-mse"),
        Tool("llmcompressor awq", "llmcompressor", "awq"),
        Tool("llmcompressor awq-gptq", "llmcompressor", "awq-gptq"),
        Tool("llmcompressor rtn-mse", "llmcompressor", "rtn-mse"),
        Tool("auto-round", "auto_round", "signround", "auto_round"),
        Tool("gptqmodel gptq", "gptqmodel", "gptq", "gptqmodel"),
        Tool("gptqmodel gptq-mse", "gptqmodel", "gptq-mse", "gptqmodel"),
    )
}
PARTS = {
    "lm": Part(
        "lm",
        "causal-lm",
        "models/lm",
        {"books": "data/books/validation.txt", "wikitext": "data/wikitext-2-raw/test.txt"},
        (
            Setting("4-bit g128", 4, 128),
            Setting("4-bit channel", 4, None),
            Setting("3-bit g128", 3, 128),
            Setting("2-bit g64", 2, 64),
        ),
        tuple(
            name for name, tool in TOOLS.items()
            if "rtn" not in name and name != LEARNED and tool.method not in (*PRUNING, *FACTORS, *CUTTING)
        ),
    ),
    "lm-sparse": Part(
        "lm-sparse",
        "causal-lm",
        "models/lm",
        {"books": "data/books/validation.txt", "wikitext": "data/wikitext-2-raw/test.txt"},
        (
            Setting("2:4", pattern="2:4"),
            Setting("4:8", pattern="4:8"),
            Setting("50%", pattern="0.5"),
            Setting("70%", pattern="0.7"),
        ),
        tuple(name for name, tool in TOOLS.items() if tool.method in PRUNING),
    ),
    "lm-lowrank": Part(
        "lm-lowrank",
        "causal-lm",
        "models/lm",
        {"books": "data/books/validation.txt", "wikitext": "data/wikitext-2-raw/test.txt"},
        tuple(Setting(f"ratio {ratio}", ratio=ratio) for ratio in (0.8, 0.6, 0.4)),
        tuple(f"llmcomp {method}" for method in FACTORS),
        "llmcomp svd-llm-update",
    ),
    "lm-pruned": Part(
        "lm-pruned",
        "causal-lm",
        "models/lm",
        {"books": "data/books/validation.txt", "wikitext": "data/wikitext-2-raw/test.txt"},
        tuple(
            Setting(what.strip("-"), cut=what)
            for what in ("--mlp 0.125", "--mlp 0.25", "--mlp 0.5", "--heads 0.5", "--layers 1", "--layers 2")
        ),
        tuple(f"llmcomp {method}" for method in CUTTING),
        "llmcomp cut",
    ),
    "sst2-pruned": Part(
        "sst2-pruned",
        "classification",
        "models/minilm-sst2",
        {"sst2": "data/sst2/test.jsonl"},
        tuple(Setting(what.strip("-"), cut=what) for what in ("--mlp 0.25", "--mlp 0.5", "--layers 1")),
        tuple(f"llmcomp {method}" for method in CUTTING),
        "llmcomp cut",
    ),
    "sst2": Part(
        "sst2",
        "classification",
        "models/minilm-sst2",
        {"sst2": "data/sst2/test.jsonl"},
        (Setting("4-bit g128", 4, 128), Setting("8-bit channel", 8, None)),
        # gptqmodel has no definition of BERT: it refuses the model.
        ("llmcomp", "llmcompressor gptq", "llmcompressor gptq-mse"),
    ),
}


# ---------------------------------------------------------------- one cell


def windows_file(part: Part, seed: int, folder: Path) -> Path:
    """Write the calibration rows of a seed where every tool reads them.

    Sentences go out twice: as padded token ids, and beside them as the JSONL that llmcomp reads, since its
    token files hold windows without padding. It tokenizes them with the same tokenizer to the same ids.
    """
    from safetensors.torch import save_file

    model, data = assets_root() / part.model, assets_root() / "data"
    path = folder / f"{part.name}-{seed}.safetensors"
    if part.task == "causal-lm":
        save_file({"input_ids": calibration_windows(model, data / "books" / "calibration.txt", seed)}, path)
        return path
    sentences = calibration_sentences(data / "sst2" / "train.jsonl", seed)
    save_file(padded_tokens(model, sentences), path)
    lines = [json.dumps({"sentence": sentence}) for sentence in sentences]
    path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def score(model: Path, part: Part, python: Path, loader: str, threads: int) -> dict[str, list]:
    """What `evals.score` writes for one checkpoint, opened by `python`."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [str(python), "-m", "evals.score", "--model", str(model), "--loader", loader]
        command += ["--task", part.task, "--output", str(result)]
        for name, path in part.texts.items():
            command += ["--text", f"{name}={assets_root() / path}"]
        done = subprocess.run(command, cwd=folder, env=environment(threads), capture_output=True, text=True)
        if done.returncode != 0:
            raise RunFailed(
                "\n".join([f"evals.score could not open {model}:", *done.stderr.splitlines()[-15:]])
            )
        scores: dict[str, list] = json.loads(result.read_text())
        return scores


def measure(tool: Tool, part: Part, setting: Setting, windows: Path, threads: int) -> dict:
    """Quantize, reload and score one cell; a tool that refuses is recorded with its last line."""
    group = "channel" if setting.group_size is None else str(setting.group_size)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "checkpoint"
        arguments = ["--model", str(assets_root() / part.model), "--windows", str(windows)]
        arguments += ["--bits", str(setting.bits), "--group-size", group, "--output", str(output)]
        arguments += [] if setting.pattern is None else ["--pattern", setting.pattern]
        arguments += [] if setting.ratio is None else ["--ratio", str(setting.ratio)]
        arguments += [] if setting.cut is None else [f"--cut={setting.cut}"]
        arguments += ["--threads", str(threads), "--method", tool.method, "--task", part.task]
        try:
            measured = run(tool.python, f"evals.peers.{tool.package}_run", arguments, threads)
            scores = score(output, part, tool.python, tool.loader, threads)
        except RunFailed as error:
            return {"failed": str(error)}
    return {"seconds": measured.seconds, "peak_anonymous": measured.peak_anonymous, "scores": scores}


def cell_path(tool: Tool, part: Part, setting: Setting, seed: int) -> Path:
    """Where a cell's result is kept: a readable name and a digest of all that shapes the result."""
    found = versions(tool.python, [tool.package, "torch", "transformers"])
    key = [tool.name, found, part.model, part.task, part.texts, setting.bits, setting.group_size, seed]
    key += [] if setting.pattern is None else [setting.pattern]
    key += [] if setting.ratio is None else [setting.ratio]
    key += [] if setting.cut is None else [setting.cut]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    words = f"{part.name} {setting.name} {tool.name} {found.get(tool.package, '')} seed{seed} {digest}"
    return cache_root() / f"{words.replace(' ', '_')}.json"


def result(
    tool: Tool, part: Part, setting: Setting, seed: int, windows: Path, threads: int, kept_ours: bool
) -> dict:
    """One cell from the cache, or measured now; llmcomp's own is taken from it only with `kept_ours`."""
    path = cell_path(tool, part, setting, seed)
    if path.exists() and (kept_ours or tool.package != OURS):
        kept: dict = json.loads(path.read_text())
        return kept
    row = measure(tool, part, setting, windows, threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row))
    note = row["failed"].splitlines()[-1] if "failed" in row else f"{row['seconds']:.1f} s"
    print(f"{part.name} | {setting.name} | {tool.name} | seed {seed}: {note}", file=sys.stderr, flush=True)
    return row


# ---------------------------------------------------------------- tables


def stacked(rows: list[dict], text: str) -> np.ndarray | None:
    """Scores of one tool over seeds: [seeds, windows] or [seeds, sentences, labels]; None if any failed."""
    if any("failed" in row for row in rows):
        return None
    return np.array([row["scores"][text] for row in rows])


def compared(values: dict[str, np.ndarray], relative: bool, own: str | None = None) -> str:
    """llmcomp (`auto` or ALPS, if it ran) minus the peer with the lowest mean, with its paired interval, as a cell; or
    the method `own` minus the best of all others."""
    known = (AUTO, OURS, "llmcomp alps", "llmcomp sparsegpt")
    ours = own or next((name for name in known if name in values), OURS)
    peers = {
        name: value for name, value in values.items()
        if "rtn" not in name and (name != own if own else TOOLS[name].package != OURS)
    }  # fmt: skip
    if ours not in values or not peers:
        return "–"
    best = min(peers, key=lambda name: peers[name].mean())
    interval = paired_interval(values[ours], peers[best])
    if relative:
        shown = percent(interval)
        return f"{shown.mean:+.2f}% [{shown.low:+.2f}, {shown.high:+.2f}] vs {best}"
    return f"{interval.mean:+.2e} [{interval.low:+.2e}, {interval.high:+.2e}] vs {best}"


def lm_table(part: Part, tools: list[str], results: dict, dense: dict[str, list]) -> str:
    """Mean perplexity over seeds (exp of the mean loss) per setting and text, and the paired difference."""
    rows = []
    for setting in part.settings:
        for text in part.texts:
            values = {}
            for name in tools:
                array = stacked(results.get((setting.name, name), [{"failed": "not run"}]), text)
                if array is not None:
                    values[name] = array
            shown = [f"{np.exp(values[n].mean()):.2f}" if n in values else "refused" for n in tools]
            rows.append(
                [setting.name, text, f"{np.exp(np.mean(dense[text])):.2f}", *shown, compared(values, True, part.ours)]
            )
    against = "llmcomp − best peer" if part.ours is None else f"{part.ours} − best other"
    return markdown(["setting", "text", "dense", *tools, f"{against} (perplexity, 95%)"], rows)


def sst2_table(part: Part, tools: list[str], results: dict, dense: dict[str, list]) -> str:
    """Accuracy and its difference from the original's in points, mean and 99th-percentile KL from the original,
    agreement with it, per setting and tool."""
    rows = []
    original = np.array(dense["sst2"])
    labels = sentence_labels(assets_root() / part.texts["sst2"])
    before = original.argmax(-1) == labels
    for setting in part.settings:
        divergences, cells = {}, {}
        for name in tools:
            logits = stacked(results.get((setting.name, name), [{"failed": "not run"}]), "sst2")
            if logits is None:
                cells[name] = ["refused", *["–"] * 4]
                continue
            kl = np.stack([sentence_kl(original, one) for one in logits])
            agree = (logits.argmax(-1) == original.argmax(-1)).mean()
            after = logits.argmax(-1) == labels
            lost = paired_interval(100.0 * after, np.broadcast_to(100.0 * before, after.shape))
            divergences[name] = kl
            cells[name] = [
                f"{after.mean():.2%}", f"{lost.mean:+.2f} [{lost.low:+.2f}, {lost.high:+.2f}]",
                f"{kl.mean():.2e}", f"{np.percentile(kl, 99):.2e}", f"{agree:.2%}",
            ]  # fmt: skip
        for name in tools:
            note = compared(divergences, False, part.ours) if name == (part.ours or OURS) else ""
            rows.append([setting.name, name, *cells[name], note])
    head = ["setting", "tool", "accuracy", "points − original (95%)", "KL mean", "KL p99", "agreement"]
    against = "llmcomp − best peer" if part.ours is None else f"{part.ours} − best other"
    return f"Original: accuracy {before.mean():.2%}.\n\n" + markdown([*head, f"KL, {against} (95%)"], rows)


def run_part(part: Part, tools: list[str], threads: int, seeds: Sequence[int], kept_ours: bool) -> str:
    """Measure what is missing of one part and return its table."""
    results: dict[tuple[str, str], list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = [windows_file(part, seed, Path(folder)) for seed in seeds]
        dense = score(assets_root() / part.model, part, Path(sys.executable), "transformers", threads)
        for setting in part.settings:
            for seed, windows in zip(seeds, files, strict=True):
                for name in tools:
                    row = result(TOOLS[name], part, setting, seed, windows, threads, kept_ours)
                    results.setdefault((setting.name, name), []).append(row)
    table = lm_table if part.task == "causal-lm" else sst2_table
    return table(part, tools, results, dense)


def main(argv: list[str] | None = None) -> int:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=tuple(PARTS), action="append", help="default: all")
    parser.add_argument("--tools", nargs="+", choices=tuple(TOOLS), help="default: those the part names")
    parser.add_argument("--settings", nargs="+", help='for example "3-bit g128"; default: all of the part')
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="default: all three")
    parser.add_argument("--kept", action="store_true", help="take llmcomp's cells from the cache, too")
    args = parser.parse_args(argv)
    print(json.dumps(machine(args.threads)))
    for name in args.part or PARTS:
        part = PARTS[name]
        if args.settings:
            kept = tuple(setting for setting in part.settings if setting.name in args.settings)
            part = Part(**{**vars(part), "settings": kept})
        tools = list(args.tools or part.tools)
        print(f"\n## {part.name}\n\n{run_part(part, tools, args.threads, args.seeds, args.kept)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
