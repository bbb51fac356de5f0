"""The write half of the loopback Hub: whoami, create_repo, branches, preupload, LFS, commits, pull requests; faults.

    hub.users["hf_secret"] = User("me", role="write")
    hub.faults.append(Fault(r"PUT /lfs/.*", drop=1000))        # the next such request loses its connection

Refs other than main are folders under <root>/.refs; LFS objects lie in memory. A commit makes a copy of the folder and
puts it in the place of the old one, so readers see the old files or the new ones.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import hub_pulls
import yaml
from hub_pulls import Pull

if TYPE_CHECKING:
    from hub_server import HubServer, _Handler

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".png")
LARGE = 10_000_000
_RELATIONS = {"quantized", "finetune", "adapter", "merge"}
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass
class User:
    """Whose a token is. `role`: of the token, 'read' or 'write'."""

    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose 'METHOD path' matches.

    Attributes:
        status, message, retry_after: answered instead.
        drop: bytes of the body after which the connection is closed.
        mute: the work is done, and the connection closed instead of an answer.
        wait: seconds before anything else.
        lie: of a commit, files are stored with one byte changed; of a download, they are sent so.
        cut: bytes of a download after which the connection is closed. etag: what is said instead of the right one.
    """

    match: str
    times: int = 1
    status: int = 0
    message: str = "it is so"
    retry_after: int | None = None
    drop: int | None = None
    mute: bool = False
    wait: float = 0.0
    lie: bool = False
    cut: int | None = None
    etag: str = ""


@dataclass
class Store:
    """LFS objects by SHA-256, names of private repositories, pull requests by repository, messages of commits."""

    objects: dict[str, bytes] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    pulls: dict[str, list[Pull]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


def struck(hub: HubServer, request: str) -> Fault | None:
    """The fault that hits this request, one of its times used up."""
    with hub.lock:
        for fault in hub.faults:
            if fault.times > 0 and re.fullmatch(fault.match, request):
                fault.times -= 1
                return fault
    return None


def read_body(handler: _Handler, most: int | None = None) -> bytes:
    """The request's body, by its length or in chunks; at most so many bytes."""
    if "chunked" in (handler.headers.get("Transfer-Encoding") or ""):
        parts = []
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            parts.append(handler.rfile.read(size))
            handler.rfile.readline()
        handler.rfile.readline()
        return b"".join(parts)
    length = int(handler.headers.get("Content-Length") or 0)
    return handler.rfile.read(length if most is None else min(length, most))


def hang_up(handler: _Handler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def answer(handler: _Handler, path: str) -> bool:
    """Answer a request of the write half; False where it is none."""
    query = parse_qs(urlsplit(handler.path).query)
    for pattern, act in (*_ROUTES, *hub_pulls.ROUTES):
        if match := re.fullmatch(pattern, f"{handler.command} {path}"):
            act(handler, *match.groups(), **({"pull": "create_pr" in query} if act is _commit else {}))
            return True
    return False


def user_of(handler: _Handler) -> User | None:
    token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ")
    return handler.hub.users.get(token)


def _may(handler: _Handler, space: str) -> bool:
    """Whether the token may write there; answers where it may not."""
    user = user_of(handler)
    if user is None:
        handler._refuse(401, "", "Invalid username or password.")
        return False
    if user.role == "read" or space not in (user.name, *user.orgs):
        handler._refuse(403, "", f"You don't have the rights to create a model under the namespace {space}")
        return False
    return True


def _whoami(handler: _Handler) -> None:
    user = user_of(handler)
    if user is None:
        handler._refuse(401, "", "Invalid credentials in Authorization header")
        return
    handler._json({"type": "user", "name": user.name, "orgs": [{"name": one} for one in user.orgs],
                   "auth": {"type": "access_token", "accessToken": {"role": user.role}}})  # fmt: skip


def _create(handler: _Handler) -> None:
    asked, user, hub = json.loads(handler.body), user_of(handler), handler.hub
    space = asked.get("organization") or (user.name if user else "")
    if not _may(handler, space):
        return
    repo = f"{space}/{asked['name']}"
    if (hub.root / repo).exists():
        handler._send(json.dumps({"error": "You already created this model repo", "url": f"{hub.url}/{repo}"}).encode(),
                      "application/json", {}, 409)  # fmt: skip
        return
    (hub.root / repo).mkdir(parents=True)
    (hub.root / repo / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    if asked.get("private") or asked.get("visibility") == "private":
        hub.store.private.add(repo)
    handler._json({"url": f"{hub.url}/{repo}", "name": repo, "id": "1"})


def _branch(handler: _Handler, repo: str, name: str) -> None:
    if not _may(handler, repo.split("/")[0]):
        return
    target = ref_folder(handler.hub, repo, name)
    if target.exists():
        handler._refuse(409, "", f"Reference already exists: {name}")
        return
    shutil.copytree(handler.hub.root / repo, target)
    handler._json({})


def _validate(handler: _Handler) -> None:
    """The part of the Hub's rules for metadata that is written down: types, relations, the form of model-index."""
    errors = [{"message": text} for text in card_errors(json.loads(handler.body)["content"])]
    body = json.dumps({"errors": errors, "warnings": []}).encode()
    handler._send(body, "application/json", {}, 400 if errors else 200)


def card_errors(content: str) -> list[str]:
    """What is wrong with the YAML at the top of a card."""
    found = _FRONT.match(content)
    if found is None:
        return ["no metadata"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    wrong = [f'"{key}" must be a string' for key in ("license", "library_name", "pipeline_tag", "license_name")
             if key in data and not isinstance(data[key], str)]  # fmt: skip
    for key in ("tags", "language", "base_model"):
        value = data.get(key, [])
        if not all(isinstance(one, str) and one for one in (value if isinstance(value, list) else [value])):
            wrong.append(f'"{key}" must be a string or a list of them')
    if data.get("base_model_relation", "quantized") not in _RELATIONS:
        wrong.append('"base_model_relation" must be one of ' + ", ".join(sorted(_RELATIONS)))
    for model in data.get("model-index", []):
        for result in model["results"] if "name" in model else [{}]:
            wrong += _result_errors(result)
    return wrong


def _result_errors(result: dict[str, Any]) -> list[str]:
    parts: dict[str, dict[str, Any]] = {"task": result.get("task", {}), "dataset": result.get("dataset", {})}
    wrong = [f'"model-index" results: {part}.type is required' for part, said in parts.items() if not said.get("type")]
    if not parts["dataset"].get("name"):
        wrong.append('"model-index" results: dataset.name is required')
    for metric in result.get("metrics") or [{}]:
        if not isinstance(metric.get("type"), str) or "value" not in metric:
            wrong.append('"model-index" results: metrics need type and value')
    return wrong


def _preupload(handler: _Handler, repo: str, revision: str) -> None:
    if not _may(handler, repo.split("/")[0]):
        return
    files = []
    for asked in json.loads(handler.body)["files"]:
        large = asked["path"].endswith(LFS_SUFFIXES) or asked["size"] > LARGE
        files.append({"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
    handler._json({"files": files})


def _batch(handler: _Handler, repo: str) -> None:
    if not _may(handler, repo.split("/")[0]):
        return
    objects = []
    for one in json.loads(handler.body)["objects"]:
        entry = {"oid": one["oid"], "size": one["size"]}
        if one["oid"] not in handler.hub.store.objects:
            href = f"{handler.hub.url}/lfs/{one['oid']}"
            entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        objects.append(entry)
    handler._json({"transfer": "basic", "objects": objects})


def _put(handler: _Handler, oid: str) -> None:
    if hashlib.sha256(handler.body).hexdigest() != oid:
        handler._refuse(400, "", "The content is not what its name says")
        return
    handler.hub.store.objects[oid] = handler.body
    handler._send(b"", "text/plain", {"ETag": f'"{oid}"'})


def _verify(handler: _Handler, oid: str) -> None:
    known = oid in handler.hub.store.objects
    handler._json({}) if known else handler._refuse(404, "EntryNotFound", "no such object")


def _commit(handler: _Handler, repo: str, revision: str, pull: bool) -> None:
    from hub_server import commit_of

    hub = handler.hub
    if not _may(handler, repo.split("/")[0]):
        return
    source = ref_folder(hub, repo, revision)
    if not source.is_dir():
        handler._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return
    lines = [json.loads(line) for line in handler.body.splitlines()]
    with hub.lock:
        parent = lines[0]["value"].get("parentCommit")
        if parent and parent != commit_of(source):
            handler._refuse(412, "", "A commit has happened since. Please refresh and try again.")
            return
        work = hub.root / ".work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(source, work)
        for line in lines[1:]:
            _apply(handler, work, line["key"], line["value"])
        target, number = source, 0
        if pull:
            number = hub_pulls.opened(hub, repo, lines[0]["value"]["summary"], "open", handler)
            target = ref_folder(hub, repo, f"refs/pr/{number}")
        hub_pulls.replace(target, work)
        hub.store.messages.append(lines[0]["value"]["summary"])
    commit = commit_of(target)
    said = {"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{repo}/commit/{commit}"}
    handler._json(said | ({"pullRequestUrl": f"{hub.url}/{repo}/discussions/{number}"} if pull else {}))


def _apply(handler: _Handler, work: Path, key: str, value: dict[str, Any]) -> None:
    path = work / value["path"]
    if key == "deletedFile":
        path.unlink()
        return
    content = handler.hub.store.objects[value["oid"]] if key == "lfsFile" else base64.b64decode(value["content"])
    if handler.fault is not None and handler.fault.lie and content:
        content = bytes([content[0] ^ 1]) + content[1:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def ref_folder(hub: HubServer, repo: str, revision: str) -> Path:
    """Where the files of a branch or pull request lie."""
    return hub.root / repo if revision == "main" else hub.root / ".refs" / repo / revision.replace("/", "~")


def spoilt(content: bytes, fault: Fault) -> bytes:
    """What is sent of an answer."""
    if fault.lie and content:
        content = content[:-1] + bytes([content[-1] ^ 1])
    return content if fault.cut is None else content[: fault.cut]


def pause(fault: Fault | None) -> None:
    if fault is not None and fault.wait:
        time.sleep(fault.wait)


_REPO = r"([^/]+/[^/]+)"
_ROUTES: tuple[tuple[str, Callable[..., None]], ...] = (
    (r"GET /api/whoami-v2", _whoami),
    (r"POST /api/repos/create", _create),
    (r"POST /api/validate-yaml", _validate),
    (rf"POST /api/models/{_REPO}/branch/(.+)", _branch),
    (rf"POST /api/models/{_REPO}/preupload/(.+)", _preupload),
    (rf"POST /api/models/{_REPO}/commit/(.+)", _commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _batch),
    (r"PUT /lfs/([0-9a-f]{64})", _put),
    (r"POST /lfs/([0-9a-f]{64})/verify", _verify),
)
