"""Pushing to a Hub on loopback by the real client: what arrives, what is refused, and what every fault ends in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_artefact import (
    COMMIT,
    SHARDS,
    Heard,
    contents,
    make_artefact,
    quick_hub,
    report_of,
    sent_weights,
    write,
)
from hub_inside import TOKEN
from hub_server import HubServer
from hub_writing import Fault, User, card_errors

from llmcomp import uploading
from llmcomp.digests import file_sha256
from llmcomp.errors import BadCheckpoint, LlmcompError, RunError, UserError
from llmcomp.hub import resolve
from llmcomp.network import Unreachable
from llmcomp.publishing import about_licence, push, ready
from llmcomp.report.schema import Origin, Verification


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    return make_artefact(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with quick_hub(tmp_path, monkeypatch) as running:
        yield running


# --- what arrives ---


def test_all_of_it_arrives_in_one_commit(hub: HubServer, artefact: Path) -> None:
    before = contents(artefact)
    result = push(artefact, "me/mine", message="first")
    there = contents(hub.root / "me/mine")
    for name, digest in report_of(artefact).files.items():
        assert there[name] == digest
    assert {"README.md", "llmcomp_report.json", "llmcomp_report.html", "llmcomp_recipe.yaml"} <= set(there)
    assert set(result.sent) == set(there) - {".gitattributes"} and result.files == len(result.sent)
    assert sum(request.startswith("POST /api/models/me/mine/commit") for request in hub.requests) == 1
    assert hub.store.messages == ["first"]
    assert contents(artefact) == before, "the local checkpoint is only read"


def test_the_card_is_valid_and_pins_its_source(hub: HubServer, artefact: Path) -> None:
    push(artefact, "me/mine")
    text = (hub.root / "me/mine/README.md").read_text()
    assert card_errors(text) == []
    for words in ("base_model: org/base", "base_model_relation: quantized", "license: apache-2.0", COMMIT):
        assert words in text
    assert 'from_pretrained("me/mine")' in text


def test_no_directory_of_this_machine_is_published(hub: HubServer, artefact: Path, tmp_path: Path) -> None:
    push(artefact, "me/mine")
    for path in (hub.root / "me/mine").iterdir():
        if path.suffix in (".json", ".html", ".md"):
            assert "/home/somebody" not in path.read_text() and str(tmp_path) not in path.read_text(), path


def test_again_sends_nothing(hub: HubServer, artefact: Path) -> None:
    first = push(artefact, "me/mine")
    count = sent_weights(hub)
    again = push(artefact, "me/mine")
    assert again.sent == () and again.commit == first.commit and sent_weights(hub) == count


def test_fewer_shards_replace_more(hub: HubServer, artefact: Path) -> None:
    push(artefact, "me/mine")
    (hub.root / "me/mine/notes.txt").write_text("the owner's")
    (artefact / SHARDS[-1]).unlink()
    write(artefact, report_of(artefact))
    result = push(artefact, "me/mine")
    there = contents(hub.root / "me/mine")
    assert SHARDS[-1] not in there and SHARDS[0] in there and "notes.txt" in there
    assert set(result.sent) <= {"llmcomp_report.json", "llmcomp_report.html", "README.md"}


def test_a_card_of_ones_own_goes_instead(hub: HubServer, artefact: Path) -> None:
    (artefact / "README.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    push(artefact, "me/mine")
    assert (hub.root / "me/mine/README.md").read_text().endswith("Mine.\n")
    (artefact / "README.md").write_text("no metadata")
    with pytest.raises(UserError, match="has no metadata at its top"):
        push(artefact, "me/mine")


def test_what_was_not_verified_stays_here(hub: HubServer, artefact: Path) -> None:
    (artefact / "stray.safetensors").write_bytes(b"not of this run")
    push(artefact, "me/mine")
    assert "stray.safetensors" not in contents(hub.root / "me/mine")


def test_private_is_seen_by_its_owner_only(hub: HubServer, artefact: Path) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    push(artefact, "team/mine", private=True)
    assert HfApi(endpoint=hub.url, token=TOKEN).model_info("team/mine").private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token=False).model_info("team/mine")


def test_private_does_not_go_where_all_can_see(hub: HubServer, artefact: Path) -> None:
    push(artefact, "me/mine")
    with pytest.raises(UserError, match="is public already"):
        push(artefact, "me/mine", private=True)


def test_a_branch_leaves_main_alone(hub: HubServer, artefact: Path) -> None:
    result = push(artefact, "me/mine", revision="w4")
    assert set(contents(hub.root / "me/mine")) == {".gitattributes"}
    assert SHARDS[0] in contents(hub.root / ".refs/me/mine/w4") and result.files == len(result.sent)


def test_a_pull_request_leaves_main_alone(hub: HubServer, artefact: Path) -> None:
    result = push(artefact, "me/mine", create_pr=True)
    assert result.url.endswith("/me/mine/discussions/1")
    assert set(contents(hub.root / "me/mine")) == {".gitattributes"}
    with pytest.raises(UserError, match="leave out --revision"):
        push(artefact, "me/mine", create_pr=True, revision="w4")


# --- what is refused before anything is sent ---


@pytest.mark.parametrize("change", ["unverified", "failed", "no digests", "other bytes", "a file gone", "outside"])
def test_only_what_was_verified_is_pushed(hub: HubServer, artefact: Path, change: str) -> None:
    report = report_of(artefact)
    if change == "unverified":
        report.verification = None
    elif change == "failed":
        report.verification = Verification(False, [], None, 0)
    elif change == "no digests":
        report.files = {}
    elif change == "outside":
        report.files = {"../secret": "0" * 64}
    write(artefact, report)
    if change == "other bytes":
        (artefact / SHARDS[1]).write_bytes(b"\x02" + b"\x01" * 39_999)
    elif change == "a file gone":
        (artefact / "tokenizer.json").unlink()
    with pytest.raises(BadCheckpoint) as caught:
        push(artefact, "me/mine")
    words = {"other bytes": f"{SHARDS[1]} has other bytes", "a file gone": "tokenizer.json is missing",
             "outside": "names ../secret", "no digests": "does not say which files"}  # fmt: skip
    assert words.get(change, "was not verified") in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["mine", "me/", "/mine", "a/b/c", "me/mi ne", "me/..", "me/a--b", "me/x.git", ""])
def test_names_that_are_none(hub: HubServer, artefact: Path, name: str) -> None:
    with pytest.raises(UserError, match="is no name on the Hub; expected user/name"):
        push(artefact, name)
    assert hub.requests == []


def test_somebody_elses_repository(hub: HubServer, artefact: Path) -> None:
    (hub.root / "me/mine").mkdir(parents=True)
    (hub.root / "me/mine/pytorch_model.bin").write_bytes(b"other")
    with pytest.raises(UserError, match="me/mine is taken: 1 files are there that no llmcomp has written"):
        push(artefact, "me/mine")
    with pytest.raises(UserError, match="is taken"):
        ready("me/mine")
    assert set(contents(hub.root / "me/mine")) == {"pytorch_model.bin"}


def test_no_token(hub: HubServer, artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="There is no token for the Hub; run `hf auth login`"):
        ready("me/mine")


@pytest.mark.parametrize(
    ("user", "words"),
    [
        (None, "does not accept the token"),
        (User("me", role="read"), "The token of me may only read"),
        (User("you", ("others",)), "who has no rights to write to me; push to you or others"),
    ],
)
def test_tokens_that_do_not_do(hub: HubServer, artefact: Path, user: User | None, words: str) -> None:
    hub.users = {} if user is None else {TOKEN: user}
    with pytest.raises(UserError) as caught:
        ready("me/mine")
    assert words in str(caught.value) and TOKEN not in str(caught.value)


def test_a_token_that_cannot_be_sent(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied with what is around it; for a push, and for a download."""
    monkeypatch.setenv("HF_TOKEN", "„hf_secret“")
    for call in (lambda: ready("me/mine"), lambda: resolve("me/mine")):
        with pytest.raises(UserError, match="has characters that no token has") as caught:
            call()
        assert "hf_secret" not in str(caught.value)
    assert hub.requests == []


def test_no_network(artefact: Path, hub: HubServer) -> None:
    hub.close()
    with pytest.raises(RunError, match=r"The Hub cannot be reached \(.*refused\)\. .*mine is whole and as it was; "):
        push(artefact, "me/mine")


def test_a_network_that_comes_back_is_waited_for(
    hub: HubServer, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After hours of work; before them (`ready`) the user is still there."""
    real, failed = uploading.ask, []

    def asked(url: str) -> object:
        if len(failed) % 3 < 2:
            failed.append(url)
            raise Unreachable("no connection within 1 s")
        return real(url)

    monkeypatch.setattr(uploading, "ask", asked)
    with pytest.raises(RunError, match="cannot be reached"):
        ready("me/mine")
    assert len(failed) == 1
    push(artefact, "me/mine")
    assert len(failed) == 2 and SHARDS[0] in contents(hub.root / "me/mine")


def test_offline_mode_is_not_waited_for(hub: HubServer, artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    heard = Heard()
    with pytest.raises(RunError, match=r"cannot be reached \(HF_HUB_OFFLINE is set\)"):
        push(artefact, "me/mine", progress=heard)
    assert heard.notes == []


def test_a_licence_that_forbids_derivatives_warns(hub: HubServer, artefact: Path) -> None:
    report = report_of(artefact)
    report.origin = Origin("org/base", COMMIT, "cc-by-nc-nd-4.0")
    write(artefact, report)
    heard = Heard()
    push(artefact, "me/mine", progress=heard)
    assert heard.notes[:2] == about_licence(report)
    assert "Licence of the source, org/base: cc-by-nc-nd-4.0." in heard.notes
    assert any("forbids sharing derivatives" in note for note in heard.notes)
    assert "forbids sharing derivatives" in (hub.root / "me/mine/README.md").read_text()


# --- faults ---

_PLACES = {
    "whoami": r"GET /api/whoami-v2", "info": r"GET /api/models/me/mine", "create": r"POST /api/repos/create",
    "card": r"POST /api/validate-yaml", "preupload": r".*/preupload/main", "batch": r".*/objects/batch",
    "weights": r"PUT /lfs/.*", "verify": r"POST /lfs/.*/verify", "commit": r"POST .*/commit/main",
    "tree": r"GET .*/tree/.*",
}  # fmt: skip


@pytest.mark.parametrize("place", _PLACES)
@pytest.mark.parametrize("fault", [{"status": 429, "retry_after": 3}, {"status": 500, "times": 2}], ids=["429", "500"])
def test_what_passes_is_waited_for(hub: HubServer, artefact: Path, place: str, fault: dict[str, int]) -> None:
    hub.faults.append(Fault(_PLACES[place], **fault))
    result = push(artefact, "me/mine")
    assert hub.faults[0].times == 0, "it never struck"
    assert contents(hub.root / "me/mine")[SHARDS[3]] == report_of(artefact).files[SHARDS[3]]
    assert result.files == len(result.sent)


@pytest.mark.parametrize("place", ["create", "preupload", "weights", "commit"])
def test_a_connection_that_drops_halfway(hub: HubServer, artefact: Path, place: str) -> None:
    hub.faults.append(Fault(_PLACES[place], drop=10, times=2))
    push(artefact, "me/mine")
    assert hub.faults[0].times == 0
    assert contents(hub.root / "me/mine")[SHARDS[0]] == report_of(artefact).files[SHARDS[0]]


def test_a_commit_whose_answer_is_lost_is_made_once(hub: HubServer, artefact: Path) -> None:
    hub.faults.append(Fault(_PLACES["commit"], mute=True))
    result = push(artefact, "me/mine")
    assert len(hub.store.messages) == 1 and result.files == len(result.sent)


def test_a_slow_server_is_waited_for(hub: HubServer, artefact: Path) -> None:
    hub.faults.append(Fault(_PLACES["weights"], wait=0.3, times=6))
    push(artefact, "me/mine")
    assert SHARDS[0] in contents(hub.root / "me/mine")


@pytest.mark.parametrize(
    ("place", "status", "said", "kind", "words"),
    [
        ("commit", 401, "Invalid username or password.", UserError, "does not accept the token"),
        ("create", 403, "You don't have the rights", UserError, "The token has no right to write to me"),
        ("batch", 403, "Private repository storage limit reached", UserError, "has no room for it"),
        ("batch", 402, "Payment required", UserError, "has no room for it"),
        ("commit", 409, "conflict", RunError, "was changed by somebody else meanwhile"),
        ("commit", 412, "A commit has happened since.", RunError, "was changed by somebody else meanwhile"),
        ("weights", 400, "broken", RunError, "broke off while uploading"),
        ("commit", 500, f"secret {TOKEN} inside", RunError, "broke off while making the commit"),
    ],
)
def test_what_does_not_pass_is_one_sentence(
    hub: HubServer, artefact: Path, place: str, status: int, said: str, kind: type[LlmcompError], words: str
) -> None:
    before = contents(artefact)
    hub.faults.append(Fault(_PLACES[place], status=status, message=said, times=1000))
    heard = Heard()
    with pytest.raises(kind) as caught:
        push(artefact, "me/mine", progress=heard)
    sentence = str(caught.value)
    assert words in sentence and "\n" not in sentence
    assert sentence.endswith(f"{artefact} is whole and as it was; `llmcomp push {artefact} me/mine` resumes.")
    assert TOKEN not in sentence + " ".join(heard.notes)
    assert not set(contents(hub.root / "me/mine")) - {".gitattributes"}, "half a model is visible"
    assert contents(artefact) == before


def test_what_broke_off_is_resumed(hub: HubServer, artefact: Path) -> None:
    """Four shards arrive, then the line is cut for good; the next push sends the other two."""
    last = file_sha256(artefact / SHARDS[4]), file_sha256(artefact / SHARDS[5])
    cut = Fault(rf"PUT /lfs/({'|'.join(last)})", drop=100, times=10_000)
    hub.faults.append(cut)
    with pytest.raises(RunError, match="broke off while uploading"):
        push(artefact, "me/mine")
    assert {file_sha256(artefact / name) for name in SHARDS[:4]} <= set(hub.store.objects)
    assert not set(contents(hub.root / "me/mine")) - {".gitattributes"}
    cut.times, count = 0, sent_weights(hub)
    push(artefact, "me/mine")
    assert sent_weights(hub) - count == 2 + len(list((hub.root / "me/mine/llmcomp_plots").glob("*.png")))
    assert contents(hub.root / "me/mine")[SHARDS[5]] == last[1]


def test_a_hub_that_holds_something_else_is_not_believed(hub: HubServer, artefact: Path) -> None:
    hub.faults.append(Fault(_PLACES["commit"], lie=True))
    with pytest.raises(RunError, match="is not what was sent; look at the repository"):
        push(artefact, "me/mine")


def test_a_card_that_the_hub_does_not_accept(hub: HubServer, artefact: Path) -> None:
    (artefact / "README.md").write_text("---\nbase_model_relation: cousin\n---\n")
    with pytest.raises(UserError, match=r"The Hub does not accept the card: .* must be one of"):
        push(artefact, "me/mine")


def test_the_token_is_stored_nowhere(hub: HubServer, artefact: Path, tmp_path: Path) -> None:
    push(artefact, "me/mine")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
    assert json.loads((artefact / "llmcomp_report.json").read_text())["files"]


def test_a_checkpoint_may_lie_where_nothing_can_be_written(hub: HubServer, artefact: Path, tmp_path: Path) -> None:
    sealed = Path(shutil.copytree(artefact, tmp_path / "sealed"))
    sealed.chmod(0o555)
    try:
        assert push(sealed, "me/mine").files
    finally:
        sealed.chmod(0o755)
