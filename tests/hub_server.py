"""A Hub on loopback (its write half is hub_writing.py), for a directory of repositories: <root>/org/name/… and
<root>/datasets/org/name/…

    with HubServer(root) as hub:
        subprocess.run(command, env={**os.environ, **hub.environment(home)})

It proves what the client does, not what huggingface.co answers. A commit is the hash of its files, and only
the last one of each branch is kept. The environment reaches only processes that start with it: huggingface_hub reads
it when imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import hub_writing
from hub_writing import LFS_SUFFIXES, Fault, Store, User

MODEL_API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?"
)
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class HubServer:
    """Serves `root` until closed.

    Attributes:
        url: http://127.0.0.1:port.
        requests: 'METHOD path' of everything asked so far.
        gated: ids whose files are refused as those of a gated repository are.
        users: whose a token is; faults: what goes wrong next; store: what was written besides files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[str] = []
        self.gated: set[str] = set()
        self.users: dict[str, User] = {}
        self.faults: list[Fault] = []
        self.store, self.lock = Store(), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; the port refuses connections afterwards."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables that send huggingface_hub and its users here, with `home` for caches and tokens."""
        return {**hub_environment(self.url, home), **more}

    def folder(self, kind: str, repo: str) -> Path | None:
        """The directory of a repository ('models' or 'datasets'), None where there is none."""
        path = self.root / "datasets" / repo if kind == "datasets" else self.root / repo
        return path if path.is_dir() else None


def hub_environment(url: str, home: Path) -> dict[str, str]:
    """A clean environment for subprocesses: Hub at `url`, everything cached under `home`, online."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    return {
        **kept,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }


def commit_of(folder: Path) -> str:
    """40 hexadecimal digits that change with any file's name, size or content."""
    digest = hashlib.sha1()
    for path in _files(folder):
        digest.update(
            f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path.relative_to(folder).as_posix(), "size": len(content), "oid": oid}
    if path.suffix in LFS_SUFFIXES or len(content) > hub_writing.LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def _lfs(entry: dict[str, Any]) -> dict[str, Any] | None:
    """Of a file, as descriptions of a repository have it."""
    lfs = entry.get("lfs")
    return lfs and {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}


class _Handler(BaseHTTPRequestHandler):
    """One connection; what it may answer with lies in `hub`."""

    protocol_version = "HTTP/1.1"
    fault: Fault | None = None

    def __init__(self, hub: HubServer, *connection: Any) -> None:
        self.hub = hub
        super().__init__(*connection)  # which answers until the client leaves

    def log_message(self, *_: object) -> None:
        """The list of requests is the log."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.fault = fault = hub_writing.struck(self.hub, self.hub.requests[-1])
        hub_writing.pause(fault)
        self.body = hub_writing.read_body(self, fault.drop if fault else None)
        if fault is not None and fault.drop is not None:
            hub_writing.hang_up(self)
        elif fault is not None and fault.status:
            self._refuse(fault.status, "", fault.message, fault.retry_after)
        elif hub_writing.answer(self, path):
            return
        elif match := MODEL_API.fullmatch(urlsplit(self.path).path):  # refs/pr/1 is one part only as it was quoted
            self._describe(*(part and unquote(part) for part in match.groups()))
        elif match := RESOLVE.fullmatch(path):
            self._file("datasets" if match[1] else "models", *match.groups()[1:])
        else:
            self._refuse(404, "RepoNotFound", "Repository not found")

    def _found(self, kind: str, repo: str, revision: str | None) -> tuple[Path, str] | None:
        folder = self.hub.folder(kind, repo)
        hidden = repo in self.hub.store.private and hub_writing.user_of(self) is None
        if folder is None or hidden:
            self._refuse(404, "RepoNotFound", "Repository not found")
            return None
        others = self.hub.root / ".refs" / repo
        folders = [folder, *(sorted(others.iterdir()) if others.is_dir() else [])]
        for one in folders:
            commit = commit_of(one)
            name = "main" if one is folder else one.name.replace("~", "/")
            if revision in (name, commit) or (revision is None and one is folder):
                return one, commit
        self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _describe(
        self, kind: str, repo: str, what: str | None, revision: str | None, below: str | None
    ) -> None:
        if (found := self._found(kind, repo, revision)) is None:
            return
        folder, commit = found
        entries = [_entry(folder, path) for path in _files(folder)]
        if what == "paths-info":
            self._json([e for e in entries if e["path"] in _paths(self.body)])
        elif what == "tree":
            inside = [e for e in entries if e["path"].startswith(f"{below}/" if below else "")]
            known = {e["path"].rsplit("/", 1)[0] for e in entries if "/" in e["path"]}
            if below and not inside:
                self._refuse(404, "EntryNotFound", f"{below} does not exist")
                return
            self._json(
                inside + [{"type": "directory", "path": d, "oid": "0" * 40, "size": 0} for d in known]
            )
        else:
            siblings = [{"rfilename": e["path"], "size": e["size"], "blobId": e["oid"], "lfs": _lfs(e)}
                        for e in entries]  # fmt: skip
            private = repo in self.hub.store.private
            self._json({"id": repo, "modelId": repo, "sha": commit, "private": private, "gated": False,
                        "disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip

    def _file(self, kind: str, repo: str, revision: str, name: str) -> None:
        if (found := self._found(kind, repo, revision)) is None:
            return
        folder, commit = found
        path = folder / name
        if repo in self.hub.gated:
            self._refuse(403, "GatedRepo", "Access to this repository is restricted")
        elif not path.is_file():
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            entry = _entry(folder, path)
            etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            etag = self.fault.etag if self.fault is not None and self.fault.etag else etag
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if "lfs" in entry:
                headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(entry["size"])}
            self._send(path.read_bytes(), "application/octet-stream", headers)

    def _send(self, content: bytes, kind: str, headers: dict[str, str], status: int = 200) -> None:
        if self.fault is not None and self.fault.mute:
            hub_writing.hang_up(self)
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span and status == 200:
            first, last = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self.send_response(status)
        for key, value in {**headers, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if self.fault is None else hub_writing.spoilt(content, self.fault))
        if self.fault is not None and self.fault.cut is not None:
            hub_writing.hang_up(self)

    def _json(self, data: object) -> None:
        self._send(json.dumps(data).encode(), "application/json", {})

    def _refuse(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        headers |= {} if retry_after is None else {"Retry-After": str(retry_after)}
        self._send(json.dumps({"error": message}).encode(), "application/json", headers, status)


def _paths(body: bytes) -> list[str]:
    """The paths of a paths-info request, which is JSON or a form."""
    from urllib.parse import parse_qs

    try:
        return list(json.loads(body)["paths"])
    except ValueError:
        return parse_qs(body.decode()).get("paths", [])
