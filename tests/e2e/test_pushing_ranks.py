"""--push-to-hub where several processes make one model, and of a distillation: one of them pushes, once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from crew import Crew, Ended
from hub_artefact import contents
from hub_inside import TOKEN, main_inside
from hub_server import HubServer
from hub_writing import User, card_errors
from tiny import tiny

from llmcomp.report.schema import Report

QUICK = ["--samples", "8", "--sequence-length", "32", "--no-evaluate"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    (tmp_path / "hub").mkdir()
    with HubServer(tmp_path / "hub") as server:
        server.users[TOKEN] = User("me")
        yield server


def together(hub: HubServer, tmp_path: Path, command: list[str], token: str = TOKEN) -> list[Ended]:
    return Crew(tmp_path).run(main_inside, *[(hub.url, token, command)] * 2)


def require_pushed_once(hub: HubServer, ended: list[Ended], output: Path) -> None:
    assert [one.status for one in ended] == [0, 0], ended
    assert "Published: " in ended[0].err and not ended[1].out and not ended[1].err, "one rank pushes"
    assert hub.requests.count("POST /api/repos/create") == 1 and len(hub.store.messages) == 1
    there, report = contents(hub.root / "me/mine"), Report.read(output)
    assert {name for name in report.files if there[name] != report.files[name]} <= {"llmcomp_recipe.yaml"}
    assert card_errors((hub.root / "me/mine/README.md").read_text()) == []


@pytest.mark.slow
def test_two_ranks_push_once(hub: HubServer, text: Path, tmp_path: Path) -> None:
    source, output = tiny("llama", tmp_path / "llama", tokenizer=True, num_hidden_layers=1), tmp_path / "q"
    command = ["quantize", str(source), "--calibration", str(text), "-o", str(output), "--push-to-hub", "me/mine"]
    require_pushed_once(hub, together(hub, tmp_path, [*command, *QUICK]), output)


@pytest.mark.slow
def test_a_distillation_by_two_ranks_is_pushed_once(hub: HubServer, text: Path, tmp_path: Path) -> None:
    """With its plan, in which no directory of this machine stands."""
    source, output = tiny("llama", tmp_path / "llama", tokenizer=True), tmp_path / "student"
    command = ["distill", str(source), "--student", "layers=1", "--data", str(text), "--steps", "2", "-o", str(output)]
    command += ["--batch-size", "2", "--push-to-hub", "me/mine"]
    require_pushed_once(hub, together(hub, tmp_path, [*command, *QUICK]), output)
    plan = (hub.root / "me/mine/distill.yaml").read_text()
    assert text.name in plan and str(text.parent) not in plan and str(tmp_path) not in plan


def test_what_one_rank_is_refused_ends_all(hub: HubServer, text: Path, tmp_path: Path) -> None:
    source = tiny("llama", tmp_path / "llama", tokenizer=True, num_hidden_layers=1)
    command = ["quantize", str(source), "--calibration", str(text), "-o", str(tmp_path / "q"), *QUICK]
    ended = together(hub, tmp_path, [*command, "--push-to-hub", "me/mine"], token="hf_wrong")
    assert [one.status for one in ended] == [2, 2], ended
    assert len(ended[0].sentences) == 1 and "does not accept the token" in ended[0].sentences[0]
    assert not ended[1].sentences and not (tmp_path / "q").exists()
