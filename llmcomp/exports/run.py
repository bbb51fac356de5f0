"""One export, from a directory to a directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from llmcomp import lora
from llmcomp.checkpoint import Checkpoint
from llmcomp.errors import BadRecipe
from llmcomp.exports import EXPORTS
from llmcomp.formats.opening import open_checkpoint
from llmcomp.formats.save import CHECKPOINT, partial_of, preflight, publish, writing
from llmcomp.progress import Progress

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
        publish(partial, output, overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in absent:
            with contextlib.suppress(OSError):  # not empty: the output lies in it
                folder.rmdir()
    return notes


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
