"""What one commit should not hold: several commits on a pull request of one's own, merged when all of it is there.

The Hub advises fewer than 100 files in a commit, and nothing says how long it keeps an upload that no commit names.
So a large checkpoint goes to a draft pull request, part by part; a push that broke off finds it again by a mark in
its title and goes on behind its last commit. Before the merge every file's hash is compared there, so main goes from
none of it to all of it. (upload_large_folder, which commits as it goes, is gone from huggingface_hub 2; its successor
needs Xet, and a folder that holds just what is pushed.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from llmcomp.errors import RunError
from llmcomp.uploading import Changes, Committed, Parcel, Remote, State, quiet

MOST_FILES = 50  # of one commit
MOST_BYTES = 20_000_000_000
_LONGEST_TITLE = 200  # the Hub's limit


def large(parcel: Parcel, changes: Changes) -> bool:
    """Whether it should not go in one commit. To a branch of the user's it always does: there is no merge into one."""
    return parcel.revision is None and len(list(_parts(parcel, changes.sent))) > 1


def stage(remote: Remote, parcel: Parcel, changes: Changes) -> Committed:
    """Bring a large parcel to main, or to a pull request where it asks for one; nothing half is visible at any time.

    Raises:
        UserError, RunError: see `hub_failures.explain`; main has changed meanwhile; other bytes arrived than were sent.
    """
    before = changes.before
    title = f"{parcel.message[: _LONGEST_TITLE - 50]} {mark(parcel, before)}"
    with quiet():
        number = remote.persist("opening a pull request", lambda: _opened(remote, title))
        branch = f"refs/pr/{number}"
        remote.progress.note(f"All of it goes to pull request {number} of {remote.repo} first, which is merged last.")
        for names in _parts(parcel, changes.sent):
            _send(remote, parcel, names, branch)
        staged = remote.persist("making the last commit", lambda: _without_stale(remote, parcel, changes, branch))
        remote.require_arrived(staged, parcel)
        remote.persist("publishing the pull request", lambda: _publish(remote, number))
        if parcel.create_pr:
            return Committed(staged, remote.pull_url(number), changes.sent)
        done = remote.persist("merging", lambda: _merge(remote, number, parcel, before))
    remote.require_arrived(done, parcel)
    return Committed(done, remote.url(done), changes.sent)


def mark(parcel: Parcel, before: State | None) -> str:
    """What tells the pull request of a push from others: of what was verified, and on which commit of main.

    >>> mark(Parcel({}, {}, ""), None)
    '[llmcomp e3b0c44298fc1c14 on nothing]'
    """
    words = "\n".join(f"{name} {parcel.hashes[name]}" for name in sorted(parcel.hashes))
    base = before.commit[:12] if before else "nothing"
    return f"[llmcomp {hashlib.sha256(words.encode()).hexdigest()[:16]} on {base}]"


def _parts(parcel: Parcel, names: Sequence[str]) -> Iterator[list[str]]:
    """The paths in groups that a commit may hold."""
    part, nbytes = list[str](), 0
    for name in names:
        if part and (len(part) == MOST_FILES or nbytes + parcel.size(name) > MOST_BYTES):
            yield part
            part, nbytes = [], 0
        part.append(name)
        nbytes += parcel.size(name)
    if part:
        yield part


def _opened(remote: Remote, title: str) -> int:
    """The number of the pull request with this title, a new one where an earlier push or try has left none.

    One of ours with the same files for a main that has moved since is closed: this push takes its place.
    """
    found, same = None, title[: title.rindex(" on ")].rpartition("[")[2]
    for known in remote.api.get_repo_discussions(remote.repo, author=remote.user, discussion_type="pull_request"):
        if known.status not in ("draft", "open"):
            continue
        if known.title == title:
            found = found or int(known.num)
        elif f"[{same} on " in known.title:
            remote.api.change_discussion_status(remote.repo, known.num, "closed", comment=_MOVED)
    return found or int(remote.api.create_pull_request(remote.repo, title, description=_ABOUT).num)


_MOVED = "main has changed since this was opened; `llmcomp push` brings the same files by another pull request."
_ABOUT = "A checkpoint on its way, by `llmcomp push`, which merges this when all of it has arrived."


def _send(remote: Remote, parcel: Parcel, names: Sequence[str], branch: str) -> None:
    """One commit on the branch, of those files that are not there."""

    def commit() -> None:
        if missing := _missing(remote, parcel, names, branch):
            remote.api.create_commit(
                remote.repo, parcel.additions(missing), commit_message=f"{missing[0]} and {len(missing) - 1} more",
                revision=branch,
            )  # fmt: skip

    if missing := _missing(remote, parcel, names, branch):
        remote.upload(parcel, missing, branch)
        remote.persist("making a commit", commit)


def _missing(remote: Remote, parcel: Parcel, names: Sequence[str], branch: str) -> list[str]:
    there = remote.state(branch)
    return [name for name in names if there is None or not parcel.matches(name, there.files.get(name))]


def _without_stale(remote: Remote, parcel: Parcel, changes: Changes, branch: str) -> str:
    """Delete on the branch what the checkpoint has no more; the branch's commit."""
    from huggingface_hub import CommitOperationDelete

    there = remote.state(branch)
    if there is None:
        raise RunError(f"{branch} of {remote.repo} is gone. {remote.kept}")
    stale = [name for name in changes.stale if name in there.files]
    if not stale:
        return there.commit
    info = remote.api.create_commit(
        remote.repo, [CommitOperationDelete(name) for name in stale], commit_message="Files of an earlier push go",
        revision=branch, parent_commit=there.commit,
    )  # fmt: skip
    return str(info.oid)


def _status(remote: Remote, number: int) -> Any:
    return remote.api.get_discussion_details(remote.repo, number).status


def _publish(remote: Remote, number: int) -> None:
    """Out of draft mode, in which the Hub merges nothing."""
    if _status(remote, number) == "draft":
        remote.api.change_discussion_status(remote.repo, number, "open")


def _merge(remote: Remote, number: int, parcel: Parcel, before: State | None) -> str:
    """One try; the commit of main that holds all of it."""
    if _status(remote, number) != "merged":
        now = remote.state()
        if (now.commit if now else None) != (before.commit if before else None):
            raise RunError(f"{remote.repo} was changed by somebody else meanwhile. {remote.kept}")
        remote.api.merge_pull_request(remote.repo, number)
    now = remote.state()
    if now is None:
        raise RunError(f"{remote.repo} is gone. {remote.kept}")
    return now.commit
