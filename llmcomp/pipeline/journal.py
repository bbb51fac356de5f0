"""What a killed run leaves for the next: which shards are whole, and what the report says of them.

    .<output>.partial/journal.jsonl
        {"fingerprint": "…"}                                        first line: recipe, model, data, version
        {"key": "block-00003", "shard": {…}, "layers": [ … ]}       one line for each finished shard

A line is appended only after its shard lies on the disk; a torn last line is ignored. A journal with another
fingerprint belongs to another run: it is discarded, which the user is told.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcomp.formats.save import Shard, ShardWriter, writing
from llmcomp.ranks import ALONE, World
from llmcomp.report.schema import LayerReport

_NAME = "journal.jsonl"


@dataclass(frozen=True)
class Entry:
    """One finished shard and the layers in it."""

    shard: Shard
    layers: list[LayerReport]


class Journal:
    """Open the journal of a partial directory, made for a run with this fingerprint.

    Of several ranks the first one keeps it, and tells the others what is done.

    Attributes:
        done: {key: Entry} of what an earlier run of the same fingerprint has finished.
        discarded: an earlier run of another fingerprint lay there and was removed.
    """

    def __init__(self, partial: Path, fingerprint: str, world: World = ALONE) -> None:
        self._path = partial / _NAME
        self.done: dict[str, Entry] = {}
        self.discarded = False
        if world.first:
            self._open(partial, fingerprint)
        lines = [_line(key, entry.shard, entry.layers) for key, entry in self.done.items()]
        told = world.message(json.dumps(lines).encode() if world.first else None)
        self.done = dict(map(_entry, json.loads(told)))

    def _open(self, partial: Path, fingerprint: str) -> None:
        lines = _lines(self._path)
        if not lines or lines[0].get("fingerprint") != fingerprint:
            self.discarded = partial.exists() and any(partial.iterdir())
            with writing(partial):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self._append({"fingerprint": fingerprint})
            return
        writer = ShardWriter(partial)
        for line in lines[1:]:
            key, entry = _entry(line)
            if writer.holds(entry.shard):
                self.done[key] = entry

    def add(self, key: str, shard: Shard, layers: list[LayerReport]) -> None:
        """Note a finished shard."""
        self.done[key] = Entry(shard, layers)
        self._append(_line(key, shard, layers))

    def _append(self, line: dict[str, Any]) -> None:
        with writing(self._path), self._path.open("ab") as file:
            if file.tell() and not _ends_whole(self._path):
                file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _line(key: str, shard: Shard, layers: list[LayerReport]) -> dict[str, Any]:
    return {"key": key, "shard": dataclasses.asdict(shard), "layers": [dataclasses.asdict(one) for one in layers]}


def _entry(line: dict[str, Any]) -> tuple[str, Entry]:
    layers = [LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in line["layers"]]
    return line["key"], Entry(Shard(**line["shard"]), layers)


def fingerprint(*parts: str) -> str:
    """One hash of everything that decides the result."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; what a kill has torn is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
