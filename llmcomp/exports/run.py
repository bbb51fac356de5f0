"""One export, from a directory to a directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from llmcomp import lora
from llmcomp.checkpoint import Checkpoint
from llmcomp.digests import digests
from llmcomp.errors import BadRecipe
from llmcomp.export_record import RECORD_NAME, ExportRecord
from llmcomp.exports import EXPORTS
from llmcomp.formats.opening import Opened, open_checkpoint
from llmcomp.formats.save import CHECKPOINT, partial_of, preflight, publish, writing
from llmcomp.measure.load import task_of
from llmcomp.progress import Progress
from llmcomp.provenance import origin_of
from llmcomp.report.schema import FILE_NAME, Report

_OF_THE_SOURCE = "llmcomp_report."  # sizes and labels in it are those of the source


def export_to(directory: Path, output: Path, form: str, overwrite: bool, progress: Progress) -> list[str]:
    """Write `directory` anew as `output`; returns the notes.

    Raises:
        UserError: no such format, what it cannot represent, or an output that may not be replaced.
        RunError: the disk, or an export that is not what it was made of.
    """
    if form not in EXPORTS:
        raise BadRecipe(f"--format {form} cannot be: choose one of {', '.join(EXPORTS)}.")
    if lora.beside(directory) is not None:
        raise BadRecipe(
            f"{directory} has an adapter beside its weights, for which no format here has a place; export the "
            "checkpoint that it was made of."
        )
    checkpoint = Checkpoint.open(directory)
    preflight(directory, output, overwrite, checkpoint.nbytes)
    progress.phase("open")
    opened = open_checkpoint(directory)
    partial = partial_of(output)
    absent = [folder for folder in partial.parents if not folder.exists()]
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed; none is resumed
    target = partial / CHECKPOINT
    try:
        with writing(target):
            target.mkdir(parents=True)
        progress.phase(f"write {form}")
        notes = EXPORTS[form](opened, target)
        with writing(target):
            _copy_beside(checkpoint, target)
            (target / RECORD_NAME).write_text(_record(opened, form, notes, target).to_json(), encoding="utf-8")
        publish(partial, output, overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in absent:
            with contextlib.suppress(OSError):  # not empty: the output lies in it
                folder.rmdir()
    return notes


def _record(opened: Opened, form: str, notes: list[str], target: Path) -> ExportRecord:
    """What a card of the export will say, and a push compare with."""
    directory = opened.directory
    report = Report.read(directory) if (directory / FILE_NAME).is_file() else None
    architecture = str((opened.config.get("architectures") or [type(opened.skeleton).__name__])[0])
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return ExportRecord(
        form, str(directory), architecture, task_of(directory), created, version("llmcomp"), notes,
        origin_of(directory), digests(target), report,
    )  # fmt: skip


def _copy_beside(checkpoint: Checkpoint, target: Path) -> None:
    """The tokenizer's files and the like, but for those that the export has written itself."""
    for file in checkpoint.copied_files():
        if file.name.startswith(_OF_THE_SOURCE):
            continue
        copy = target / file.relative_to(checkpoint.path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            copy.mkdir(exist_ok=True)
        elif not copy.exists():
            shutil.copyfile(file, copy)
