"""Dataclasses from what a user has written: mappings from YAML, flags, options."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from llmcomp.errors import BadRecipe


def build(kind: Any, data: Any, where: str) -> Any:
    """A dataclass from a mapping, with unknown keys refused and scalar types checked.

    Raises:
        BadRecipe: naming `where` and the nearest known key.
    """
    if not isinstance(data, dict):
        raise BadRecipe(f"{where} must be a mapping, not {data!r}.")
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}." if known else "it has none."
            raise BadRecipe(f"{where}: unknown key '{key}'; {hint}")
    for key, value in data.items():
        _check_type(key, value, str(known[key].type), where)
    try:
        return kind(**data)
    except TypeError as error:
        raise BadRecipe(f"{where}: {error}.") from error


_SCALARS: dict[str, Any] = {
    "int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None),
}  # fmt: skip


def _check_type(key: str, value: Any, annotation: str, where: str) -> None:
    names = [part.strip() for part in annotation.split("|")]
    if not all(name in _SCALARS for name in names):
        return
    allowed = tuple(_SCALARS[name] for name in names)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise BadRecipe(f"{where}: '{key}' must be {' or '.join(names)}, got {value!r}.")
