"""What samples are made of and by: text by a tokenizer, images by a processor. What of it is asked depends on the task
alone; whoever trains need not know which it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from llmcomp.calibration.data import Texts, describe, held_out_warnings, read_texts, refuse_held_out
from llmcomp.calibration.media import Media, processor_of, read_media
from llmcomp.errors import BadData, BadRecipe
from llmcomp.measure.load import load_tokenizer
from llmcomp.progress import Progress
from llmcomp.training.data import IMAGES, TASKS, Samples, samples_of
from llmcomp.training.images import pictures_of, settings_of
from llmcomp.training.settings import Optimization, Teaching


class Learning(Protocol):
    """What a plan says of what is learned, and how."""

    @property
    def data(self) -> str: ...
    @property
    def samples(self) -> int | None: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def teaching(self) -> Teaching: ...
    @property
    def optimization(self) -> Optimization: ...


def require_trained(task: str, learning: Learning, text_column: str | None) -> None:
    """Refuse tasks that are not trained, and of images what is said of text.

    Raises:
        BadData, BadRecipe: naming the flag.
    """
    if task not in TASKS:
        raise BadData(f"Models for {task} cannot be trained here; {', '.join(TASKS)} can.")
    if task != IMAGES:
        return
    said = {
        "text-column": text_column is not None,
        "sequence-length": learning.sequence_length != getattr(type(learning), "sequence_length", None),  # its default
        "group-by-length": learning.optimization.group_by_length,
        "vocabulary": getattr(learning, "vocabulary", "same") != "same",
    }
    if wrong := [name for name, given in said.items() if given]:
        raise BadRecipe(f"--{wrong[0]} is about text, and the model reads images; leave it out.")


def reader_of(directory: Path, model: Any, task: str) -> Any:
    """A tokenizer, or what makes pixel values.

    Raises:
        BadCheckpoint, BadData: none is there.
    """
    return processor_of(directory, model) if task == IMAGES else load_tokenizer(directory)


def alike(one: Any, other: Any, task: str) -> bool:
    """Whether two readers make the same of the same."""
    if task == IMAGES:
        return settings_of(one) == settings_of(other)
    return bool(one.get_vocab() == other.get_vocab())


def read(
    source: str, task: str, *, text_column: str | None, label_column: str | None, gaps: bool, progress: Progress
) -> Texts | Media:
    """Data of the kind that a task is trained on.

    Args:
        gaps: rows may lack a label that others have.

    Raises:
        BadData: there is none, it is of another kind or held out.
    """
    if task != IMAGES:
        return read_texts(source, text_column=text_column, label_column=label_column, gaps=gaps, progress=progress)
    refuse_held_out(source)
    found = read_media(source, "images", label_column=label_column, gaps=gaps)
    found.warnings += held_out_warnings(source)
    return found


def made(
    data: Texts | Media, reader: Any, model: Any, task: str, learning: Learning, progress: Progress
) -> tuple[Samples, str]:
    """Samples, and words for them.

    Raises:
        BadData: too few, or with labels that are missing or not the model's.
    """
    taught = learning.teaching.teacher is not None
    if isinstance(data, Media):
        found = pictures_of(data, reader, model, count=learning.samples, taught=taught, progress=progress)
        return found, f"{data.description}: {len(found):,} samples"
    cut = samples_of(
        data, reader, model, task, length=learning.sequence_length, count=learning.samples,
        seed=learning.optimization.seed, taught=taught,
    )  # fmt: skip
    return cut, describe(data, cut.windows, reader, task)


def label_hint(task: str) -> str:
    """How labels are given."""
    if task == IMAGES:
        return "put images into subfolders named by their labels, or give a table with --label-column"
    return "name their column with --label-column"
