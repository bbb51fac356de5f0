"""The chart's recipes can be, and the column of losers names who beats them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.equal_bytes import FAMILIES, ROWS, Box, Row, free_places, loses, recipe_of
from evals.parts import PARTS
from llmcomp.recipe import check


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_recipes_can_be(row: Row) -> None:
    check(recipe_of(row, Path("windows.safetensors")))
    assert row.family in FAMILIES
    assert (len(row.steps) > 1) == (row.family == "combined")


def test_names_are_their_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_a_row_loses_to_the_best_of_those_that_beat_it_everywhere() -> None:
    def one(size: int, *means: float) -> dict[str, Any]:
        return {"bytes": size, "losses": {text: [mean] for text, mean in zip(PARTS["lm"].texts, means, strict=True)}}

    found = {
        "large": one(9, 1.0, 1.0), "a": one(5, 3.0, 3.0), "b": one(5, 2.0, 2.0), "c": one(4, 1.5, 2.5),
        "d": one(3, 1.4, 1.9),
    }  # fmt: skip
    assert {name: loses(name, found) for name in found} == {"large": "", "a": "d", "b": "d", "c": "d", "d": ""}
    del found["d"]
    assert {name: loses(name, found) for name in found} == {"large": "", "a": "c", "b": "", "c": ""}


def test_labels_of_a_crowd_cover_neither_each_other_nor_a_point() -> None:
    points = np.random.default_rng(0).normal([150, 100], 12, size=(12, 2))
    limits, widths, height = Box(0, 0, 400, 300), [40.0 + 3 * number for number in range(12)], 9.0
    corners = free_places(points, widths, height, limits)
    labels = [Box(x, y, x + width, y + height) for (x, y), width in zip(corners, widths, strict=True)]
    for number, label in enumerate(labels):
        assert label.within(limits)
        assert not any(label.covers(other) for other in labels[:number])
        assert not any(label.covers(Box(x - 2, y - 2, x + 2, y + 2)) for x, y in points)
