"""Milliseconds of one product on every route of `llmcomp.kernels`, beside the dense one, taking turns.

    python -m evals.kernels [--threads 1] [--size 2048] [--rows 1 16 32 64 128 512] [--repeats 7]

The table in llmcomp/kernels/__init__.py and the thresholds of llmcomp/kernels/tiles.py come from here. Each round
times every route once, so that what else the machine does falls on all of them; medians are shown, and below them
their ratio to the fastest dense route.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.common import markdown
from llmcomp import packing
from llmcomp.kernels import KERNELS, int4, int8, tiles
from llmcomp.kernels.tiles import Grid
from llmcomp.measure.machine import this_machine
from llmcomp.schemes import Scheme

GROUP = 128


def routes(rows: int, size: int) -> dict[str, Callable[[], Tensor]]:
    """{route: a product of [rows, size] by a weight [size, size]}."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, size, generator=generator)
    half, dense = x.bfloat16(), torch.randn(size, size, generator=generator)
    values = torch.randint(-8, 8, (size, size), generator=generator, dtype=torch.int8)
    grid = Grid(Scheme(4, GROUP), size, torch.full((size, size // GROUP), 0.01).bfloat16(), None, None)
    held = KERNELS["int4"].hold(packing.pack_blocks(values), grid)
    ones, dense16 = torch.ones(size).bfloat16(), dense.bfloat16()
    flat, compute = held["packed"].view(size, size // 2), tiles.product_dtype()
    integers = values.to(torch.int8)
    return {
        "dense float32": lambda: x @ dense.t(),
        "dense bf16": lambda: F.linear(half, dense16),
        "int4pack": lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(half, flat, GROUP, held["scales"]),
        "int4 by tiles": lambda: int4._by_tiles(x.to(compute), held["packed"], held["scales"]),
        "int8pack": lambda: torch.ops.aten._weight_int8pack_mm(half, integers, ones),
        "int8 by tiles": lambda: int8.by_tiles(x.to(compute), integers),
        "_int_mm": lambda: torch._int_mm(x.to(torch.int8), integers.t()),
    }


def medians(rows: int, size: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each route."""
    taken: dict[str, list[float]] = {}
    made = routes(rows, size)
    for turn in range(repeats + 1):
        for name, route in made.items():
            start = time.perf_counter()
            route()
            if turn:
                taken.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(one) for name, one in taken.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 32, 64, 128, 512])
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    machine = this_machine()
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{machine.cpu}, {capability}, {given.threads} thread(s), torch {torch.__version__}")
    few = ", ".join(f"{tiles.few_rows(bits)} of INT{bits}" for bits in (8, 4))
    print(f"few rows: up to {few}; tiles in {tiles.product_dtype()}\n")
    table = {rows: medians(rows, given.size, given.repeats) for rows in given.rows}
    names = list(table[given.rows[0]])
    lines = [[str(rows), *(f"{one[name]:.2f}" for name in names)] for rows, one in table.items()]
    print(markdown(["rows", *names], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
