"""Local data files as columns: .txt, .jsonl, .json, .csv, .tsv, .parquet, and token ids in .safetensors."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcomp.errors import BadData

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".safetensors")
_TEXT_NAMES = (
    "text",
    "sentence",
    "content",
    "document",
    "body",
    "review",
    "question",
    "prompt",
    "instruction",
)
IMAGE_NAMES = ("image", "images", "img", "file_name")  # of columns
_LABEL_NAMES = ("label", "labels", "class", "target", "score")


def require(path: Path) -> None:
    """Refuse what cannot be read as data.

    Raises:
        BadData: missing, a directory, empty, or of a kind that nothing here reads.
    """
    if not path.exists():
        raise BadData(
            f"Data file {path} does not exist; give a file ({', '.join(SUFFIXES)}) or a Hub dataset."
        )
    if not path.is_file():
        raise BadData(f"{path} is a directory, and text is read from one file; give one ({', '.join(SUFFIXES)}).")
    if path.suffix.lower() not in SUFFIXES:
        raise BadData(f"{path} ends in {path.suffix or 'nothing'!r}; expected one of {', '.join(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise BadData(f"{path} is empty; give a file with text in it.")


def read_text(path: Path) -> str:
    """A UTF-8 file as text, with line ends as newline characters and without a byte order mark.

    Raises:
        BadData: not UTF-8 (says where), unreadable, or nothing but white space.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise BadData(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        wrong = content[error.start]
        raise BadData(
            f"{path} is not UTF-8: byte 0x{wrong:02x} at offset {error.start} ({error.reason}); "
            "convert it, for example with iconv -t UTF-8."
        ) from error
    if not text.strip():
        raise BadData(f"{path} holds nothing but white space; give a file with text in it.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_columns(path: Path) -> dict[str, list[Any]]:
    """{column: values}, all of one length, of a .jsonl, .json, .csv, .tsv or .parquet file.

    Raises:
        BadData: content that is not what the suffix says, or no row.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        columns = _parquet(path)
    elif suffix in (".csv", ".tsv"):
        columns = _separated(path, "," if suffix == ".csv" else "\t")
    else:
        columns = _objects(path, _json_lines(path) if suffix == ".jsonl" else _json(path))
    if not columns or not next(iter(columns.values())):
        raise BadData(f"{path} holds no rows; give a file with text in it.")
    return columns


def text_columns(columns: Mapping[str, list[Any]], wanted: str | None) -> tuple[str | None, str | None]:
    """The first and the second text column that 'first,second' names; one alone may have a comma in its name."""
    if wanted is None or wanted in columns or "," not in wanted:
        return wanted, None
    first, _, second = wanted.partition(",")
    return first.strip(), second.strip()


def text_column(columns: Mapping[str, list[Any]], wanted: str | None, where: str) -> list[str]:
    """The texts: column `wanted`, else one with a usual name, else the only column of strings; '' for null.

    Raises:
        BadData: no such column, none that can be guessed, or values that are not text.
    """
    if wanted is not None and wanted not in columns:
        raise BadData(f"{where} has no column {wanted!r}; it has {', '.join(columns)}.")
    if wanted is None:
        strings = [name for name, values in columns.items() if _is_text(values)]
        usual = [name for name in _TEXT_NAMES if name in strings]
        if not usual and any(name in columns for name in IMAGE_NAMES):
            raise BadData(
                f"{where} has images and no text (columns: {', '.join(columns)}), and the model reads text; name a "
                "column with --text-column."
            )
        if not usual and len(strings) != 1:
            raise BadData(
                f"{where} has no column that is clearly the text (columns: {', '.join(columns)}); name it "
                "with --text-column."
            )
        wanted = usual[0] if usual else strings[0]
    for number, value in enumerate(columns[wanted]):
        if value is not None and not isinstance(value, str):
            raise BadData(
                f"{where}: column {wanted!r} holds {type(value).__name__} in row {number}; expected text."
            )
    return [value or "" for value in columns[wanted]]


def label_column(
    columns: Mapping[str, list[Any]], wanted: str | None, where: str, gaps: bool = False
) -> list[Any] | None:
    """The labels: column `wanted`, else one with a usual name, else None. Numbers in words become numbers; null, a key
    that is missing and an empty cell are no label.

    Args:
        gaps: rows may have none, where others have one; their label is None.

    Raises:
        BadData: no such column, or a row without a label.
    """
    if wanted is not None and wanted not in columns:
        raise BadData(f"{where} has no column {wanted!r}; it has {', '.join(columns)}.")
    name = wanted or next((n for n in _LABEL_NAMES if n in columns), None)
    if name is None:
        return None
    labels = [None if label == "" else label for label in columns[name]]
    known = [label for label in labels if label is not None]
    if gaps and known and len(known) < len(labels):
        numbers = iter(_numbers(known))
        return [None if label is None else next(numbers) for label in labels]
    if None in labels:
        if wanted is None:
            return None
        raise BadData(f"{where}: column {name!r} has no label in row {labels.index(None)}; remove that row.")
    return _numbers(labels)


def read_token_ids(path: Path) -> Tensor:
    """Token ids [N, T] int64 from a .safetensors file with one tensor, `input_ids`.

    Raises:
        BadData: not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            ids: Tensor | None = file.get_tensor("input_ids") if names == ["input_ids"] else None
    except (SafetensorError, OSError) as error:
        raise BadData(f"{path} is not a readable safetensors file ({error}).") from error
    if ids is None or ids.dim() != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
        found = f"shape {list(ids.shape)} {ids.dtype}" if ids is not None else f"tensors {', '.join(names)}"
        raise BadData(
            f"{path} must hold one int64 tensor 'input_ids' of shape [samples, tokens]; found {found}."
        )
    if int(ids.min()) < 0:
        raise BadData(f"{path} holds negative token ids; expected ids of the model's vocabulary.")
    return ids


def _numbers(labels: list[Any]) -> list[Any]:
    """A CSV file has only strings: '1' is the number if all of them are numbers."""
    if not all(isinstance(label, str) for label in labels):
        return labels
    for kind in (int, float):
        try:
            return [kind(label) for label in labels]
        except ValueError:
            continue
    return labels


def _is_text(values: list[Any]) -> bool:
    seen = [value for value in values[:100] if value is not None]
    return bool(seen) and all(isinstance(value, str) for value in seen)


def _parquet(path: Path) -> dict[str, list[Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        columns: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise BadData(f"{path} is not a readable parquet file ({str(error).splitlines()[0]}).") from error
    return columns


def _separated(path: Path, delimiter: str) -> dict[str, list[Any]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        names = list(reader.fieldnames or [])
        rows = list(reader)
    except csv.Error as error:
        raise BadData(f"{path} is not a readable table (line {reader.line_num}: {error}).") from error
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise BadData(
                f"{path}: row {number} has another number of fields than the header's {len(names)}."
            )
    return {name: [row[name] for row in rows] for name in names}


def _json_lines(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise BadData(
                    f"{path}: line {number} is not JSON ({error.msg}); expected one object a line."
                ) from error
    return rows


def _json(path: Path) -> list[Any]:
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise BadData(f"{path} is not JSON (line {error.lineno}: {error.msg}).") from error
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        data = data["data"]
    if not isinstance(data, list):
        raise BadData(f"{path} must be a list of objects or of texts, not {type(data).__name__}.")
    return data


def _objects(path: Path, rows: list[Any]) -> dict[str, list[Any]]:
    if rows and all(isinstance(row, str) for row in rows):
        return {"text": rows}
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise BadData(
                f"{path}: row {number} is {type(row).__name__}; expected an object such as {{'text': …}}."
            )
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
