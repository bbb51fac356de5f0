"""Files of a repository on the Hub into its cache, and whether what arrived is what the Hub, and the report, say.

huggingface_hub resumes a download that breaks off and compares its length, not its bytes, and never looks again at what
lies in its cache. Here every file that is used is hashed, once in a process: what differs is thrown out, fetched
once more, and refused if that does not help. Where the Hub does not answer, the cache names weights by their hash. A
checkpoint of llmcomp names in its report the files that were verified: weights that are others are refused, though the
Hub holds them so.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcomp.digests import file_sha256
from llmcomp.errors import BadCheckpoint, RunError
from llmcomp.progress import Progress, Silent
from llmcomp.report.schema import FILE_NAME

_WEIGHTS = (".safetensors", ".safetensors.index.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MUCH = 1_000_000_000  # bytes to hash: from here on it is said


@dataclass(frozen=True)
class Entry:
    """What the Hub says of a file: bytes, and its SHA-256 (of LFS) or git's SHA-1, None where it says neither."""

    size: int
    sha256: str | None = None
    git: str | None = None

    @classmethod
    def of(cls, sibling: dict[str, Any]) -> Entry:
        """One of the `siblings` of a description that was asked for with `blobs`."""
        return cls(sibling.get("size") or 0, (sibling.get("lfs") or {}).get("sha256"), sibling.get("blobId"))

    def matches(self, path: Path) -> bool:
        """Whether the file at `path` is this one; of LFS files `git` is of the pointer."""
        if self.sha256 is not None:
            return _known_sha256(path) == self.sha256
        if self.git is None:
            return path.stat().st_size == self.size
        data = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == self.git


def _known_sha256(path: Path) -> str:
    """SHA-256 of a file, computed once while it stays as it is: a run may ask several times for its source."""
    stat = path.stat()
    return _hashed(path.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _hashed(path: Path, size: int, changed: int) -> str:
    return file_sha256(path)


def fetch(
    what: str, repo: str, revision: str | None, commit: str, entries: dict[str, Entry], progress: Progress
) -> Path:
    """Bring the files of `entries` into the cache, where they are not there as the Hub has them.

    Returns the snapshot's directory.

    Args:
        revision: what was asked for, None is main. commit: what it was when `entries` were described.

    Raises:
        RunError: no room, a download that broke off, another commit meanwhile, or other bytes than the Hub says, twice.
        GatedRepoError: huggingface_hub's, where access is refused.
    """
    from huggingface_hub import try_to_load_from_cache

    missing = [n for n in entries if not isinstance(try_to_load_from_cache(repo, n, revision=revision), str)]
    if missing:
        nbytes = sum(entries[name].size for name in missing)
        _require_room(what, nbytes)
        progress.note(f"Downloading {what}: {len(missing)} files, {nbytes / 1e6:,.1f} MB.")
        progress.phase("download", total=max(1, round(nbytes / 1e6)))
    path = _snapshot(what, repo, revision, entries, progress if missing else Silent())
    if path.name != commit:
        raise RunError(f"{what} was changed on the Hub while it was downloaded; run the command again.")
    _announce(sum(entry.size for entry in entries.values()), progress)
    if wrong := _wrong(path, entries, entries):
        came = "arrived with" if wrong[0] in missing else "lies in the cache with"
        progress.note(f"{wrong[0]} of {what} {came} other bytes than the Hub says; it is downloaded again.")
        _discard(path, wrong)
        path = _snapshot(what, repo, revision, entries, Silent())
        if wrong := _wrong(path, wrong, entries):
            _discard(path, wrong)
            often = "twice" if wrong[0] in missing else "again"
            raise RunError(
                f"{wrong[0]} of {what} arrived {often} with other bytes than the Hub says, and was thrown away; run "
                "the command again later, or over another network."
            )
    return path


def require_as_downloaded(what: str, path: Path, progress: Progress) -> None:
    """Refuse weights in the cache that are not, any more, what their names there say; nobody else can be asked.

    Args:
        path: the snapshot, whose weights are links to files that are named by their SHA-256.

    Raises:
        BadCheckpoint: they are not.
    """
    files = [file for file in sorted(path.glob("*.safetensors")) if _SHA256.fullmatch(file.resolve().name)]
    _announce(sum(file.stat().st_size for file in files), progress)
    for file in files:
        if _known_sha256(file) != file.resolve().name:
            raise BadCheckpoint(
                f"{file.name} of {what} lies in the cache with other bytes than were downloaded; run the command where "
                "the Hub can be reached, which downloads it again."
            )


def _announce(nbytes: int, progress: Progress) -> None:
    if nbytes >= _MUCH:
        progress.phase("compare with the Hub's hashes")


def require_as_verified(what: str, path: Path, entries: dict[str, Entry], progress: Progress) -> None:
    """Refuse a checkpoint of llmcomp whose weights are not those that its report says were verified.

    Args:
        path: the snapshot. entries: all files of the repository, as the Hub describes them.

    Raises:
        BadCheckpoint: they are not.
    """
    for name, expected in _verified(path).items():
        known = entries.get(name)
        weights = name.endswith(_WEIGHTS)
        if known is None and not weights:
            continue  # not needed to load it
        there = known.sha256 if known else None
        if there is None and (path / name).is_file():
            there = _known_sha256(path / name)
        if there == expected or (known is not None and there is None):  # the latter was not fetched
            continue
        found = "has other bytes" if known else "is missing"
        if weights:
            raise BadCheckpoint(
                f"{what} is not what its report says was verified: {name} {found}; its owner can push "
                f"it again, or, if that is on purpose, delete {FILE_NAME} there."
            )
        progress.note(f"{name} of {what} was changed after the checkpoint had been verified.")


def _verified(path: Path) -> dict[str, str]:
    """{name: SHA-256} by the report of the checkpoint; nothing where there is none, or no such list in it."""
    try:
        files = json.loads((path / FILE_NAME).read_text(encoding="utf-8")).get("files")
    except (OSError, ValueError, AttributeError):
        return {}
    return {str(name): str(digest) for name, digest in files.items()} if isinstance(files, dict) else {}


def _wrong(path: Path, names: Iterable[str], entries: dict[str, Entry]) -> list[str]:
    return [name for name in names if not entries[name].matches(path / name)]


def _discard(path: Path, names: Iterable[str]) -> None:
    """Out of the cache: the snapshot's link, and the blob that it leads to."""
    _hashed.cache_clear()  # what comes next may be as large and, by a coarse clock, as old
    for name in names:
        blob = (path / name).resolve()
        (path / name).unlink()
        blob.unlink(missing_ok=True)


def _snapshot(what: str, repo: str, revision: str | None, names: Iterable[str], progress: Progress) -> Path:
    import httpx2
    from huggingface_hub import errors, snapshot_download

    try:
        path = snapshot_download(
            repo, revision=revision, allow_patterns=[glob.escape(name) for name in names],
            tqdm_class=_megabytes(progress),
        )  # fmt: skip
    except errors.GatedRepoError:
        raise
    except (errors.HfHubHTTPError, httpx2.TransportError, OSError) as error:  # a full disk is an OSError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"Downloading {what} broke off ({reason}); run the command again to continue.") from error
    return Path(path)


def _require_room(what: str, nbytes: int) -> None:
    """Refuse a download for which the disk of the Hub's cache has no room.

    Raises:
        RunError: it has not.
    """
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise RunError(
            f"Downloading {what} takes {nbytes / 1e9:.2f} GB, and the disk of {constants.HF_HUB_CACHE} has "
            f"{free / 1e9:.2f} GB free; make room, or set HF_HOME to a place that has it."
        )


def _megabytes(progress: Progress) -> Any:
    """A bar class for huggingface_hub that draws nothing and tells `progress` of every megabyte."""
    from tqdm.auto import tqdm

    class Megabytes(tqdm):  # type: ignore[type-arg]
        told = 0  # shared by the two bars of one download (received, written): the further one counts

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.bytes = 0
            self.counts = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if not self.counts:
                return
            with self.get_lock():
                self.bytes += int(n or 0)
                new = self.bytes // 1_000_000 - Megabytes.told
                Megabytes.told += max(0, new)
            if new > 0:
                progress.step(new)

    return Megabytes
