"""The model card of a checkpoint: YAML that the Hub reads, then Markdown, all from the report (card.md.j2).

Metadata are written by huggingface_hub's own classes, so `model-index` has the form that the Hub validates. Names and
notes come from outside: in tables and headings they cannot end a cell or start a tag.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from llmcomp import licences
from llmcomp.report import summary, words
from llmcomp.report.schema import Origin, Report
from llmcomp.report.snippets import is_sentences, pipeline_tag, snippets
from llmcomp.report.trained import trained_lines

FILE_NAME = "README.md"
PLOTS = "llmcomp_plots"
# Ours → the Hub's id of a metric, https://hf.co/metrics
_METRICS = {"pearson": "pearsonr", "spearman": "spearmanr"}
_MOST_LEFT = 6


@dataclass(frozen=True)
class Card:
    """A card: `text` is README.md, `images` are the plots that it shows, by their paths beside it."""

    text: str
    images: dict[str, bytes]


def card(report: Report, name: str, *, gguf: bool = False) -> Card:
    """The card of the checkpoint that `report` is of.

    Args:
        name: as what it is loaded: an id on the Hub, or its directory.
        gguf: whether `llmcomp export --format gguf` takes it.
    """
    from llmcomp.report.png import drawings

    drawn = drawings(report)
    origin = report.origin or Origin()
    text = template("card.md.j2").render(
        yaml=metadata(report, name).to_yaml(),
        title=name.rstrip("/").rpartition("/")[2],
        origin=origin,
        source=source_name(report),
        warning=licences.warning(origin.license, origin.license_name),
        rows=summary.comparison(report),
        recovery=summary.recovery_rows(report),
        plots={f"{PLOTS}/{key}.png": shown for key, (shown, _) in drawn.items()},
        snippets=snippets(report, name, gguf),
        **making(report),
    )
    return Card(text, {f"{PLOTS}/{key}.png": image for key, (_, image) in drawn.items()})


def making(report: Report) -> dict[str, Any]:
    """What card_making.md.j2 shows: how a checkpoint was made, of what data, and its limits."""
    return {
        "report": report,
        "trained": [*summary.recovery_lines(report), *trained_lines(report)],
        "recipe": summary.recipe_yaml(report),
        "command": summary.reproduce(_public(report)),
        "data": _data(report),
        "fallbacks": summary.fallbacks(report),
        "left": summary.left(report)[:_MOST_LEFT],
        "notes": [*(report.calibration.get("warnings") or []), *report.notes],
        "versions": {"llmcomp": report.llmcomp_version} | report.machine.versions,
    }


def metadata(report: Report, name: str) -> Any:
    """The YAML at the card's top, as `huggingface_hub.ModelCardData`."""
    from huggingface_hub import ModelCardData

    origin = report.origin or Origin()
    results = _results(report)
    return ModelCardData(
        base_model=origin.repo,
        base_model_relation=relation(report) if origin.repo else None,
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        language=origin.languages or None,
        library_name=_library(report),
        pipeline_tag=pipeline_tag(report),
        tags=tags(report),
        model_name=name.rstrip("/").rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def _library(report: Report) -> str:
    if is_sentences(report):
        return "sentence-transformers"
    return "llmcomp" if report.format == "llmcomp" else "transformers"


def relation(report: Report) -> str:
    """To the base model, by the Hub's words: 'quantized' where anything is in integers, else 'finetune'."""
    return "quantized" if any(_bits(layer.scheme) for layer in report.layers) else "finetune"


def tags(report: Report) -> list[str]:
    """What the model can be found by, sorted."""
    found = {"llmcomp", *(layer.method for layer in report.layers)}
    found |= {word for layer in report.layers if (word := _bits(layer.scheme))}
    found |= {report.format.split(" ")[0]} - {"dense", ""}
    found |= {"pruned"} if report.removed else set()
    found |= {"distilled"} if report.distillation else set()
    schemes = [layer.scheme for layer in report.layers]
    found |= {"low-rank"} if any("rank" in scheme for scheme in schemes) else set()
    found |= {"sparse"} if any(":" in s or "unstructured" in s for s in schemes) else set()
    return sorted(found)


def source_name(report: Report) -> str:
    """The source as others know it: its id on the Hub, else the last part of what was given."""
    if report.origin is not None and report.origin.repo:
        return report.origin.repo
    return report.model if report.model.startswith("sample:") else Path(report.model).name or "a local model"


def _bits(scheme: str) -> str | None:
    """'int4' of 'int4 g128'."""
    return next((word for word in scheme.replace(",", " ").split() if word in _KNOWN_BITS), None)


_KNOWN_BITS = frozenset({*(f"int{bits}" for bits in range(2, 9)), *(f"uint{bits}" for bits in range(2, 9)), "nf4"})


def _results(report: Report) -> list[Any]:
    """What was measured of the compressed model, each with its interval, in the Hub's classes."""
    from huggingface_hub import EvalResult

    task = pipeline_tag(report)
    quality = report.after.quality if report.after else None
    if quality is None or task is None:
        return []
    measured = dict(quality.metrics)
    if report.divergence is not None:
        measured |= {"kl_mean": report.divergence.kl_mean, "top1_agreement": report.divergence.top1_agreement}
    kind = "Salesforce/wikitext" if "WikiText-2" in quality.data else "custom"
    made = []
    for key, value in measured.items():
        low, high = words.number(value.low), words.number(value.high)
        made.append(
            EvalResult(
                task_type=task,
                dataset_type=kind,
                dataset_name=quality.data,
                metric_type=_METRICS.get(key, key),
                metric_value=value.value,
                metric_name=f"{summary.metric_title(key)} (95% interval {low} to {high})",
                metric_args={"interval_low": value.low, "interval_high": value.high},
            )
        )
    return made


def _data(report: Report) -> list[str]:
    """What was read to make it, for calibration and in training, each with its licence."""
    read = [("Calibrated", report.calibration.get("source"), report.calibration.get("description"))]
    trained = (report.recovery, report.distillation, report.pruning)
    read += [("Trained", report.recipe.get("data"), one.data) for one in trained if one is not None]
    return [f"{how} on {description}. Licence: {licences.of_data(str(source), str(description))}."
            for how, source, description in read if description]  # fmt: skip


def _public(report: Report) -> Report:
    """The report with no directory of the machine that it was made on."""
    from dataclasses import replace

    return replace(report, model=source_name(report), output=Path(report.output).name if report.output else "")


@functools.cache
def template(name: str) -> Template:
    """One of the templates beside this module."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown; what comes from outside goes through `cell` or `line`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(cell=cell, line=line, size=words.size, moment=words.moment, collapse=words.collapse)
    return environment.get_template(name)


def line(text: Any) -> str:
    """Text of a report as one line of Markdown: no tags, no line breaks.

    >>> line("a <script>\\nb")
    'a &lt;script> b'
    """
    return " ".join(str(text).split()).replace("<", "&lt;")


def cell(text: Any) -> str:
    """The same in a table.

    >>> cell("a|b")
    'a\\\\|b'
    """
    return line(text).replace("|", "\\|")
