"""SHA-256 of files: what a report says of the checkpoint that was verified, and what is compared before a push."""

from __future__ import annotations

import hashlib
from pathlib import Path

# They are written after the checkpoint has been verified, about it, or by its owner.
BESIDE = ("llmcomp_report.json", "llmcomp_report.html", "llmcomp_export.json", "README.md", "prune_in_training.yaml",
          "distill.yaml")  # fmt: skip


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def digests(directory: Path) -> dict[str, str]:
    """{path below `directory`: SHA-256} of everything in a checkpoint but what is written about it and hidden files."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if path.is_file() and not any(part.startswith(".") for part in name.parts) and str(name) not in BESIDE:
            found[name.as_posix()] = file_sha256(path)
    return found


def difference(directory: Path, known: dict[str, str]) -> str | None:
    """The first of the `known` files that is missing or has other bytes, in words; None where all agree."""
    for name, expected in known.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if file_sha256(path) != expected:
            return f"{name} has other bytes"
    return None
