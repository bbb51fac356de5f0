"""Dataclasses from what a user has written: mappings from YAML, flags, options."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmcomp.errors import BadRecipe


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without numbers to the base of 60, by which an unquoted `pattern: 2:4` would be 124, and with 1e-4,
    which is a text there for want of a point."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in some if tag != "tag:yaml.org,2002:int"]
    for first, some in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_DIGITS = list("-+0123456789")


class _Dumper(yaml.SafeDumper):
    """Quotes texts that the loader would take for numbers."""


for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), _DIGITS)
    _one.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), _DIGITS)


def write_yaml(data: Mapping[str, Any]) -> str:
    """What is read back as it is."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


def read_yaml(text: str, where: str, what: str = "") -> dict[Any, Any]:
    """The mapping of a YAML text.

    Args:
        what: is in it, for the sentence of an error, such as " with 'steps'".

    Raises:
        BadRecipe: not YAML, or not a mapping.
    """
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise BadRecipe(f"{where} is not YAML ({str(error).splitlines()[0]}).") from error
    if not isinstance(data, dict):
        raise BadRecipe(f"{where} must be a mapping{what}, not {type(data).__name__}.")
    return dict(data)


def read_settings(path: Path, settings: Sequence[str] = ()) -> dict[Any, Any]:
    """The mapping of a YAML file.

    Args:
        settings: 'key=value' each, which say otherwise than the file.

    Raises:
        BadRecipe: a file that cannot be read or is no mapping, or a setting that is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecipe(f"--config {path} cannot be read: {error}.") from error
    return {**read_yaml(text, str(path)), **said(settings)}


def said(settings: Sequence[str]) -> dict[Any, Any]:
    """The mapping of 'key=value' each.

    Raises:
        BadRecipe: a setting that is none.
    """
    data: dict[Any, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise BadRecipe(f"'{setting}' is no setting; give KEY=VALUE, such as seed=1.")
        data |= read_yaml(f"{key}: {value}", f"'{setting}'")
    return data


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
