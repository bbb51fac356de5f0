"""Time and peak memory side by side on a 1.1B Llama shape, 32 x 512 tokens: GPTQ INT4 g128, or SparseGPT 2:4.

    python -m evals.speed [--work gptq|sparsegpt] [--layers 22] [--rounds 1] [--threads 2] [--depth-check]
                          [--tune-layers 2]

Every tool first runs on a two-layer model of the same shape as a warm-up (one of them compiles an extension
at its first run), every peer then at several batch sizes, of which it keeps its fastest. Then the tools run
one after the other, round by round, so that a drift of the machine meets all of them. Seconds are checkpoint
in to checkpoint out without imports, those of the processor are of all threads between the same marks; memory is
anonymous resident memory above its value after imports (`evals/process.py`); mapped pages apart. Ratios are
llmcomp over the fastest and over the leanest peer. gptqmodel has no SparseGPT.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from evals.common import cache_root, markdown
from evals.make_model import make_model, make_windows
from evals.process import Measured, RunFailed, machine, run, versions
from evals.setup_peers import PEERS, TORCH, peer_python

OURS = "llmcomp"
BATCH_SIZES = (1, 4, 16, 32)
DEPTHS = (4, 8)
MB = 1e6


@dataclass(frozen=True)
class Contender:
    """A row of the table: a tool and what its command line gets besides the job."""

    name: str
    package: str
    extra: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        """The interpreter that has the tool."""
        return Path(sys.executable) if self.package == OURS else peer_python(self.package)


@dataclass(frozen=True)
class Work:
    """What the tools do: its title, what every tool's command line gets, and the peers that can."""

    title: str
    words: tuple[str, ...]
    peers: tuple[str, ...]


WORKS = {
    "gptq": Work("GPTQ INT4 g128", ("--method", "gptq"), ("llmcompressor", "gptqmodel")),
    "sparsegpt": Work("SparseGPT 2:4", ("--method", "sparsegpt", "--pattern", "2:4"), ("llmcompressor",)),
}
CONTENDERS = (
    Contender("llmcomp", OURS, ("--no-verify",)),
    Contender("llmcomp, verified", OURS),
    *(Contender(peer, peer) for peer in PEERS if peer != "auto_round"),  # it has no GPTQ; see evals.learned
)


def checkpoint(layers: int) -> Path:
    """The model of that depth, written once into the cache folder."""
    folder = cache_root() / f"llama-1.1b-shape-{layers}-layers"
    if not (folder / "config.json").exists():
        make_model(folder, layers)
    return folder


def calibration() -> Path:
    """The token ids that every tool reads, written once into the cache folder."""
    path = cache_root() / "windows-32x512.safetensors"
    if not path.exists():
        cache_root().mkdir(parents=True, exist_ok=True)
        make_windows(path)
    return path


def once(work: Work, contender: Contender, layers: int, batch_size: int, threads: int) -> Measured:
    """One run of one tool at one depth; its checkpoint is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--model", str(checkpoint(layers)), "--windows", str(calibration())]
        arguments += ["--output", str(Path(folder) / "out"), "--batch-size", str(batch_size)]
        arguments += [*work.words, "--threads", str(threads), *(f"--extra={word}" for word in contender.extra)]
        return run(contender.python, f"evals.peers.{contender.package}_run", arguments, threads)


def fastest_batch(work: Work, contender: Contender, layers: int, threads: int) -> int:
    """The batch size at which a peer is fastest on the shallow model, measured after one warm-up run."""
    once(work, contender, layers, BATCH_SIZES[0], threads)
    if contender.package == OURS:
        return BATCH_SIZES[0]  # not passed on: llmcomp has its own default
    seconds = {}
    for size in BATCH_SIZES:
        try:
            seconds[size] = once(work, contender, layers, size, threads).seconds
        except RunFailed as error:
            say(f"{contender.name}, batch {size}: {error}")
    if not seconds:
        raise RunFailed(f"{contender.name} ran at none of the batch sizes {BATCH_SIZES}")
    say(f"{contender.name}: seconds by batch size {seconds}")
    return min(seconds, key=lambda size: seconds[size])


def say(line: str) -> None:
    """Progress, on stderr; the tables alone go to stdout."""
    print(line, file=sys.stderr, flush=True)


def interleaved(
    work: Work, contenders: list[Contender], batches: dict[str, int], args: argparse.Namespace
) -> dict[str, list[Measured]]:
    """`rounds` runs of every contender, in turn."""
    found: dict[str, list[Measured]] = {contender.name: [] for contender in contenders}
    for turn in range(args.rounds):
        for contender in contenders:
            measured = once(work, contender, args.layers, batches[contender.name], args.threads)
            found[contender.name].append(measured)
            say(f"round {turn + 1}: {contender.name}: {json.dumps(asdict(measured))}")
    return found


def speed_table(found: dict[str, list[Measured]], batches: dict[str, int]) -> str:
    """Median seconds, of the clock and of the processor, largest memory, and each row over the best peer's."""
    peers = [name for name in found if name in PEERS]

    def seconds(name: str) -> float:
        return statistics.median(m.seconds for m in found[name])

    def processor(name: str) -> float:
        return statistics.median(m.processor_seconds for m in found[name])

    def memory(name: str) -> int:
        return max(m.peak_anonymous for m in found[name])

    fastest = min(map(seconds, peers), default=None)
    thriftiest = min(map(processor, peers), default=None)
    leanest = min(map(memory, peers), default=None)
    rows = []
    for name, runs in found.items():
        rows.append(
            [
                name,
                str(batches[name]) if name in PEERS else "own",
                f"{seconds(name):.1f}",
                f"{seconds(name) / fastest:.3f}" if fastest else "–",
                f"{processor(name):.1f}",
                f"{processor(name) / thriftiest:.3f}" if thriftiest else "–",
                f"{memory(name) / MB:,.0f}",
                f"{memory(name) / leanest:.3f}" if leanest else "–",
                f"{max(m.peak_mapped for m in runs) / MB:,.0f}",
                f"{max(m.missed for m in runs) / MB:.1f}",
                f"{max(m.process_seconds for m in runs):.1f}",
            ]
        )
    header = ["tool", "batch", "seconds", "of fastest peer", "processor seconds", "of thriftiest peer"]
    header += ["peak anonymous MB", "of leanest peer"]
    return markdown([*header, "mapped MB", "missed by sampling MB", "whole process s"], rows)


def depth_table(work: Work, contenders: list[Contender], batches: dict[str, int], threads: int) -> str:
    """Peak anonymous memory at 4 and 8 layers, and their ratio (1 when depth costs nothing)."""
    rows = []
    for contender in contenders:
        peaks = [once(work, contender, n, batches[contender.name], threads).peak_anonymous for n in DEPTHS]
        rows.append([contender.name, *(f"{p / MB:,.0f}" for p in peaks), f"{peaks[1] / peaks[0]:.3f}"])
    return markdown(["tool", *(f"{n} layers, MB" for n in DEPTHS), "ratio"], rows)


def main(argv: list[str] | None = None) -> int:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", choices=tuple(WORKS), default="gptq")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tune-layers", type=int, default=2, help="depth at which batch sizes are tried")
    parser.add_argument(
        "--batch-size", type=int, help="use this one for every peer instead of trying several"
    )
    parser.add_argument("--tools", nargs="+", choices=[c.name for c in CONTENDERS], help="default: all")
    parser.add_argument("--depth-check", action="store_true", help=f"only compare memory at depths {DEPTHS}")
    args = parser.parse_args(argv)
    work = WORKS[args.work]
    able = [c for c in CONTENDERS if c.package in (OURS, *work.peers)]
    contenders = [c for c in able if not args.tools or c.name in args.tools]
    print(json.dumps(machine(args.threads)))
    for package in dict.fromkeys(c.package for c in contenders):
        python = next(c.python for c in contenders if c.package == package)
        print(json.dumps(versions(python, [package, "torch", "transformers", "compressed-tensors"])))
    if args.batch_size:
        batches = {c.name: args.batch_size for c in contenders}
    else:
        batches = {c.name: fastest_batch(work, c, args.tune_layers, args.threads) for c in contenders}
    print(f"\n{work.title}, {args.layers} layers of the 1.1B shape, 32 x 512 tokens, {TORCH}\n", flush=True)
    if args.depth_check:
        print(depth_table(work, contenders, batches, args.threads))
    else:
        print(speed_table(interleaved(work, contenders, batches, args), batches))
    return 0


if __name__ == "__main__":
    sys.exit(main())
