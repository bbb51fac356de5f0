"""Samples of several rounds as figures with their spread, and the ratios of two checkpoints.

Of a process's repeats the median counts, of the rounds the median with the lowest and the highest: a handful of
rounds has no finer quantiles. A ratio is formed in each round by itself, which takes out what both met alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmcomp.measure.bench_process import DECODE, FORWARD, PREFILL, Sample, Timing
from llmcomp.measure.bootstrap import interval

BANDWIDTH, LIMIT = "read bandwidth", "decode, share of memory's limit"


@dataclass(frozen=True)
class Figure:
    """One thing measured: the median of the rounds with the lowest and the highest.

    Attributes:
        unit: 'tokens/s', 'samples/s', 's', 'bytes', 'bytes/s' or 'share'.
        rounds: each the median of that process's repeats.
    """

    name: str
    unit: str
    rounds: tuple[float, ...]
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """A figure over the other checkpoint's: the median of the rounds' pairs with its 95% interval.

    A type of its own, though its fields have a figure's names: `low` and `high` are what the median lies between and no
    round's, and the numbers have no unit. So it is neither shown as a figure is, nor can a ratio of it be formed.

    Attributes:
        unit: of the figure, whose name with it tells figures apart.
        rounds: the quotients.
    """

    name: str
    unit: str
    rounds: tuple[float, ...]
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """A checkpoint with one number of threads; `ratios` are empty where there is nothing to compare with."""

    name: str
    threads: int
    figures: tuple[Figure, ...]
    ratios: tuple[Ratio, ...] = ()


def figures(samples: Sequence[Sample]) -> tuple[Figure, ...]:
    """What rounds of one checkpoint with one number of threads say.

    Args:
        samples: one a round, of the same job.
    """
    rows = [dict(_values(sample)) for sample in samples]
    return tuple(_figure(name, unit, [row[name, unit] for row in rows]) for name, unit in rows[0])


def ratios(own: Iterable[Figure], others: Iterable[Figure]) -> tuple[Ratio, ...]:
    """Each figure over the one of the same name and unit, round by round; what either lacks is left out.

    The bandwidth is the machine's, and the share of the limit is a ratio already: neither is compared.
    """
    known = {(figure.name, figure.unit): figure for figure in others}
    found = []
    for figure in own:
        other = known.get((figure.name, figure.unit))
        if other is None or figure.name in (BANDWIDTH, LIMIT) or min(other.rounds) <= 0:
            continue
        pairs = np.array([mine / theirs for mine, theirs in zip(figure.rounds, other.rounds, strict=True)])
        middle = float(np.median(pairs))
        bounds = interval(lambda drawn: np.median(drawn, axis=-1), middle, pairs)
        found.append(Ratio(figure.name, figure.unit, tuple(pairs.tolist()), middle, bounds.low, bounds.high))
    return tuple(found)


def _values(sample: Sample) -> Iterator[tuple[tuple[str, str], float]]:
    """((name, unit), value) of one process."""
    for timing in sample.timings:
        yield from _of_timing(timing)
    if (share := limit_share(sample)) is not None:
        yield (LIMIT, "share"), share
    yield ("load", "s"), sample.load_seconds
    yield ("load and first forward", "s"), sample.ready_seconds
    if sample.compile_seconds is not None:
        yield ("compile", "s"), sample.compile_seconds
    yield ("memory when loaded", "bytes"), sample.resident_loaded
    yield ("memory in use", "bytes"), sample.resident
    yield ("peak memory", "bytes"), sample.peak
    if sample.holding is not None:
        yield ("parameters and buffers", "bytes"), sample.holding.tensors
        if sample.holding.blocks is not None:
            yield ("those of the blocks", "bytes"), sample.holding.blocks
    if sample.bandwidth is not None:
        yield (BANDWIDTH, "bytes/s"), sample.bandwidth


def _of_timing(timing: Timing) -> Iterator[tuple[tuple[str, str], float]]:
    seconds = statistics.median(timing.seconds)
    name = f"{timing.measure} {timing.batch} × {timing.tokens}"
    if timing.measure == FORWARD:
        yield (name, "samples/s"), timing.batch / seconds
        yield (name, "s"), seconds
        return
    yield (name, "tokens/s"), timing.batch * timing.tokens / seconds
    if timing.measure == PREFILL:
        yield (f"first token after {timing.batch} × {timing.tokens}", "s"), seconds


def limit_share(sample: Sample) -> float | None:
    """How near decoding comes to reading its weights at the speed of memory: 1 is as fast as that.

    None where nothing was decoded, where it cannot be told what a token reads, and where the weights fit into the
    last-level cache, so that memory is no limit to them. Of several batch sizes the smallest counts.
    """
    steps = [timing for timing in sample.timings if timing.measure == DECODE]
    read = None if sample.holding is None else sample.holding.read
    if not steps or not read or sample.bandwidth is None or read <= sample.cache:
        return None
    one = min(steps, key=lambda timing: timing.batch)
    return (read / sample.bandwidth) / (statistics.median(one.seconds) / one.tokens)


def _figure(name: str, unit: str, values: Sequence[float]) -> Figure:
    return Figure(name, unit, tuple(values), statistics.median(values), min(values), max(values))
