"""A repository on the Hub that is written to: who may, what is there, one commit, and a look at what has arrived.

Weights are uploaded before the commit that names them, a few files at a time, and what the Hub has already is not
sent again: a push that broke off is resumed by the same command, and nobody ever sees half a model. What is too large
for one commit goes by several, on a pull request (`llmcomp.staging`). What may be chance (connections that drop, 429,
5xx) is tried again with longer and longer waits; what cannot be is one sentence. The token is asked of
huggingface_hub, kept in memory, and in no message.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmcomp.errors import LlmcompError, RunError, UserError
from llmcomp.network import Unreachable, ask, endpoint
from llmcomp.progress import Progress

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between tries, where the Hub does not say how long
_LONGEST_WAIT = 60.0
_TOGETHER = 4  # files that are on their way at once
_CHANCE = (408, 429, 500, 502, 503, 504)
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_QUOTA = re.compile(r"quota|storage|limit|payment", re.IGNORECASE)
_OURS, _START = {"llmcomp_report.json", "llmcomp_export.json"}, {".gitattributes", "README.md"}  # made by hand, too
# Of an earlier push, where the new one does not write them: weights of another number of shards, plots, an adapter.
_STALE = re.compile(
    r"[^/]+\.safetensors|[^/]+\.index\.json|llmcomp_plots/[^/]+|adapter/[^/]+|llmcomp_(report|export)\.\w+"
    r"|model\.(gguf|onnx|onnx\.data)|openvino_model\.\w+"
)

Content = Path | bytes
T = TypeVar("T")


@dataclass(frozen=True)
class State:
    """What is in a repository: commit, whether it is private, {path: hash}, of LFS SHA-256, else git's SHA-1."""

    commit: str
    private: bool
    files: dict[str, str]


@dataclass(frozen=True)
class Parcel:
    """What one commit brings.

    Attributes:
        files: path there → file, or bytes. hashes: SHA-256 of some, so that they are not computed again.
        revision: a branch, None is main. create_pr: as a pull request to it.
    """

    files: Mapping[str, Content]
    hashes: Mapping[str, str]
    message: str
    revision: str | None = None
    create_pr: bool = False

    def size(self, name: str) -> int:
        """In bytes."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    def matches(self, name: str, known: str | None) -> bool:
        """Whether the hash that the Hub has is of this file, as LFS or as git counts."""
        if known is None:
            return False
        if len(known) == 64 and name in self.hashes:
            return known == self.hashes[name]
        content = self.files[name]
        data = content if isinstance(content, bytes) else content.read_bytes()
        if len(known) == 64:
            return hashlib.sha256(data).hexdigest() == known
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == known

    def additions(self, names: Sequence[str]) -> list[Any]:
        """huggingface_hub's operations, new ones: those that were committed cannot be used again."""
        from huggingface_hub import CommitOperationAdd

        made = []
        for name in names:
            content = self.files[name]
            one = CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            if name in self.hashes:
                one.upload_info.sha256 = bytes.fromhex(self.hashes[name])
            made.append(one)
        return made


@dataclass(frozen=True)
class Changes:
    """What a parcel changes: paths with new content, paths that go, and what is there before."""

    sent: tuple[str, ...]
    stale: tuple[str, ...]
    before: State | None


@dataclass(frozen=True)
class Committed:
    """What a push has done. `sent`: paths whose content is new there; `url`: of the commit, or the pull request."""

    commit: str
    url: str
    sent: tuple[str, ...]


def require_name(repo: str) -> None:
    """Refuse what is no 'user/name'.

    Raises:
        UserError: it is not.
    """
    name = repo.rpartition("/")[2]
    if not _NAME.fullmatch(repo) or len(repo) > 96 or ".." in repo or "--" in repo or name.endswith((".git", ".")):
        raise UserError(
            f"{repo!r} is no name on the Hub; expected user/name or organization/name, of letters, digits, '-', '_' "
            "and '.'."
        )


class Remote:
    """A repository of models on the Hub, by the user's token.

    Args:
        repo: 'user/name'. kept: what is said behind each error, of what is safe and what resumes.

    Raises:
        UserError: no such name, offline mode, no token, one that is not accepted or may not write there.
        RunError: no connection.
    """

    def __init__(self, repo: str, kept: str, progress: Progress) -> None:
        from huggingface_hub import HfApi, get_token

        require_name(repo)
        self.repo, self.kept, self.progress = repo, kept, progress
        self._token = get_token() or ""
        if not self._token:
            raise UserError(
                "There is no token for the Hub; run `hf auth login`, or set HF_TOKEN, with one that may write."
            )
        self.api = HfApi(endpoint=endpoint(), token=self._token, library_name="llmcomp")
        self.user = self._require_right()

    def _require_right(self) -> str:
        """Ask who the token is of, and compare with the name; returns who."""
        from huggingface_hub.utils import hf_raise_for_status

        def who() -> dict[str, Any]:
            answer = ask(f"{endpoint()}/api/whoami-v2")
            hf_raise_for_status(answer)
            return dict(answer.json())

        found = self.persist("asking whose the token is", who)
        space, user = self.repo.split("/")[0], str(found.get("name"))
        role = ((found.get("auth") or {}).get("accessToken") or {}).get("role")
        spaces = [user, *(str(one.get("name")) for one in found.get("orgs") or [])]
        if role == "read":
            raise UserError(f"The token of {user} may only read; run `hf auth login` with one that may write.")
        if space.lower() not in (one.lower() for one in spaces):
            raise UserError(
                f"The token is of {user}, who has no rights to write to {space}; push to {' or '.join(spaces)}, or log "
                "in as someone who has."
            )
        return user

    def state(self, revision: str | None = None) -> State | None:
        """What is there; None where there is no such repository, or revision."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.hf_api import RepoFile

        def look() -> State | None:
            try:
                info = self.api.model_info(self.repo, revision=revision)
                tree = list(self.api.list_repo_tree(self.repo, revision=info.sha, recursive=True))
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None
            files = [entry for entry in tree if isinstance(entry, RepoFile)]
            hashes = {one.path: one.lfs.sha256 if one.lfs else one.blob_id for one in files}
            return State(str(info.sha), bool(info.private), hashes)

        return self.persist("looking at what is there", look)

    def require_free(self, private: bool) -> State | None:
        """What is there, if a checkpoint of llmcomp may go there.

        Raises:
            UserError: somebody else's files are there, or it is public and was to be private.
        """
        there = self.state()
        if there is None:
            return None
        if not _OURS & set(there.files) and set(there.files) - _START:
            raise UserError(
                f"{self.repo} is taken: {len(there.files)} files are there that no llmcomp has written; choose another "
                "name."
            )
        if private and not there.private:
            raise UserError(f"{self.repo} is public already; make it private in its settings, or choose another name.")
        return there

    def prepare(self, private: bool, revision: str | None) -> None:
        """Make the repository, and the branch, where they are missing.

        Raises:
            UserError, RunError: see `explain`.
        """
        if self.require_free(private) is None:
            self.persist("making the repository",
                          lambda: self.api.create_repo(self.repo, private=private, exist_ok=True))  # fmt: skip
        if revision is not None and self.state(revision) is None:
            self.persist("making the branch",
                          lambda: self.api.create_branch(self.repo, branch=revision, exist_ok=True))  # fmt: skip

    def changes(self, parcel: Parcel) -> Changes:
        """What the parcel changes; what is there under other names of weights goes."""
        before = self.state(parcel.revision)
        known = before.files if before else {}
        sent = tuple(name for name in parcel.files if not parcel.matches(name, known.get(name)))
        stale = tuple(name for name in known if name not in parcel.files and _STALE.fullmatch(name))
        return Changes(sent, stale, before)

    def commit(self, parcel: Parcel, changes: Changes) -> Committed:
        """Bring the parcel there as one commit.

        Raises:
            UserError, RunError: see `explain`; or what has arrived is not what was sent.
        """
        if changes.before is not None and not changes.sent and not changes.stale:
            return Committed(changes.before.commit, self.url(changes.before.commit), ())
        with quiet():
            self.upload(parcel, changes.sent, parcel.revision)
            done = self.persist("making the commit", lambda: self._commit(parcel, changes))
        self.require_arrived(done.commit, parcel)
        return done

    def url(self, commit: str) -> str:
        """Of a commit."""
        return f"{endpoint()}/{self.repo}/commit/{commit}"

    def pull_url(self, number: int) -> str:
        """Of a pull request."""
        return f"{endpoint()}/{self.repo}/discussions/{number}"

    def upload(self, parcel: Parcel, names: Sequence[str], revision: str | None) -> None:
        """Send what goes to LFS, some files at a time; what the Hub has is skipped by the protocol."""
        nbytes = sum(map(parcel.size, names))
        self.progress.note(f"Uploading to {self.repo}: {len(names)} files, {nbytes / 1e6:,.1f} MB.")
        self.progress.phase("upload", total=max(1, len(names)))
        for start in range(0, len(names), _TOGETHER):
            group = names[start : start + _TOGETHER]

            def send(group: Sequence[str] = group) -> None:
                self.api.preupload_lfs_files(
                    self.repo, parcel.additions(group), revision=revision,
                    create_pr=parcel.create_pr and revision is None, num_threads=_TOGETHER, free_memory=False,
                )  # fmt: skip

            self.persist(f"uploading {group[0]}", send)
            self.progress.step(len(group))

    def _commit(self, parcel: Parcel, changes: Changes) -> Committed:
        """One try. Where an earlier one arrived though its answer did not, that is taken."""
        from huggingface_hub import CommitOperationDelete

        before, sent = changes.before, changes.sent
        now = None if parcel.create_pr else self.state(parcel.revision)
        if now is not None and now != before and all(parcel.matches(n, now.files.get(n)) for n in parcel.files):
            return Committed(now.commit, self.url(now.commit), sent)
        deletions = map(CommitOperationDelete, changes.stale)
        info = self.api.create_commit(
            self.repo, [*parcel.additions(sent), *deletions], commit_message=parcel.message,
            revision=parcel.revision, create_pr=parcel.create_pr, parent_commit=before.commit if before else None,
        )  # fmt: skip
        return Committed(str(info.oid), str(info.pr_url or info.commit_url), sent)

    def require_arrived(self, commit: str, parcel: Parcel) -> None:
        """Refuse to believe a commit that does not hold what was sent.

        Raises:
            RunError: it does not.
        """
        there = self.state(commit)
        for name in parcel.files:
            if there is None or not parcel.matches(name, there.files.get(name)):
                raise RunError(
                    f"{name} at {self.repo}, commit {commit[:12]}, is not what was sent; look at the repository before "
                    f"anybody uses it, and push again. {self.kept}"
                )

    def persist(self, what: str, call: Callable[[], T]) -> T:
        """`call`, again and again where its failure may be chance.

        Raises:
            UserError, RunError: see `explain`.
        """
        for wait in (*WAITS, None):
            try:
                return call()
            except LlmcompError:
                raise
            except Exception as error:  # huggingface_hub, httpx and hf_xet have no common base
                if wait is None or not _chance(error):
                    raise explain(error, what, self.repo, self.kept, self._token) from error
                pause = min(_LONGEST_WAIT, _asked(error) or wait)
                self.progress.note(f"{_reason(error, self._token)} while {what}; trying again in {pause:.0f} s.")
                time.sleep(pause)
        raise AssertionError("unreachable: the last try returns or raises")


def explain(error: Exception, what: str, repo: str, kept: str, token: str) -> LlmcompError:
    """One sentence for what a request ended with, and one on what is safe."""
    status = _status(error)
    reason = _reason(error, token)
    space = repo.split("/")[0]
    if isinstance(error, ValueError) and "README.md" in str(error):
        return UserError(f"The Hub does not accept the card: {reason}. {kept}")
    if isinstance(error, Unreachable):
        return RunError(f"The Hub cannot be reached ({reason}). {kept}")
    if status == 401:
        return UserError(f"The Hub does not accept the token ({reason}); run `hf auth login` again. {kept}")
    if status == 402 or (status in (403, 413) and _QUOTA.search(reason)):
        return UserError(f"The Hub has no room for it ({reason}); make some, or ask for more. {kept}")
    if status == 403:
        return UserError(f"The token has no right to write to {space} ({reason}); use one that has. {kept}")
    if status in (409, 412):
        return RunError(f"{repo} was changed by somebody else meanwhile ({reason}). {kept}")
    if status == 429:
        return RunError(f"The Hub takes no more requests for now ({reason}). {kept}")
    return RunError(f"The push to {repo} broke off while {what} ({reason}). {kept}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: Exception) -> int | None:
    for one in _chain(error):
        response = getattr(one, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


def _chance(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    import httpx2

    if isinstance(error, Unreachable):
        return False  # asked once, at the start: the user is still there
    status = _status(error)
    if status is not None:
        return status in _CHANCE
    kinds = (httpx2.TransportError, json.JSONDecodeError, ConnectionError, TimeoutError)
    return any(isinstance(one, kinds) for one in _chain(error))


def _asked(error: Exception) -> float | None:
    """Seconds that the Hub asks to wait."""
    for one in _chain(error):
        headers = getattr(getattr(one, "response", None), "headers", None)
        if headers is not None and str(headers.get("Retry-After", "")).isdigit():
            return float(headers["Retry-After"])
    return None


def _reason(error: Exception, token: str) -> str:
    """What the Hub said, else the last cause, as one line without the token."""
    chain = list(_chain(error))
    said = next((text for one in chain if (text := getattr(one, "server_message", None))), None)
    said = str(said or chain[-1]) or type(chain[-1]).__name__
    status = _status(error)
    line = " ".join(said.split())[:300].rstrip(".")
    line = line if status is None or str(status) in line else f"{status}: {line}"
    return line.replace(token, "the token") if token else line


@contextmanager
def quiet() -> Iterator[None]:
    """Without huggingface_hub's bars and its talk of empty commits: what there is to say goes to `progress`."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were:
            enable_progress_bars()
