"""What is known of an export: from what it was made, how it was compared, and its files by hash (llmcomp_export.json).

An export has no report of its own, since nothing was measured of it. It keeps that of the checkpoint that it was made
of, which says how the integers came to be; sizes and times in it are of that checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcomp.errors import BadCheckpoint
from llmcomp.report.schema import Origin, Report

RECORD_NAME = "llmcomp_export.json"
_VERSION = 1


@dataclass(frozen=True)
class ExportRecord:
    """One export.

    Attributes:
        form: one of `llmcomp.exports.EXPORTS`. model: what was exported, a directory or an id on the Hub.
        architecture, task: as a report has them. notes: what the export said, how it was compared among it.
        origin: of the model that was compressed. files: path → SHA-256 of what was compared.
        report: of the checkpoint, None where it had none.
    """

    form: str
    model: str
    architecture: str
    task: str
    created: str
    llmcomp_version: str
    notes: list[str]
    origin: Origin
    files: dict[str, str]
    report: Report | None = None

    def to_json(self) -> str:
        return json.dumps({"version": _VERSION, **dataclasses.asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, directory: Path) -> ExportRecord:
        """Of the export in `directory`.

        Raises:
            BadCheckpoint: there is none, or it was changed by hand.
        """
        try:
            said: dict[str, Any] = json.loads((directory / RECORD_NAME).read_text(encoding="utf-8"))
            if said.pop("version") != _VERSION:
                raise BadCheckpoint(f"{RECORD_NAME} of {directory} is of another version of llmcomp.")
            report = said.pop("report")
            report = None if report is None else Report.from_json(json.dumps(report))
            return cls(**{**said, "origin": Origin(**said["origin"]), "report": report})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"{RECORD_NAME} of {directory} cannot be read ({error}); export it again.") from error
