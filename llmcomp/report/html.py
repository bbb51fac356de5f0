"""One self-contained HTML page of a report: no network, no file beside it. The template is page.html.j2.

Model names, reasons and notes come from outside, so everything is escaped but the plots, whose text goes
through an XML writer in `llmcomp.report.svg`.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from llmcomp.report import plots, summary, words
from llmcomp.report.curves import COLOURS, curves, losses
from llmcomp.report.schema import Report
from llmcomp.report.trained import trained_lines

FILE_NAME = "llmcomp_report.html"


@dataclass(frozen=True)
class Card:
    """One headline number: what, the number, what it was and became, and how to colour it."""

    title: str
    value: str
    detail: str
    verdict: str = "same"


def render(report: Report) -> str:
    """The page as text, the same for the same report.

    Drawing takes about a second; nothing is read but the template.
    """
    drawn = {"sizes": plots.sizes(report), "errors": plots.errors(report), "places": plots.places(report),
             "losses": losses(report)}  # fmt: skip
    before, after = summary.sizes(report)
    return _template().render(
        report=report,
        cards=cards(report),
        rows=summary.comparison(report),
        recovery=summary.recovery_rows(report),
        recovery_lines=summary.recovery_lines(report),
        trained_lines=trained_lines(report),
        curves={name: COLOURS[name] for name in curves(report)},
        roles=summary.roles(report),
        fallbacks=summary.fallbacks(report),
        left=summary.left(report),
        before=before,
        after=after,
        plots={name: Markup(svg or "") for name, svg in drawn.items()},
        place_parts=plots.place_parts(report),
        parts=summary.ordered([*(before.parts if before else ()), *(after.parts if after else ())]),
        calibration=_described(report.calibration),
        machine=_machine(report),
        recipe=summary.recipe_yaml(report),
        command=summary.reproduce(report),
        slowest=max(report.phases.values(), default=0.0),
    )


@functools.cache
def _template() -> Template:
    """Compiled, which takes a tenth of a second."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=words.size,
        seconds=words.seconds,
        error=words.error,
        number=words.number,
        parameters=words.parameters,
        moment=words.moment,
        collapse=words.collapse,
    )
    return environment.get_template("page.html.j2")


def cards(report: Report) -> list[Card]:
    """The headline numbers, those that were measured."""
    rows = {row.label: row for row in summary.comparison(report)}
    found = []
    for row in rows.values():
        if row.change or row.label == "size on disk":
            detail = f"{row.before} → {row.after}" if row.before != words.ABSENT else ""
            found.append(Card(row.label, row.change or row.after, detail, row.verdict))
    if report.divergence:
        mean, far = rows["KL mean (nats)"].after, rows["KL 99th percentile"].after
        found.insert(2, Card("top-1 agreement", rows["top-1 agreement"].after, f"KL {mean} mean, {far} p99"))
    if (kept := rows.get("overlap at 10")) is not None:
        alike = rows.get("similarity Spearman")
        found.insert(2, Card(kept.label, kept.after, f"similarity Spearman {alike.after}" if alike else ""))
    if report.layers:
        back = sum(layer.fallback is not None for layer in report.layers)
        detail = f"{back} fell back" if back else "none fell back"
        found.append(Card("layers compressed", str(len(report.layers)), detail, "worse" if back else "same"))
    return found


def _described(calibration: dict[str, Any]) -> dict[str, Any]:
    """Its sentence, its warnings, and the rest as (name, value) lines."""
    rest = {key: value for key, value in calibration.items() if key not in ("description", "warnings")}
    return {
        "description": str(calibration.get("description") or ""),
        "warnings": [str(line) for line in calibration.get("warnings") or []],
        "rest": [(key.replace("_", " "), _plain(value)) for key, value in rest.items() if value is not None],
    }


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _machine(report: Report) -> list[tuple[str, str]]:
    found = dataclasses.asdict(report.machine)
    versions = found.pop("versions")
    found["memory"] = words.size(found["memory"])
    lines = [(name, str(value)) for name, value in found.items()]
    return lines + [(str(name), str(value)) for name, value in ({"llmcomp": report.llmcomp_version} | versions).items()]
