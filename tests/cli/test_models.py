"""`llmcomp models`: every alias once, and what lies in the cache is marked."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from llmcomp.aliases import ALIASES
from llmcomp.cli import models as verb
from llmcomp.samples import SAMPLES


@pytest.fixture
def application(tmp_path, monkeypatch):
    """The verb alone, with made-up samples (one config and one tensor each) and an empty cache."""
    import numpy
    from huggingface_hub import constants
    from safetensors.numpy import save_file

    made = {}
    for name in SAMPLES:
        made[name] = tmp_path / name.removeprefix("sample:")
        made[name].mkdir()
        (made[name] / "config.json").write_text('{"architectures": ["BertModel"]}')
        save_file({"weight": numpy.zeros((1000, 1500), dtype="float16")}, made[name] / "model.safetensors")
    monkeypatch.setattr(verb, "SAMPLES", made)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    app = typer.Typer()
    app.command()(verb.models)
    return app


def test_json_lists_every_name_and_nothing_else(application):
    result = CliRunner().invoke(application, ["--json"])
    assert result.exit_code == 0
    rows = {row["alias"]: row for row in json.loads(result.stdout)}
    assert set(rows) == set(SAMPLES) | set(ALIASES)
    assert rows["sample:lm"] == {
        "alias": "sample:lm", "repo": None, "family": "BertModel", "parameters": "1.5M", "here": "ships"
    }  # fmt: skip
    assert rows["bert-base"]["repo"] == "google-bert/bert-base-uncased"
    assert rows["bert-base"]["here"] == ""


def test_cached_models_are_marked(application, tmp_path):
    repo = tmp_path / "cache/models--openai-community--gpt2"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")

    def here() -> str:
        rows = json.loads(CliRunner().invoke(application, ["--json"]).stdout)
        return next(row["here"] for row in rows if row["alias"] == "gpt2")

    assert here() == ""  # without weights it is of no use
    (snapshot / "model.safetensors").write_bytes(b"weights")
    assert here() == "cached"


def test_the_table_shows_alias_and_hub_id(application):
    result = CliRunner().invoke(application, [], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    for word in ("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "1.1B", "sample:classifier", "ships"):
        assert word in result.stdout
