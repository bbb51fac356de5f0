"""What a report says of a training that removed weights, or of one by a teacher, in words."""

from __future__ import annotations

from math import prod

from llmcomp.report.schema import Report
from llmcomp.report.summary import interval, metric_title
from llmcomp.report.words import number, parameters, percent


def trained_lines(report: Report) -> list[str]:
    """How the model was trained, if it was."""
    return pruning_lines(report) + distillation_lines(report)


def distillation_lines(report: Report) -> list[str]:
    """Which student learned what from whom, and how it compares with the same one that had no teacher."""
    found = report.distillation
    if found is None:
        return []
    share = percent(found.parameters / found.teacher_parameters)
    counted = ", ".join(f"{name} × {number(weight)}" for name, weight in found.losses.items())
    lines = [
        f"A student of {parameters(found.parameters)} parameters, {share} of its teacher's; it started from "
        f"{found.student}.",
        f"Learned from {' and '.join(found.teachers) or 'labels alone'} by {found.method} ({counted}) for "
        f"{found.steps:,} steps.",
        f"Trained on {found.data}.",
    ]
    losses = [one["loss"] for one in found.history if "loss" in one]
    if losses:
        lines.append(f"Loss {number(losses[0])} at the start, {number(losses[-1])} at the end.")
    if found.baseline is not None and found.baseline.quality is not None:
        said = []
        for name, value in found.baseline.quality.metrics.items():
            shown, span = interval(name, value)
            said.append(f"{metric_title(name)} {shown} {span}")
        lines.append(f"The same student without a teacher: {', '.join(said)}.")
    if found.baseline_divergence is not None:
        kl = number(found.baseline_divergence.kl_mean.value)
        lines.append(f"Its KL from the teacher is {kl} nats in the mean.")
    return lines


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
