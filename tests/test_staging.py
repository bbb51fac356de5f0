"""What is too large for one commit: parts on a pull request, merged last; faults on the way, and what main shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_artefact import SHARDS, Heard, contents, make_artefact, quick_hub, report_of, sent_weights, write
from hub_server import HubServer
from hub_writing import Fault

from llmcomp import staging
from llmcomp.digests import file_sha256
from llmcomp.errors import LlmcompError, RunError, UserError
from llmcomp.publishing import push

BARE = {".gitattributes"}
_PLACES = {
    "list": r"GET .*/discussions", "open": r"POST .*/discussions", "details": r"GET .*/discussions/\d+",
    "preupload": r".*/preupload/refs/pr/1", "batch": r".*/objects/batch", "weights": r"PUT /lfs/.*",
    "commit": r"POST .*/commit/refs/pr/1", "publish": r"POST .*/discussions/\d+/status", "merge": r"POST .*/merge",
    "tree": r"GET .*/tree/.*", "info": r"GET /api/models/me/mine/revision/refs/pr/1",
}  # fmt: skip


@pytest.fixture
def artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirteen files, of which a commit holds two: one part of bytes, and the rest by count."""
    monkeypatch.setattr(staging, "MOST_FILES", 2)
    return make_artefact(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Remembers what main held whenever anything was asked."""
    with quick_hub(tmp_path, monkeypatch) as running:
        yield running


def commits(hub: HubServer) -> int:
    return sum(re.fullmatch(r"POST .*/commit/refs/pr/\d+", request) is not None for request in hub.requests)


def test_parts_go_to_a_pull_request_that_is_merged(hub: HubServer, artefact: Path) -> None:
    before, heard = contents(artefact), Heard()
    result = push(artefact, "me/mine", message="first", progress=heard)
    there = contents(hub.root / "me/mine")
    for name, digest in report_of(artefact).files.items():
        assert there[name] == digest
    assert set(result.sent) == set(there) - BARE and commits(hub) == (len(result.sent) + 1) // 2
    assert not any(re.fullmatch(r"POST .*/commit/main", request) for request in hub.requests)
    assert sum(request.endswith("/merge") for request in hub.requests) == 1
    pull = hub.store.pulls["me/mine"][0]
    assert pull.status == "merged" and pull.title.startswith("first [llmcomp ")
    assert any("goes to pull request 1 of me/mine first" in note for note in heard.notes)
    assert contents(artefact) == before


def test_bytes_make_parts_as_well(hub: HubServer, artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MOST_FILES", 50)
    monkeypatch.setattr(staging, "MOST_BYTES", 100_000)  # two shards, of six
    push(artefact, "me/mine")
    assert commits(hub) == 3 and SHARDS[5] in contents(hub.root / "me/mine")


def test_what_fits_is_one_commit(hub: HubServer, artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MOST_FILES", 50)
    push(artefact, "me/mine")
    assert commits(hub) == 0 and not hub.store.pulls and len(hub.store.messages) == 1


def test_again_sends_nothing(hub: HubServer, artefact: Path) -> None:
    first = push(artefact, "me/mine")
    asked = sent_weights(hub), commits(hub)
    again = push(artefact, "me/mine")
    assert again.sent == () and again.commit == first.commit and (sent_weights(hub), commits(hub)) == asked


def test_fewer_shards_replace_more(hub: HubServer, artefact: Path) -> None:
    push(artefact, "me/mine")
    for name in SHARDS[:5]:
        (artefact / name).write_bytes((artefact / name).read_bytes()[::-1] + b"new")
    (artefact / SHARDS[5]).unlink()
    write(artefact, report_of(artefact))
    push(artefact, "me/mine")
    there = contents(hub.root / "me/mine")
    assert SHARDS[5] not in there and there[SHARDS[0]] == file_sha256(artefact / SHARDS[0])
    assert [pull.status for pull in hub.store.pulls["me/mine"]] == ["merged", "merged"]


def test_a_pull_request_that_was_asked_for_is_left_open(hub: HubServer, artefact: Path) -> None:
    result = push(artefact, "me/mine", create_pr=True)
    assert result.url == f"{hub.url}/me/mine/discussions/1" and hub.store.pulls["me/mine"][0].status == "open"
    assert set(contents(hub.root / "me/mine")) == BARE
    assert contents(hub.root / ".refs/me/mine/refs~pr~1")[SHARDS[5]] == report_of(artefact).files[SHARDS[5]]


def test_a_branch_gets_one_commit(hub: HubServer, artefact: Path) -> None:
    push(artefact, "me/mine", revision="w4")
    assert not hub.store.pulls and SHARDS[5] in contents(hub.root / ".refs/me/mine/w4")


# --- faults ---


@pytest.mark.parametrize("place", _PLACES)
def test_what_passes_is_waited_for(hub: HubServer, artefact: Path, place: str) -> None:
    hub.faults += [Fault(_PLACES[place], status=429, retry_after=3), Fault(_PLACES[place], status=500, times=2)]
    push(artefact, "me/mine")
    assert [fault.times for fault in hub.faults] == [0, 0], "it never struck"
    assert contents(hub.root / "me/mine")[SHARDS[3]] == report_of(artefact).files[SHARDS[3]]
    assert len(hub.store.pulls["me/mine"]) == 1


@pytest.mark.parametrize("place", ["weights", "commit", "merge"])
def test_a_connection_that_drops_halfway(hub: HubServer, artefact: Path, place: str) -> None:
    hub.faults.append(Fault(_PLACES[place], drop=10, times=2))
    push(artefact, "me/mine")
    assert hub.faults[0].times == 0
    assert contents(hub.root / "me/mine")[SHARDS[0]] == report_of(artefact).files[SHARDS[0]]


@pytest.mark.parametrize("place", ["open", "commit", "publish", "merge"])
def test_what_was_done_though_its_answer_is_lost_is_done_once(hub: HubServer, artefact: Path, place: str) -> None:
    hub.faults.append(Fault(_PLACES[place], mute=True))
    result = push(artefact, "me/mine")
    assert [pull.status for pull in hub.store.pulls["me/mine"]] == ["merged"]
    assert len(hub.store.messages) == (len(result.sent) + 1) // 2, "a commit was made twice"


@pytest.mark.parametrize("number", [0, 3, 5])
def test_cut_at_any_shard_main_shows_nothing_and_the_rest_is_sent_later(
    hub: HubServer, artefact: Path, number: int
) -> None:
    """The line is cut for good at this shard; the next push sends it and what follows, on the same pull request."""
    before, cut = contents(artefact), Fault(rf"PUT /lfs/{file_sha256(artefact / SHARDS[number])}", 10_000, drop=100)
    hub.faults.append(cut)
    with pytest.raises(RunError, match=rf"broke off while uploading .*`llmcomp push {artefact} me/mine` resumes\.$"):
        push(artefact, "me/mine")
    assert set(contents(hub.root / "me/mine")) == BARE and contents(artefact) == before
    assert set(SHARDS[: number // 2 * 2]) <= set(contents(hub.root / ".refs/me/mine/refs~pr~1"))
    cut.times, sent, made = 0, sent_weights(hub), commits(hub)
    hub.store.objects.clear()  # what no commit names is forgotten
    result = push(artefact, "me/mine")
    plots = len(list((hub.root / "me/mine/llmcomp_plots").glob("*.png")))
    assert sent_weights(hub) - sent == 6 - number // 2 * 2 + plots
    assert commits(hub) - made == (len(result.sent) + 1) // 2 - 1 - number // 2  # config.json is in the first
    assert len(hub.store.pulls["me/mine"]) == 1 and set(contents(hub.root / "me/mine")) - BARE == set(result.sent)


@pytest.mark.parametrize(
    ("place", "status", "kind", "words"),
    [
        ("open", 403, UserError, "The token has no right to write to me"),
        ("commit", 409, RunError, "was changed by somebody else meanwhile"),
        ("batch", 402, UserError, "has no room for it"),
        ("merge", 409, RunError, "was changed by somebody else meanwhile"),
        ("merge", 500, RunError, "broke off while merging"),
        ("publish", 401, UserError, "does not accept the token"),
    ],
)
def test_what_does_not_pass_leaves_main_alone_and_is_resumed(
    hub: HubServer, artefact: Path, place: str, status: int, kind: type[LlmcompError], words: str
) -> None:
    fault = Fault(_PLACES[place], 1000, status=status)
    hub.faults.append(fault)
    with pytest.raises(kind) as caught:
        push(artefact, "me/mine")
    sentence = str(caught.value)
    assert words in sentence and "\n" not in sentence and sentence.endswith(" resumes.")
    assert set(contents(hub.root / "me/mine")) == BARE
    fault.times = 0
    push(artefact, "me/mine")
    assert SHARDS[5] in contents(hub.root / "me/mine") and len(hub.store.pulls["me/mine"]) == 1


def test_somebody_elses_pull_request_is_not_taken(hub: HubServer, artefact: Path) -> None:
    fault = Fault(_PLACES["merge"], 1000, status=409)
    hub.faults.append(fault)
    with pytest.raises(RunError):
        push(artefact, "me/mine")
    hub.store.pulls["me/mine"][0].author, fault.times = "you", 0
    push(artefact, "me/mine")
    assert [pull.status for pull in hub.store.pulls["me/mine"]] == ["open", "merged"]


def test_main_that_moved_is_not_merged_onto(hub: HubServer, artefact: Path) -> None:
    """Somebody commits between the last part and the merge; the next push begins anew on what is there now."""
    fault = Fault(_PLACES["publish"], 1000, status=401)
    hub.faults.append(fault)
    with pytest.raises(UserError):
        push(artefact, "me/mine")
    fault.times = 0
    real = staging._publish

    def late(remote: object, number: int) -> None:
        (hub.root / "me/mine/notes.txt").write_text("the owner's")
        real(remote, number)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="was changed by somebody else meanwhile"):
        patch.setattr(staging, "_publish", late)
        push(artefact, "me/mine")
    assert set(contents(hub.root / "me/mine")) == BARE | {"notes.txt"}
    (hub.root / "me/mine/notes.txt").rename(hub.root / "me/mine/README.md")
    push(artefact, "me/mine")
    assert [pull.status for pull in hub.store.pulls["me/mine"]] == ["closed", "merged"], "one is left behind"
    assert SHARDS[5] in contents(hub.root / "me/mine")


def test_a_draft_of_other_files_is_left_alone(hub: HubServer, artefact: Path) -> None:
    fault = Fault(_PLACES["publish"], 1000, status=401)
    hub.faults.append(fault)
    with pytest.raises(UserError):
        push(artefact, "me/mine")
    fault.times = 0
    (artefact / SHARDS[0]).write_bytes(b"another checkpoint")
    write(artefact, report_of(artefact))
    push(artefact, "me/mine")
    assert [pull.status for pull in hub.store.pulls["me/mine"]] == ["draft", "merged"]


def test_a_part_that_arrived_as_something_else_is_not_merged(hub: HubServer, artefact: Path) -> None:
    hub.faults.append(Fault(_PLACES["commit"], lie=True))
    with pytest.raises(RunError, match="is not what was sent; look at the repository"):
        push(artefact, "me/mine")
    assert set(contents(hub.root / "me/mine")) == BARE
