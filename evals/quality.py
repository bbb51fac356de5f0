"""Quality side by side: every tool on the same model, windows and text; markdown tables on stdout.

    python -m evals.quality [--part lm|lm-sparse|lm-together|lm-lowrank|lm-pruned|sst2|sst2-sparse|sst2-lowrank|…]
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
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from evals.common import (
    SEEDS,
    assets_root,
    cache_root,
    calibration_rows,
    calibration_windows,
    markdown,
    padded_tokens,
    paired_interval,
    percent,
    sentence_kl,
    sentence_labels,
)
from evals.parts import AUTO, OURS, PARTS, TOOLS, Part, Setting, Tool
from evals.process import RunFailed, environment, machine, run, versions

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
    rows = calibration_rows(data / "sst2" / "train.jsonl", seed)
    save_file(padded_tokens(model, [row["sentence"] for row in rows]), path)
    lines = [json.dumps(row) for row in rows]
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


def standing(names: Iterable[str], own: str | None) -> str:
    """The tool that stands against the peers: `own`, else of those that ran the first of ours that is meant to."""
    known = (AUTO, OURS, "llmcomp alps", "llmcomp sparsegpt")
    return own or next((name for name in known if name in names), OURS)


def compared(values: dict[str, np.ndarray], relative: bool, own: str | None = None) -> str:
    """llmcomp (`auto` or ALPS, if it ran) minus the peer with the lowest mean, with its paired interval, as a cell; or
    the method `own` minus the best of all others."""
    ours = standing(values, own)
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
            note = compared(divergences, False, part.ours) if name == standing(divergences, part.ours) else ""
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
