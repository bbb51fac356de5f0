"""Time of learned rounding side by side: llmcomp's SignRound and auto-round at the same iterations and batch.

    python -m evals.learned [--model models/lm] [--bits 2] [--group-size 64] [--iterations 200] [--rounds 1]

Both read the same 64 windows of 256 tokens, `--batch-size` of them a step (0: each tool's own), one
tool after the other, round by round. Seconds are checkpoint in to checkpoint out without imports.
Processor seconds are printed beside them: on a machine that others use at the same time they say more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from evals.common import assets_root, markdown
from evals.parts import PARTS
from evals.process import Measured, machine, run, versions
from evals.quality import windows_file
from evals.setup_peers import peer_python

# name → (package, method)
TOOLS = {
    "llmcomp signround": ("llmcomp", "signround"),
    "llmcomp gptq-signround": ("llmcomp", "gptq-signround"),
    "auto-round": ("auto_round", "signround"),
}
PEER = "auto-round"


def once(name: str, windows: Path, args: argparse.Namespace) -> Measured:
    """One run of one tool; its checkpoint is thrown away."""
    package, method = TOOLS[name]
    python = Path(sys.executable) if package == "llmcomp" else peer_python(package)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--model", str(assets_root() / args.model), "--windows", str(windows), "--method", method]
        words += ["--bits", str(args.bits), "--group-size", args.group_size, "--batch-size", str(args.batch_size)]
        words += ["--iterations", str(args.iterations), "--threads", str(args.threads)]
        words += ["--output", str(Path(folder) / "out"), *(["--extra=--no-verify"] if package == "llmcomp" else [])]
        return run(python, f"evals.peers.{package}_run", words, args.threads)


def table(found: dict[str, list[Measured]]) -> str:
    """Medians, and each over the peer's."""
    def median(name: str, field: str) -> float:
        return statistics.median(getattr(one, field) for one in found[name])

    rows = []
    for name in found:
        cells = [name]
        for field in ("seconds", "processor_seconds"):
            share = f"{median(name, field) / median(PEER, field):.3f}" if PEER in found else "–"
            cells += [f"{median(name, field):.1f}", share]
        rows.append([*cells, f"{max(one.peak_anonymous for one in found[name]) / 1e6:,.0f}"])
    header = ["tool", "seconds", "of auto-round's", "processor seconds", "of auto-round's", "peak anonymous MB"]
    return markdown(header, rows)


def main(argv: list[str] | None = None) -> int:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/lm", help="below LLMCOMP_ASSETS")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", default="64")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tools", nargs="+", choices=tuple(TOOLS), default=list(TOOLS))
    args = parser.parse_args(argv)
    print(json.dumps(machine(args.threads)))
    print(json.dumps(versions(peer_python("auto_round"), ["auto_round", "torch", "transformers"])))
    found: dict[str, list[Measured]] = {name: [] for name in args.tools}
    with tempfile.TemporaryDirectory() as folder:
        windows = windows_file(PARTS["lm"], 0, Path(folder))
        for _ in range(args.rounds):
            for name in args.tools:
                found[name].append(once(name, windows, args))
                print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    batch = f"batches of {args.batch_size} windows" if args.batch_size else "batches of each tool's own size"
    print(f"\n{args.bits} bits, {args.iterations} iterations over {batch}\n\n{table(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
