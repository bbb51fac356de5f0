"""Before meets after in `summary`: rows, verdicts, groups, the command that does it again."""

import dataclasses
import shlex

import yaml

from llmcomp.recipe import QuantizeStep, Recipe
from llmcomp.report import summary
from llmcomp.report.schema import Interval, Measured, Quality, Report, Size


def _rows(report: Report) -> dict[str, summary.Row]:
    return {row.label: row for row in summary.comparison(report)}


def test_rows_of_a_language_model(report: Report) -> None:
    rows = _rows(report)
    assert (rows["size on disk"].before, rows["size on disk"].after) == ("2.20 GB", "762 MB")
    assert rows["size on disk"].change == "2.89× smaller"
    perplexity = rows["perplexity"]
    assert (perplexity.before, perplexity.after, perplexity.change) == ("12.43", "12.90", "+3.79%")
    assert perplexity.after_interval == "[12.55, 13.26]"
    assert perplexity.verdict == "worse"
    assert rows["KL mean (nats)"].after == "0.0381"
    assert rows["top-1 agreement"].after == "91.2%"
    assert rows["latency 1×128"].change == "1.04× slower"


def test_latencies_whose_spans_overlap_are_the_same(report: Report) -> None:
    assert report.after is not None
    assert report.after.cost is not None
    report.after.cost.latency_low = 0.81  # the original's span ends at 0.83
    row = _rows(report)["latency 1×128"]
    assert (row.change, row.verdict) == ("same", "same")


def _measured(value: float, low: float, high: float, name: str) -> Measured:
    return Measured(Size(10, 100), 0.0, Quality({name: Interval(value, low, high)}, 1821, 0, "sst2.csv"))


def test_shares_change_in_points_and_within_the_interval_is_the_same(report: Report) -> None:
    report.before = _measured(0.912, 0.90, 0.92, "accuracy")
    report.after = _measured(0.905, 0.89, 0.915, "accuracy")
    row = _rows(report)["accuracy"]
    assert (row.before, row.after, row.change) == ("91.2%", "90.5%", "−0.7 points")
    assert row.verdict == "same"
    report.after = _measured(0.80, 0.78, 0.82, "accuracy")
    assert _rows(report)["accuracy"].verdict == "worse"


def test_correlations_change_by_a_difference(report: Report) -> None:
    report.before, report.after = (
        _measured(0.9, 0.89, 0.91, "pearson"),
        _measured(0.95, 0.94, 0.96, "pearson"),
    )
    row = _rows(report)["Pearson"]
    assert (row.change, row.verdict) == ("+0.0500", "better")


def test_one_side_alone(report: Report) -> None:
    report = dataclasses.replace(report, before=None, size_before=None, divergence=None)
    rows = _rows(report)
    assert rows["perplexity"].before == "—"
    assert rows["perplexity"].change == ""
    assert "KL mean (nats)" not in rows


def test_nothing_measured_leaves_sizes(report: Report) -> None:
    report = dataclasses.replace(report, before=None, after=None, divergence=None)
    assert list(_rows(report)) == ["size on disk"]


def test_worst_are_sorted_and_fallbacks_grouped(report: Report) -> None:
    errors = [layer.error for layer in summary.worst(report, 10)]
    assert errors == sorted((layer.error for layer in report.layers), reverse=True)[:10]
    (group,) = summary.fallbacks(report)
    assert group.names == ("model.layers.3.mlp.down_proj", "model.layers.17.self_attn.k_proj")


def test_roles_add_up(report: Report) -> None:
    roles = summary.roles(report)
    assert [role.role for role in roles] == ["attention", "mlp"]
    assert sum(role.layers for role in roles) == len(report.layers)
    assert sum(role.bytes_after for role in roles) == sum(layer.bytes_after for layer in report.layers)


def test_recipe_survives_as_yaml_even_with_tuples(report: Report) -> None:
    recipe = Recipe(steps=(QuantizeStep(bits=3, options={"damping": 0.02}),))
    report.recipe = yaml.safe_load(recipe.to_yaml()) | {"extra": ("a", 1)}
    read = yaml.safe_load(summary.recipe_yaml(report))
    assert read.pop("extra") == ["a", 1]
    assert Recipe.from_yaml(yaml.safe_dump(read)) == recipe


def test_command_is_quoted_for_a_shell(report: Report) -> None:
    report.model, report.output = "my models/a; rm b", "out dir"
    command = summary.reproduce(report)
    assert shlex.split(command) == [
        "llmcomp", "quantize", "my models/a; rm b", "--recipe", "llmcomp_recipe.yaml", "--output", "out dir",
    ]  # fmt: skip
