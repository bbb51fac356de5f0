"""Pull requests of the loopback Hub: opened as drafts, written to as refs/pr/N, published, and merged all at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from hub_server import HubServer, _Handler

_WHEN = "2026-11-21T10:41:07.000Z"


@dataclass
class Pull:
    """One of them. `base`: main's commit when it was opened; a merge onto another one is a conflict here."""

    title: str
    author: str
    base: str
    status: str


def opened(hub: HubServer, repo: str, title: str, status: str, handler: _Handler) -> int:
    """Its number, from 1."""
    import hub_writing
    from hub_server import commit_of

    user = hub_writing.user_of(handler)
    pulls = hub.store.pulls.setdefault(repo, [])
    pulls.append(Pull(title, user.name if user else "", commit_of(hub.root / repo), status))
    return len(pulls)


def replace(target: Path, work: Path) -> None:
    """Put the folder `work` in the place of `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    old = work.with_name(".old")
    if target.exists():
        target.rename(old)
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _open(handler: _Handler, repo: str) -> None:
    import hub_writing

    hub, asked = handler.hub, json.loads(handler.body)
    if not hub_writing._may(handler, repo.split("/")[0]):
        return
    with hub.lock:
        number = opened(hub, repo, asked["title"], "draft", handler)
        shutil.copytree(hub.root / repo, hub_writing.ref_folder(hub, repo, f"refs/pr/{number}"))
    handler._json({"num": number})


def _list(handler: _Handler, repo: str) -> None:
    query = parse_qs(urlsplit(handler.path).query)
    pulls = [(number, pull) for number, pull in enumerate(handler.hub.store.pulls.get(repo, []), 1)
             if pull.author in query.get("author", [pull.author])]  # fmt: skip
    start = int(query["p"][0]) * 2  # pages are short, so that clients must turn them
    shown = [_said(repo, number, pull) for number, pull in pulls[start : start + 2]]
    handler._json({"count": len(pulls), "start": start, "discussions": shown})


def _details(handler: _Handler, repo: str, number: str) -> None:
    pull = handler.hub.store.pulls[repo][int(number) - 1]
    changes = {"base": "refs/heads/main"}
    handler._json(_said(repo, int(number), pull) | {"changes": changes, "filesWithConflicts": [], "events": []})


def _said(repo: str, number: int, pull: Pull) -> dict[str, Any]:
    return {"num": number, "title": pull.title, "author": {"name": pull.author}, "createdAt": _WHEN,
            "status": pull.status, "repo": {"name": repo, "type": "model"}, "isPullRequest": True}  # fmt: skip


def _change(handler: _Handler, repo: str, number: str) -> None:
    import hub_writing

    if hub_writing._may(handler, repo.split("/")[0]):
        pull = handler.hub.store.pulls[repo][int(number) - 1]
        pull.status = json.loads(handler.body)["status"]
        event = {"id": "1", "type": "status-change", "createdAt": _WHEN, "author": {"name": pull.author}}
        handler._json({"newStatus": event | {"data": {"status": pull.status}}})


def _merge(handler: _Handler, repo: str, number: str) -> None:
    import hub_writing
    from hub_server import commit_of

    hub = handler.hub
    if not hub_writing._may(handler, repo.split("/")[0]):
        return
    pull = hub.store.pulls[repo][int(number) - 1]
    with hub.lock:
        if pull.status != "open" or commit_of(hub.root / repo) != pull.base:
            handler._refuse(409, "", f"It is {pull.status}, or in conflict with main")
            return
        work = hub.root / ".work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(hub_writing.ref_folder(hub, repo, f"refs/pr/{number}"), work)
        replace(hub.root / repo, work)
        pull.status = "merged"
    handler._json({})


_REPO = r"([^/]+/[^/]+)"
ROUTES: tuple[tuple[str, Callable[..., None]], ...] = (
    (rf"POST /api/models/{_REPO}/discussions", _open),
    (rf"GET /api/models/{_REPO}/discussions", _list),
    (rf"GET /api/models/{_REPO}/discussions/(\d+)", _details),
    (rf"POST /api/models/{_REPO}/discussions/(\d+)/status", _change),
    (rf"POST /api/models/{_REPO}/discussions/(\d+)/merge", _merge),
)
