"""Figures and ratios of samples that are given."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcomp.measure.bench_process import Sample, Timing
from llmcomp.measure.figures import BANDWIDTH, LIMIT, Figure, figures, limit_share, ratios
from llmcomp.measure.holding import Holding
from llmcomp.report.schema import Machine

MACHINE = Machine("cpu", 1, 2**34, "cpu", {})
SAMPLE = Sample(
    2.0, 2.5,
    (Timing("prefill", 2, 100, (4.0, 1.0, 2.0)), Timing("decode", 2, 10, (5.0, 5.0, 8.0)),
     Timing("decode", 1, 10, (2.0, 2.0, 9.0))),
    700, 800, 900, Holding(600, 500, 400), 1000.0, None, 300, "AVX512", MACHINE,
)  # fmt: skip
ENCODER = replace(SAMPLE, timings=(Timing("forward", 32, 128, (4.0, 2.0, 1.0)),))


def table(samples: list[Sample]) -> dict[tuple[str, str], Figure]:
    return {(figure.name, figure.unit): figure for figure in figures(samples)}


def test_units() -> None:
    found = {key: figure.median for key, figure in table([SAMPLE]).items()}
    assert found == {
        ("prefill 2 × 100", "tokens/s"): 100.0,
        ("first token after 2 × 100", "s"): 2.0,
        ("decode 2 × 10", "tokens/s"): 4.0,
        ("decode 1 × 10", "tokens/s"): 5.0,
        (LIMIT, "share"): pytest.approx((400 / 1000) / 0.2),
        ("load", "s"): 2.0,
        ("load and first forward", "s"): 2.5,
        ("memory when loaded", "bytes"): 700,
        ("memory in use", "bytes"): 800,
        ("peak memory", "bytes"): 900,
        ("parameters and buffers", "bytes"): 600,
        ("those of the blocks", "bytes"): 500,
        (BANDWIDTH, "bytes/s"): 1000.0,
    }


def test_an_encoder_has_rows_and_their_time() -> None:
    found = table([ENCODER])
    assert found["forward 32 × 128", "samples/s"].median == 16.0
    assert found["forward 32 × 128", "s"].median == 2.0
    assert not any("decode" in name for name, _ in found)


def test_spread_is_over_rounds() -> None:
    figure = table([replace(SAMPLE, load_seconds=seconds) for seconds in (3.0, 1.0, 2.0)])["load", "s"]
    assert (figure.rounds, figure.median, figure.low, figure.high) == ((3.0, 1.0, 2.0), 2.0, 1.0, 3.0)


def test_time_of_compiling_where_it_was_asked_for() -> None:
    assert ("compile", "s") not in table([SAMPLE])
    assert table([replace(SAMPLE, compile_seconds=7.0)])["compile", "s"].median == 7.0


@pytest.mark.parametrize(
    "without",
    [
        {"bandwidth": None},
        {"holding": None},
        {"holding": Holding(600, 500, None)},
        {"cache": 400},  # the weights fit into it
        {"timings": (SAMPLE.timings[0],)},
    ],
    ids=["no bandwidth", "nothing known of tensors", "experts", "in the cache", "nothing decoded"],
)
def test_no_limit_is_told_where_there_is_none(without: dict) -> None:
    assert limit_share(SAMPLE) == pytest.approx(2.0)
    assert limit_share(replace(SAMPLE, **without)) is None


def test_ratios_are_of_pairs() -> None:
    own = table([replace(SAMPLE, load_seconds=seconds) for seconds in (2.0, 20.0, 6.0)])
    other = table([replace(SAMPLE, load_seconds=seconds) for seconds in (1.0, 10.0, 1.0)])
    found = {ratio.name: ratio for ratio in ratios(own.values(), other.values())}
    # Of the medians it would be 6: pairs take out what a round did to both.
    assert found["load"].rounds == (2.0, 2.0, 6.0) and found["load"].median == 2.0
    assert found["load"].low == 2.0 and found["load"].high == 6.0
    assert found["peak memory"].median == found["peak memory"].high == 1.0
    assert BANDWIDTH not in found and LIMIT not in found


def test_what_only_one_has_is_not_compared() -> None:
    plain = replace(SAMPLE, holding=None)
    names = {ratio.name for ratio in ratios(figures([SAMPLE]), figures([plain]))}
    assert "load" in names and "those of the blocks" not in names
    stopped = {ratio.name for ratio in ratios(figures([SAMPLE]), figures([replace(SAMPLE, load_seconds=0.0)]))}
    assert "load" not in stopped and "peak memory" in stopped


times = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=7)


@given(times, st.data())
def test_ratios_against_a_slow_reference(seconds: list[float], data: st.DataObject) -> None:
    others = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=len(seconds), max_size=len(seconds)))
    own = figures([replace(SAMPLE, load_seconds=value) for value in seconds])
    other = figures([replace(SAMPLE, load_seconds=value) for value in others])
    found = next(ratio for ratio in ratios(own, other) if ratio.name == "load")
    pairs = [np.float64(mine) / np.float64(theirs) for mine, theirs in zip(seconds, others, strict=True)]
    assert found.rounds == tuple(pairs) and found.median == statistics.median(pairs)
    assert min(pairs) <= found.low <= found.median <= found.high <= max(pairs)
    inverse = next(ratio for ratio in ratios(other, own) if ratio.name == "load")
    assert [1 / value for value in inverse.rounds] == pytest.approx(pairs)
