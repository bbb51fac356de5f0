"""The card of an export: how its file is loaded, how it was compared, and where it comes from (export_card.md.j2)."""

from __future__ import annotations

from typing import Any

from llmcomp import licences
from llmcomp.export_record import ExportRecord
from llmcomp.report import card as cards
from llmcomp.report import summary
from llmcomp.report.export_snippets import TITLES, snippets
from llmcomp.report.snippets import PIPELINES


def card(record: ExportRecord, name: str, sizes: dict[str, int]) -> cards.Card:
    """The card of an export.

    Args:
        name: as what it is loaded: an id on the Hub, or its directory. sizes: bytes of its files.
    """
    report, origin = record.report, record.origin
    text = cards.template("export_card.md.j2").render(
        yaml=metadata(record).to_yaml(),
        title=name.rstrip("/").rpartition("/")[2],
        record=record,
        form=TITLES[record.form],
        origin=origin,
        source=source_name(record),
        sizes=sizes,
        snippets=snippets(record, name),
        rows=summary.comparison(report) if report else [],
        warning=licences.warning(origin.license, origin.license_name),
        **(cards.making(report) if report else {"report": None}),
    )
    return cards.Card(text, {})


def metadata(record: ExportRecord) -> Any:
    """The YAML at the card's top, as `huggingface_hub.ModelCardData`; nothing was measured, so there are no results."""
    from huggingface_hub import ModelCardData

    origin, report = record.origin, record.report
    libraries = {"compressed-tensors": "transformers", "dense": "transformers", "llmcomp": "llmcomp"}
    relation = cards.relation(report) if report else "quantized" if record.form == "gguf" else "finetune"
    found = set(cards.tags(report)) - {report.format.split(" ")[0]} if report else {"llmcomp"}
    return ModelCardData(
        base_model=origin.repo,
        base_model_relation=relation if origin.repo else None,
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        language=origin.languages or None,
        library_name=libraries.get(record.form),
        pipeline_tag=origin.pipeline_tag or PIPELINES.get(record.task),
        tags=sorted(found | ({record.form} - {"dense"})),
    )


def source_name(record: ExportRecord) -> str:
    """The model that was compressed, else what was exported, as others know it."""
    if record.report is not None:
        return cards.source_name(record.report)
    return record.origin.repo or record.model
