"""Where a model comes from: repository, commit, licence and languages, read off its files.

A snapshot in the Hub's cache lies under `models--org--name/snapshots/<commit>`; its card begins with YAML between two
lines of three dashes. A checkpoint that llmcomp wrote has both in its report.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llmcomp.errors import BadCheckpoint
from llmcomp.report.schema import FILE_NAME, Origin, Report

CARD = "README.md"
_SNAPSHOT = re.compile(r"models--(.+)/snapshots/([0-9a-f]{40})")
_FRONT = re.compile(r"\A(?:\ufeff)?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def origin_of(path: Path) -> Origin:
    """What is known of the model in `path`; fields that nothing says are None or empty."""
    if (path / FILE_NAME).is_file():
        try:
            earlier = Report.read(path).origin
        except BadCheckpoint:  # of another version; the card may still say something
            earlier = None
        if earlier is not None:
            return earlier
    card = front_matter(_text(path / CARD))
    repo, commit = snapshot(path)
    several = _words(card.get("license"))
    named = "other" if len(several) > 1 else None  # as the Hub says of what it has no single name for
    return Origin(
        repo=repo,
        commit=commit,
        license=named or _word(card.get("license")),
        license_name=", ".join(several) if named else _word(card.get("license_name")),
        license_link=_word(card.get("license_link")),
        languages=_words(card.get("language")),
        pipeline_tag=_word(card.get("pipeline_tag")),
    )


def snapshot(path: Path) -> tuple[str | None, str | None]:
    """(repository, commit) of a directory in the Hub's cache, else two Nones.

    >>> snapshot(Path("/h/hub/models--org--a.b/snapshots/" + "0" * 40))
    ('org/a.b', '0000000000000000000000000000000000000000')
    """
    found = _SNAPSHOT.search(path.absolute().as_posix())
    return (found[1].replace("--", "/", 1), found[2]) if found else (None, None)


def front_matter(text: str) -> dict[str, Any]:
    """The YAML at the top of a card; empty where there is none or it cannot be read: it is somebody else's file."""
    found = _FRONT.match(text)
    if found is None:
        return {}
    try:
        data = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError):  # ValueError: a date that is none
        return {}
    return data if isinstance(data, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _word(value: Any) -> str | None:
    """A single word or line; a list of one is that one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return " ".join(value.split()) or None if isinstance(value, str) else None


def _words(value: Any) -> list[str]:
    """Languages, or licences: one or several. YAML reads Norwegian's code, no, as false."""
    found = value if isinstance(value, list) else [value]
    return [("no" if one is False else str(one)) for one in found if one is False or (isinstance(one, str) and one)]
