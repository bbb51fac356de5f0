"""docs/architectures.md says what the tests run."""

from __future__ import annotations

from architecture_table import COMMAND, PAGE, PROVEN, render
from tiny import TINY, build

from llmcomp.methods import METHODS


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), f"run: {COMMAND}"


def test_every_architecture_has_a_row() -> None:
    rows = [line.split(" | ")[0] for line in PAGE.read_text(encoding="utf-8").splitlines()]
    for name in TINY:
        family = type(build(name)).__name__
        assert any(family.startswith(row.removeprefix("| ")) for row in rows if row.startswith("| ")), name


def test_what_is_proven_are_methods() -> None:
    assert set(PROVEN) <= set(METHODS)
