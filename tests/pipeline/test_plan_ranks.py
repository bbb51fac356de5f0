"""What plan says of each of several ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny import tiny
from typer.testing import CliRunner

from llmcomp.adapters.base import Adapter
from llmcomp.adapters.discover import discover, skeleton
from llmcomp.cli.options import parse_size
from llmcomp.cli.plan import plan as verb
from llmcomp.errors import BadRecipe
from llmcomp.pipeline.footprint import footprint
from llmcomp.pipeline.job import plan_recipe
from llmcomp.pipeline.terms import Lanes
from llmcomp.pipeline.timing import Rates, seconds
from llmcomp.recipe import QuantizeStep, Recipe

app = typer.Typer()
app.command()(verb)
RATES = Rates(1e9, 1e9, 1e9)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("plan") / "llama")


@pytest.fixture(scope="module")
def adapter(path: Path) -> Adapter:
    return discover(skeleton(path))


def test_lanes_are_those_of_a_share() -> None:
    """As `World.share` and `batches` make them, for the rank with most windows."""
    for samples, length, ranks in [(128, 512, 8), (5, 2048, 2), (7, 64, 3), (8, 32, 8)]:
        assert replace(Lanes.of(samples, length, ranks), ranks=1) == Lanes.of(-(-samples // ranks), length)


def test_ranks_divide_the_work_but_not_the_statistics(adapter: Adapter) -> None:
    plan = plan_recipe(Recipe(), adapter)
    one, four = (footprint(adapter, plan, Lanes.of(64, 64, ranks), 1 << 30) for ranks in (1, 4))
    assert four.terms.parked < one.terms.parked or four.terms.held < one.terms.held
    assert four.terms.statistics == one.terms.statistics
    tokens = 64 * 64
    times = [seconds(adapter, plan, tokens, Lanes.of(64, 64, ranks).count, RATES, ranks=ranks) for ranks in (1, 2, 4)]
    assert times[0] > times[1] > times[2] > times[0] / 4


def test_what_does_not_divide_stays(adapter: Adapter) -> None:
    """Round to nearest: saving is the first rank's, and rows are exchanged, so more ranks gain little here."""
    plan = plan_recipe(Recipe((QuantizeStep(method="rtn"),)), adapter)
    one, many = (seconds(adapter, plan, 0, 0, Rates(1e30, 1e30, 1e30), ranks=ranks) for ranks in (1, 8))
    assert many > one > 0


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exception is None, result.exception
    return result.stdout


def test_what_fits_into_a_rank(path: Path) -> None:
    found: dict[str, Any] = json.loads(
        run(str(path), "--bits", "4", "--ranks", "2", "--memory", "501MB", "--json")
    )
    assert found["ranks"] == 2 and found["memory"] == 501_000_000
    for row in found["rows"]:
        assert row["fits"] == (row["peak_memory"] <= 1_000_000)
    assert not any(row["fits"] for row in found["rows"])
    roomy = json.loads(run(str(path), "--bits", "4", "--memory", "24GiB", "--json"))
    assert all(row["fits"] for row in roomy["rows"]) and roomy["memory"] == 24 * 2**30
    assert "fits" not in json.loads(run(str(path), "--bits", "4", "--json"))["rows"][0]
    shown = run(str(path), "--bits", "4", "--ranks", "2", "--memory", "24GiB")
    assert "of 24 GiB" in shown and "each of 2 ranks" in shown


@pytest.mark.parametrize("text", ["24", "GiB", "24 pounds", "0GB", "1.2.3GB", "-1GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(BadRecipe, match="expected a number with a unit, such as 24GiB"):
        parse_size(text, "--memory")


def test_sizes() -> None:
    found = [parse_size(text, "--memory") for text in ("24GiB", "80 GB", "1.5kb", "2TiB")]
    assert found == [24 * 2**30, 80 * 10**9, 1500, 2 * 2**40]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--ranks", "9", "--samples", "8"], "8 calibration windows cannot feed 9 ranks"),
        (["--ranks", "2", "--format", "bnb-nf4"], "made in one process"),
    ],
)
def test_ranks_that_cannot_be(more: list[str], said: str, path: Path) -> None:
    result = CliRunner().invoke(app, [str(path), *more])
    assert isinstance(result.exception, BadRecipe) and said in str(result.exception)
