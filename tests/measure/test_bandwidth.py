"""The cache as the system tells it, a buffer well above it, and bytes over the fastest pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcomp.measure import bandwidth


def test_the_largest_cache_counts(tmp_path: Path) -> None:
    for number, size in enumerate(("32K", "1M", "33792K")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(size + "\n")
    assert bandwidth.last_level_cache(tmp_path) == 33792 * 1024


def test_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert bandwidth.last_level_cache(tmp_path) == 32 * 2**20


@pytest.mark.parametrize("cache", [2**20, 32 * 2**20, 480 * 2**20])
@pytest.mark.parametrize("free", [2**28, 2**34])
def test_the_buffer_is_well_above_the_cache_where_memory_allows(cache: int, free: int) -> None:
    size = bandwidth.buffer_size(cache, free)
    assert size % 32768 == 0 and size <= free // 4
    assert size >= min(8 * cache, free // 4 - 32768)


def test_bytes_over_the_fastest_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three operators, two counted passes each: 1 s each but for one of half a second."""
    # The pass that is not counted reads the clock once, at its start.
    readings = iter([0, 10, 11, 20, 21, 30, 40, 40.5, 50, 51, 60, 70, 71, 80, 81])
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: next(readings))
    assert bandwidth.read_bandwidth(passes=2, size=2**20) == 2**20 / 0.5
