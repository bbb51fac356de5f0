"""A table of sentences made larger by a masked language model: from names to a file (`training.augmenting` is how)."""

from __future__ import annotations

from pathlib import Path

from llmcomp import hub
from llmcomp.calibration.data import read_texts
from llmcomp.devices import choose
from llmcomp.errors import BadCheckpoint, UserError
from llmcomp.measure.load import load, load_tokenizer, task_of
from llmcomp.progress import Progress, Silent
from llmcomp.ranks import launched
from llmcomp.training.augmenting import Augmentation, Filler, augment


def augment_rows(
    data: str, model: str, output: str | Path, settings: Augmentation | None = None, *, text_column: str | None = None,
    label_column: str | None = None, device: str = "auto", progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Write the rows of a table, and copies of each with other words, to a .jsonl file; one that is there stays.

    Args:
        data: a file of rows or a Hub dataset. model: a masked language model, by a directory, Hub id or alias.
        settings: how many copies of what kind. text_column, label_column: of the data, and keys of what is written.

    Raises:
        UserError: data without rows, a model that fills no gaps, or several processes (exit status 2).
        RunError: the file could not be written (exit status 1).
    """
    output, settings, progress = Path(output), settings or Augmentation(), progress or Silent()
    settings.check()
    if output.exists():
        progress.note(f"{output} is there already.")
        return output
    if launched().size > 1:
        raise UserError(f"{output} is made by one process; start the same command without a launcher once, first.")
    path = hub.resolve(model, progress=progress).path
    if (task := task_of(path)) != "masked-lm":
        raise BadCheckpoint(f"{model} is for {task}; augmentation asks a masked language model for words.")
    texts = read_texts(data, text_column=text_column, label_column=label_column, gaps=True, progress=progress)
    filler = Filler.of(load(path, task).to(choose(device)), load_tokenizer(path))
    return augment(
        texts, filler, settings, output, progress, columns=(text_column or "text", label_column or "label")
    )
