"""What a report says, for others: without the directories of the machine that it was made on.

Calibration and evaluation data, sources, teachers, outputs: of each the last part of its path stays, and of a
snapshot in the Hub's cache the repository's name. Paths stand in fields of their own and inside of sentences, so
every string is gone through.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from llmcomp.export_record import ExportRecord
from llmcomp.provenance import snapshot
from llmcomp.report.schema import Report

_DATA = r"\.(?:txt|jsonl?|csv|tsv|parquet|safetensors|ya?ml|wav|flac|png|jpe?g)"
_PART = r"[^\s/\\:;,'\"`()\[\]{}<>|]+"
_IN_TEXT = re.compile(
    rf"(?<![\w/:.~-])(?:~|\.{{1,2}})?(?:/{_PART}){{2,}}/?"  # /home/me/data, ~/a/b, ../a/b
    rf"|(?<![\w/:.-])(?:~|\.{{1,2}})/{_PART}/?"  # ~/data, ./data
    rf"|(?<!\w)[A-Za-z]:(?:\\{_PART})+"  # C:\Users\me
    rf"|(?<![\w/:.-])(?:[\w.@+-]+/)+[\w.@+-]+{_DATA}(?!\w)"  # private/train.jsonl
)
_WHOLE = re.compile(r"(?:~|\.{1,2})?/.*|[A-Za-z]:\\.*", re.DOTALL)
_SENTENCE = re.compile(r"\n|[:;,] ")
_RELATIVE = re.compile(rf"(?:[^/:\n]+/)+[^/:\n]+{_DATA}")


def public(report: Report) -> Report:
    """The report for others.

    >>> shown("/home/me/data/train.jsonl: 8 samples", [])
    'train.jsonl: 8 samples'
    """
    said = json.loads(report.to_json())
    known = _paths(said)
    return Report.from_json(json.dumps(_walk(said, lambda text: shown(text, known, report.files))))


def public_export(record: ExportRecord) -> ExportRecord:
    """The record of an export for others, and in it the report."""
    said = json.loads(record.to_json())
    files, known = record.files, _paths(said)
    said |= _walk({key: said[key] for key in ("model", "notes")}, lambda text: shown(text, known, files))
    report = None if record.report is None else public(record.report)
    return replace(record, model=said["model"], notes=said["notes"], report=report)


def public_text(text: str, report: Report) -> str:
    """A file of text that lies beside the report, such as its recipe, likewise."""
    return shown(text, _paths(json.loads(report.to_json())), report.files)


def shown(text: str, known: list[str], files: Any = ()) -> str:
    """`text` without directories.

    Args:
        known: paths that are fields of their own, which may hold spaces. files: names below the checkpoint, which stay.
    """
    for path in known:
        text = text.replace(path, _last(path))
    return _IN_TEXT.sub(lambda found: found[0] if found[0] in files else _last(found[0]), text)


def _paths(said: Any) -> list[str]:
    """All strings that are paths as a whole, the longest first."""
    found: set[str] = set()

    def note(text: str) -> str:
        if not _SENTENCE.search(text) and len(text) > 2 and (_WHOLE.fullmatch(text) or _RELATIVE.fullmatch(text)):
            found.add(text)
        return text

    _walk({key: value for key, value in said.items() if key != "files"}, note)
    return sorted(found, key=len, reverse=True)


def _walk(value: Any, change: Callable[[str], str]) -> Any:
    """The same lists and objects with other strings; keys stay."""
    if isinstance(value, dict):
        return {key: _walk(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [_walk(one, change) for one in value]
    return change(value) if isinstance(value, str) else value


def _last(path: str) -> str:
    repo, _ = snapshot(Path(path))
    if repo is not None:
        return repo
    kind = PureWindowsPath if re.match(r"[A-Za-z]:\\", path) else PurePosixPath
    return kind(path).name or path
