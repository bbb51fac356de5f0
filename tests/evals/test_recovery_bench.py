"""The benchmark of recovery: what can be trained how, and the share that is won back, on losses that are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals import recovery
from evals.equal_bytes import recipe_of
from evals.recovery import ROWS, Bench, lines, ways_of, won_back
from llmcomp.recipe import check


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_recipes_can_be_and_integers_are_not_trained(row):
    check(recipe_of(row, Path("windows.safetensors")))
    methods = {way.method for way in ways_of(row)}
    assert methods == ({"lora"} if row.family == "quantized" else {"lora", "full"})


def test_won_back_is_a_share_of_what_compressing_had_cost():
    assert won_back(3.0, 4.0, 3.25) == "75%"
    assert won_back(3.0, 4.0, 4.5) == "-50%"
    assert won_back(3.0, 3.0, 2.5) == "–"


def test_a_line_holds_the_seeds_together():
    source = {"books": [3.0, 3.0], "wikitext": [4.0, 4.0]}
    compressed = {"books": [4.0, 4.0], "wikitext": [5.0, 5.0]}
    seeds = [
        {"": compressed, "full": {"books": [loss, loss], "wikitext": [5.0, 5.0]}} for loss in (3.2, 3.4)
    ]
    before, after = lines(ROWS[0], seeds, source)
    assert before[1:4] == ["–", "54.60", "148.41"]
    assert after[1:5] == ["full", "27.11", "148.41", "70%"]
    assert after[5].startswith("-50.34%") and after[6] == "+0.00% [+0.00, +0.00]"


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMCOMP_EVAL_CACHE", str(tmp_path))
    found = iter([{"books": [1.0]}, {"books": [2.0]}])
    monkeypatch.setattr(recovery, "losses", lambda folder, texts: next(found))
    assert Bench(5, ["books"]).source() == Bench(5, ["books"]).source() == {"books": [1.0]}
    assert Bench(5, ["books", "wikitext"]).source() == {"books": [2.0]}
