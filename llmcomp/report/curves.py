"""The losses of a training by step, as a plot: the student's, on what was held out, and without a teacher."""

from __future__ import annotations

from matplotlib.figure import Figure

from llmcomp.report import words
from llmcomp.report.plots import Writer
from llmcomp.report.schema import Report
from llmcomp.report.svg import colour, svg

COLOURS = {
    "in training": "attention", "held out": "mlp", "without a teacher": "head", "of that, held out": "embeddings",
}  # fmt: skip
Curve = list[tuple[float, float]]


def curves(report: Report) -> dict[str, Curve]:
    """{name: (step, loss) of what was noted}, without those of which there is none; rounds follow each other."""
    trained = report.distillation or report.pruning or report.recovery
    if trained is None:
        return {}
    bare = report.distillation.baseline_history if report.distillation is not None else []
    found = {
        "in training": _curve(trained.history, "loss"), "held out": _curve(trained.history, "eval_loss"),
        "without a teacher": _curve(bare, "loss"), "of that, held out": _curve(bare, "eval_loss"),
    }  # fmt: skip
    return {name: curve for name, curve in found.items() if len(curve) > 1}


def _curve(history: list[dict[str, float]], name: str) -> Curve:
    length = max((entry["step"] for entry in history), default=0)
    return [(entry["step"] + length * entry.get("round", 0), entry[name]) for entry in history if name in entry]


def losses(report: Report, write: Writer = svg) -> str | None:
    """All curves over the steps; None where nothing was noted."""
    found = curves(report)
    if not found:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        for name, curve in found.items():
            style = "o-" if "held out" in name else "-"
            axes.plot(*zip(*curve, strict=True), style, color=colour(COLOURS[name]), linewidth=1.6, markersize=4)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")

    ends = [f"{name} {words.number(curve[0][1])} to {words.number(curve[-1][1])}" for name, curve in found.items()]
    drawn: str | None = write("losses", "Loss by step", "; ".join(ends), 2.6, draw, {})
    return drawn
