"""What a report says of a training that removed weights, in words."""

from __future__ import annotations

from math import prod

from llmcomp.report.schema import Report
from llmcomp.report.words import number, parameters, percent


def pruning_lines(report: Report) -> list[str]:
    """How weights were removed while the model was trained, on what, for how long."""
    found = report.pruning
    if found is None:
        return []
    by = f", with {found.teacher} as teacher" if found.teacher else ""
    rounds = f" in {found.rounds} rounds" if found.rounds > 1 else ""
    under = parameters(sum(prod(layer.shape) for layer in report.layers))
    lines = [
        f"{percent(found.removed)} of {under} weights removed by {found.method}, {parameters(found.parameters)} "
        f"numbers trained for {found.steps:,} steps{rounds}{by}.",
        f"Trained on {found.data}.",
    ]
    losses = [one["loss"] for one in found.history if "loss" in one]
    if losses:
        lines.append(f"Loss {number(losses[0])} at the start, {number(losses[-1])} at the end.")
    return lines
