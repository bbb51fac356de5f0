"""Numbers and names as people read them."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcomp.report import words


def test_doctests_hold() -> None:
    found = doctest.testmod(words)
    assert found.attempted >= 9
    assert found.failed == 0


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (99_950_000, "100 MB"), (3e15, "3000 TB")],
)
def test_sizes_have_three_digits(count: float, text: str) -> None:
    assert words.size(count) == text


@given(st.integers(1, 10**14))
def test_size_is_within_half_a_percent(count: int) -> None:
    value, unit = words.size(count).split()
    factor = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(value) * factor == pytest.approx(count, rel=0.0051)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_ranges_name_every_number_once(numbers: set[int]) -> None:
    read: list[int] = []
    for part in words.ranges(sorted(numbers)).split(", "):
        first, _, last = part.partition("–")
        read += range(int(first), int(last or first) + 1)
    assert read == sorted(numbers)


def test_collapse_keeps_names_apart_that_differ_elsewhere() -> None:
    names = [f"layer.{i}.q" for i in range(12)] + ["layer.3.k", "pooler.dense"]
    assert words.collapse(names) == ["layer.{0–11}.q", "layer.3.k", "pooler.dense"]
