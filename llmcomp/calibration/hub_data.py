"""Datasets of the Hub through `datasets`, without its 23 seconds of retries where there is no network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from llmcomp.errors import BadData
from llmcomp.network import Unreachable, ask, endpoint


def dataset_columns(name: str, config: str | None, split: str) -> dict[str, list[Any]]:
    """{column: values} of one split of a Hub dataset, from the local cache where the Hub does not answer.

    Raises:
        BadData: no such dataset, config or split; no access; or neither cached nor reachable.
    """
    from huggingface_hub import errors
    from huggingface_hub.utils import hf_raise_for_status

    what = f"Dataset {name}" + (f" ({config})" if config else "")
    why = ""
    try:
        answer = ask(f"{endpoint()}/api/datasets/{name}")
        if answer.status_code >= 500 or answer.status_code == 429:
            why = f"{endpoint()} answered {answer.status_code}"
        else:
            hf_raise_for_status(answer)
    except Unreachable as error:
        why = str(error)
    except errors.HfHubHTTPError as error:
        raise BadData(
            f"{what} is not on the Hub, or not for you to see (`hf auth login`); "
            "give org/name[:config] or a local file."
        ) from error
    if why and not _cache_has(name):
        raise BadData(
            f"{what} is neither cached nor reachable ({why}); offline, give a local file or 'sample'."
        )
    return _load(what, name, config, split, offline=bool(why))


def _load(what: str, name: str, config: str | None, split: str, offline: bool) -> dict[str, list[Any]]:
    import datasets

    try:
        with _quiet(offline):
            data = datasets.load_dataset(name, config, split=split)
    except ConnectionError as error:
        raise BadData(
            f"{what} cannot be fetched ({_first_line(error)}); give a local file or 'sample'."
        ) from error
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise BadData(f"{what}, split {split!r}, cannot be read: {_first_line(error)}") from error
    columns: dict[str, list[Any]] = data.to_dict()
    return columns


@contextmanager
def _quiet(offline: bool) -> Iterator[None]:
    """No bars and no remarks from `datasets` and, if `offline`, no requests; both as they were afterwards."""
    import datasets
    from huggingface_hub import constants

    bars = not datasets.are_progress_bars_disabled()
    with ExitStack() as stack:
        stack.callback(datasets.logging.set_verbosity, datasets.logging.get_verbosity())
        datasets.logging.set_verbosity_error()
        if offline:
            stack.enter_context(mock.patch.object(constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True))
        if bars:
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        yield


def _cache_has(name: str) -> bool:
    """Whether `datasets` has prepared anything of that name; told without importing it (one second)."""
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()
    folder = name.replace("/", "___").lower()
    return cache.is_dir() and any(entry.name.lower() == folder for entry in cache.iterdir())


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
