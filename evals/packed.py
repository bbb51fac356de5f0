"""Packed checkpoints side by side: decode, prefill, load and memory on a 1.1B Llama shape and on BERT-base's.

    python -m evals.packed [--shape llama bert] [--layers N] [--threads 1 2] [--rounds 3] [--compile]
                           [--llama-cpp PYTHON] [--onnx] [--only NAME …]

Each figure comes from a fresh process of the code behind `llmcomp bench`; contenders take turns round by round, each
second round in the opposite order. Cells: the median over rounds, and in brackets its ratio to dense bf16, formed
round by round, with the bootstrap's 95% interval. A second table puts llmcomp beside the best Python peer, which is
chosen column by column by its median. `--layers` makes both shapes shallower, for small machines. `--llama-cpp` is the
interpreter of an environment with torch, psutil and llama-cpp-python; `--onnx` runs llmcomp's own ONNX exports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.common import cache_root, markdown
from evals.packed_models import BASE, OURS, PEERS, SHAPES, Shape, contenders, subject
from evals.process import machine, versions
from evals.setup_peers import peer_python
from llmcomp.errors import LlmcompError
from llmcomp.measure.bench import Subject, read_into_cache, take_turns
from llmcomp.measure.bench_process import Job, Sample
from llmcomp.measure.figures import LIMIT, Figure, Ratio, figures, ratios
from llmcomp.progress import Silent

PACKAGES = ["llmcomp", "torch", "transformers", "bitsandbytes", "onnxruntime"]
Figures = tuple[Figure, ...]


@dataclass(frozen=True)
class Column:
    """A figure with its unit, and what it is divided by to be read; `more` is better, or less is."""

    title: str
    figure: str
    unit: str
    scale: float = 1.0
    more: bool = False


def columns(shape: Shape, new_tokens: int) -> list[Column]:
    """What the tables show of a shape."""
    if shape.writes:
        timed = [Column("decode, tokens/s", f"decode 1 × {new_tokens}", "tokens/s", more=True)]
        timed += [
            Column(f"prefill {tokens}, tokens/s", f"prefill {batch} × {tokens}", "tokens/s", more=True)
            for batch, tokens in shape.inputs
        ]
    else:
        timed = [
            Column(f"{batch} × {tokens}, samples/s", f"forward {batch} × {tokens}", "samples/s", more=True)
            for batch, tokens in shape.inputs
        ]
    return [
        *timed,
        Column("load + first forward, s", "load and first forward", "s"),
        Column("resident, MB", "memory in use", "bytes", 1e6),
        Column("blocks, MB", "those of the blocks", "bytes", 1e6),
    ]


def cell(own: Figures, base: Figures, column: Column) -> str:
    """'12.3 (2.90 [2.81, 3.02])', a figure with its ratio; '–' where it is not known."""
    found = next((one for one in own if (one.name, one.unit) == (column.figure, column.unit)), None)
    if found is None:
        return "–"
    value = found.median / column.scale
    text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return " ".join([text, *(f"({quotient(ratio)})" for ratio in ratios([found], base))])


def quotient(ratio: Ratio) -> str:
    """'2.90 [2.81, 3.02]'; a single round has no interval."""
    spread = f" [{ratio.low:.2f}, {ratio.high:.2f}]" if len(ratio.rounds) > 1 else ""
    return f"{ratio.median:.2f}{spread}"


def against_base(found: Mapping[str, Figures], shown: Sequence[Column]) -> str:
    """All contenders, with ratios to dense bf16, and how near decoding comes to reading weights at memory's speed."""
    limit = any(one.name == LIMIT for own in found.values() for one in own)
    rows = []
    for name, own in found.items():
        row = [name, *(cell(own, () if name == BASE else found.get(BASE, ()), column) for column in shown)]
        share = next((f"{one.median:.0%}" for one in own if one.name == LIMIT), "–")
        rows.append([*row, share] if limit else row)
    return markdown(["", *(column.title for column in shown), *(["of memory's limit"] if limit else [])], rows)


def best_peer(found: Mapping[str, Figures], column: Column) -> str | None:
    """The Python peer with the best median of a figure; None where none has it."""
    medians = {
        name: one.median
        for name in PEERS
        for one in found.get(name, ())
        if (one.name, one.unit) == (column.figure, column.unit)
    }
    if not medians:
        return None
    return (max if column.more else min)(medians, key=lambda name: medians[name])


def against_peers(found: Mapping[str, Figures], shown: Sequence[Column]) -> str:
    """llmcomp's rows as ratios to the best Python peer of each column."""
    best = {column.title: best_peer(found, column) for column in shown}
    rows = []
    for name in [one for one in OURS.values() if one in found]:
        cells = []
        for column in shown:
            base = found.get(best[column.title] or "", ())
            wanted = [one for one in found[name] if (one.name, one.unit) == (column.figure, column.unit)]
            ratio = next(iter(ratios(wanted, base)), None)
            cells.append(quotient(ratio) if ratio else "–")
        rows.append([name, *cells])
    rows.append(["the best peer", *(best[column.title] or "–" for column in shown)])
    return markdown(["", *(column.title for column in shown)], rows)


def gathered(
    subjects: Sequence[Subject], threads: Sequence[int], rounds: int
) -> tuple[dict[int, dict[str, Figures]], dict[str, str]]:
    """{threads: {contender: figures}}, and why any could not be measured."""
    samples: dict[tuple[int, str], list[Sample]] = {}
    refused: dict[str, str] = {}

    def note(one: Subject, error: LlmcompError) -> None:
        refused[one.name] = str(error)
        say(f"{one.name}: {error}")

    read_into_cache(file for one in subjects for file in Path(one.job.directory).iterdir())
    for one, count, sample in take_turns(subjects, threads, rounds, Silent(), note):
        samples.setdefault((count, one.name), []).append(sample)
        say(f"{one.name}, threads {count}: ready after {sample.ready_seconds:.1f} s")
    whole = [one.name for one in subjects if one.name not in refused]
    return {count: {name: figures(samples[count, name]) for name in whole} for count in threads}, refused


def ready(shape: Shape, args: argparse.Namespace) -> tuple[list[Subject], dict[str, str]]:
    """The contenders whose checkpoints are there or could be made, and why others are not."""
    layers = args.layers or shape.layers
    job = Job("", 1, shape.inputs, args.new_tokens if shape.writes else 0, args.repeats, compile=args.compile)
    subjects, refused = [], {}
    for name in contenders(shape, args.llama_cpp is not None, args.onnx):
        if args.only and name not in (BASE, *args.only):
            continue
        say(f"{shape.name}: {name}")
        try:
            subjects.append(subject(name, shape, layers, job, args.llama_cpp))
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            said = getattr(error, "stderr", None) or str(error)
            refused[name] = said.strip().splitlines()[-1]
            say(f"{name}: {refused[name]}")
    return subjects, refused


def say(line: str) -> None:
    """Progress, on stderr; the tables alone go to stdout."""
    print(line, file=sys.stderr, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--layers", type=int, help="default: 22 and 12")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="of each thing in one process")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--compile", action="store_true", help="all through torch.compile")
    parser.add_argument("--llama-cpp", type=lambda path: Path(path).absolute(), metavar="PYTHON")
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"these contenders and {BASE}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print the tables as markdown."""
    args = parse(argv)
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # fewer, and it does not start
    cache = cache_root().absolute()
    cache.mkdir(parents=True, exist_ok=True)
    os.environ["LLMCOMP_EVAL_CACHE"] = str(cache)
    os.chdir(cache)  # gptqmodel makes a folder for logs where it stands
    print(json.dumps(machine(max(args.threads))))
    print(json.dumps(versions(Path(sys.executable), PACKAGES)))
    if peer_python("gptqmodel").exists():
        print(json.dumps(versions(peer_python("gptqmodel"), ["gptqmodel", "torch", "transformers"])))
    if args.llama_cpp:
        print(json.dumps(versions(args.llama_cpp, ["llama-cpp-python"])))
    for name in args.shape:
        shape = SHAPES[name]
        subjects, unmade = ready(shape, args)
        found, refused = gathered(subjects, args.threads, args.rounds)
        shown = columns(shape, args.new_tokens)
        how = "torch.compile" if args.compile else "eager"
        for count, by_name in found.items():
            layers = args.layers or shape.layers
            print(f"\n{shape.name}, {layers} layers; threads: {count}; {how}; rounds: {args.rounds}\n")
            print(against_base(by_name, shown))
            print(f"\nOver the best Python peer; threads: {count}\n")
            print(against_peers(by_name, shown), flush=True)
        for one, why in {**unmade, **refused}.items():
            print(f"\n{one} was not measured: {why}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
