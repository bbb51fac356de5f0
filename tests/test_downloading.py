"""Downloads from a Hub on loopback that are cut, slow, or other than the Hub or the report says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_artefact import Heard, contents, report_of, write
from hub_inside import inside
from hub_server import HubServer
from hub_writing import Fault

from llmcomp import downloading
from llmcomp.digests import file_sha256
from llmcomp.errors import BadCheckpoint, RunError
from llmcomp.hub import resolve

REPO = "me/mine"
WEIGHTS = "model.safetensors"
_GET = rf"GET /{REPO}/resolve/.*/model\.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """With a checkpoint of llmcomp on it, and an empty cache here."""
    import huggingface_hub.constants as constants
    import huggingface_hub.utils._http as client

    folder = tmp_path / "hub" / REPO
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 1000)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    write(folder, report_of(folder))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    with inside(tmp_path / "hub", monkeypatch) as running:
        yield running


def right(path: Path, hub: HubServer) -> bool:
    return all(file_sha256(path / name) == digest for name, digest in contents(hub.root / REPO).items())


def gets(hub: HubServer) -> int:
    return sum(request.startswith(f"GET /{REPO}/resolve/") and WEIGHTS in request for request in hub.requests)


def test_what_arrives_is_what_is_there(hub: HubServer) -> None:
    heard = Heard()
    assert right(resolve(REPO, progress=heard).path, hub)
    assert gets(hub) == 1 and len(heard.notes) == 1
    assert right(resolve(REPO).path, hub) and gets(hub) == 1, "the cache was enough"


def test_other_bytes_are_fetched_again(hub: HubServer) -> None:
    """The right length, and one bit wrong: huggingface_hub does not see that."""
    hub.faults.append(Fault(_GET, lie=True))
    heard = Heard()
    assert right(resolve(REPO, progress=heard).path, hub) and gets(hub) == 2
    assert any("arrived with other bytes than the Hub says; it is downloaded again" in note for note in heard.notes)


def test_other_bytes_twice_are_refused_and_not_kept(hub: HubServer, tmp_path: Path) -> None:
    fault = Fault(_GET, 1000, lie=True)
    hub.faults.append(fault)
    with pytest.raises(RunError, match="arrived twice with other bytes than the Hub says, and was thrown away"):
        resolve(REPO)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    fault.times = 0
    assert right(resolve(REPO).path, hub)


def test_other_bytes_of_a_small_file(hub: HubServer) -> None:
    hub.faults.append(Fault(rf"GET /{REPO}/resolve/.*/config\.json", lie=True))
    assert right(resolve(REPO).path, hub)


@pytest.mark.parametrize("bytes_are_right", [True, False])
def test_a_wrong_etag(hub: HubServer, bytes_are_right: bool) -> None:
    """It names the blob in the cache and nothing more: bytes are believed by their hash."""
    hub.faults += [Fault(rf"HEAD /{REPO}/resolve/.*/model\.safetensors", 2, etag="f" * 64)]
    hub.faults += [] if bytes_are_right else [Fault(_GET, lie=True)]
    assert right(resolve(REPO).path, hub) and gets(hub) == (1 if bytes_are_right else 2)


def test_a_download_that_is_cut_goes_on_where_it_was(hub: HubServer) -> None:
    hub.faults.append(Fault(_GET, 2, cut=100_000))
    assert right(resolve(REPO).path, hub) and gets(hub) == 3


def test_a_download_that_breaks_off_for_good_is_resumed_by_the_next(hub: HubServer) -> None:
    fault = Fault(_GET, 1000, cut=1000)
    hub.faults.append(fault)
    with pytest.raises(RunError, match=r"broke off .*; run the command again to continue"):
        resolve(REPO)
    fault.times = 0
    assert right(resolve(REPO).path, hub)


def test_a_slow_server_is_waited_for(hub: HubServer) -> None:
    hub.faults.append(Fault(r".*/resolve/.*", 4, wait=0.3))
    assert right(resolve(REPO).path, hub)


def spoil(path: Path) -> None:
    """One bit of the file that a link in the cache leads to; its length stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.resolve().write_bytes(content)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_bit_that_turned_in_the_cache(hub: HubServer, name: str) -> None:
    path = resolve(REPO).path
    spoil(path / name)
    heard = Heard()
    assert right(resolve(REPO, progress=heard).path, hub)
    assert f"{name} of me/mine lies in the cache with other bytes than the Hub says; it is downloaded again." in (
        heard.notes
    )
    fault = Fault(rf"GET /{REPO}/resolve/.*/{name}", 1000, lie=True)
    spoil(path / name)
    hub.faults.append(fault)
    with pytest.raises(RunError, match="arrived again with other bytes than the Hub says, and was thrown away"):
        resolve(REPO)
    assert not (path / name).exists()


def test_a_bit_that_turned_where_the_hub_does_not_answer(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = resolve(REPO).path
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert right(resolve(REPO).path, hub)
    spoil(path / WEIGHTS)
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors of me/mine lies in the cache with other bytes than"):
        resolve(REPO)
    assert resolve(REPO, config_only=True).origin == "cache"


def test_what_is_asked_for_twice_is_hashed_once(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = downloading.file_sha256
    monkeypatch.setattr(downloading, "file_sha256", lambda path: hashed.append(path.name) or real(path))
    for _ in range(3):
        resolve(REPO)
    assert hashed and len(hashed) == len(set(hashed))


def test_a_main_that_moves_meanwhile(hub: HubServer) -> None:
    """The description is of one commit, and the files of another."""
    real = hub.folder

    def moving(kind: str, repo: str) -> Path | None:
        folder = real(kind, repo)
        if folder is not None and len(hub.requests) == 2:  # after the description
            (folder / "config.json").write_text('{"model_type": "bert"}')
        return folder

    hub.folder = moving  # type: ignore[method-assign]
    with pytest.raises(RunError, match="was changed on the Hub while it was downloaded; run the command again"):
        resolve(REPO)
    assert right(resolve(REPO).path, hub)


# --- the report's word ---


def test_weights_that_are_not_those_that_were_verified(hub: HubServer) -> None:
    (hub.root / REPO / WEIGHTS).write_bytes(b"others" * 1000)
    sentence = "me/mine is not what its report says was verified: model.safetensors has other bytes; its owner can push"
    for _ in range(2):  # downloaded, and cached
        with pytest.raises(BadCheckpoint, match=sentence):
            resolve(REPO)


def test_a_shard_that_the_report_names_and_nobody_has(hub: HubServer) -> None:
    report = report_of(hub.root / REPO)
    report.files |= {"model-00002-of-00002.safetensors": "0" * 64}
    write(hub.root / REPO, report)
    with pytest.raises(BadCheckpoint, match=r"model-00002-of-00002\.safetensors is missing"):
        resolve(REPO)


def test_a_config_that_was_changed_is_told(hub: HubServer) -> None:
    (hub.root / REPO / "config.json").write_text('{"model_type": "llama", "rope_theta": 1}')
    heard = Heard()
    resolve(REPO, progress=heard)
    assert "config.json of me/mine was changed after the checkpoint had been verified." in heard.notes


def test_the_config_alone(hub: HubServer) -> None:
    path = resolve(REPO, config_only=True).path
    assert (path / "config.json").is_file() and not (path / WEIGHTS).exists()


@pytest.mark.parametrize("report", ["[]", "{", '{"files": [1]}', '{"files": null}', "{}"])
def test_reports_that_say_nothing_of_files(hub: HubServer, report: str) -> None:
    (hub.root / REPO / "llmcomp_report.json").write_text(report)
    assert right(resolve(REPO).path, hub)
