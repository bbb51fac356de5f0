"""A compressed checkpoint as a transformers model whose weights stay packed where they lie so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmcomp import hf, native
from llmcomp.errors import BadCheckpoint
from llmcomp.formats.opening import Opened, open_checkpoint
from llmcomp.formats.reading import auto_class
from llmcomp.measure.load import load
from llmcomp.progress import Progress, Silent


def load_packed(path: Path, progress: Progress | None = None, adapter: bool = True) -> Any:
    """See `llmcomp.load`."""
    try:
        opened = open_checkpoint(path)
    except BadCheckpoint as error:  # no integers in groups, or not whole: transformers opens it or says why not
        (progress or Silent()).note(f"Loaded as plain transformers does: {error}")
        return load(path, adapter=adapter)
    return load_opened(opened, adapter=adapter)


def load_opened(opened: Opened, adapter: bool = True) -> Any:
    """The model of a checkpoint that has been opened."""
    auto = auto_class(opened.skeleton.config)
    if not opened.kinds:
        return load(opened.directory, auto=auto, adapter=adapter)
    wrapped = native.wrap(opened.config, native.describe(opened.kinds))
    return load(opened.directory, config=hf.config_of(wrapped), auto=auto, adapter=adapter)
