"""What llmcomp might have written, to be pushed to a Hub on loopback; nothing in it is opened, all of it is sent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hub_inside import inside
from hub_server import HubServer

from llmcomp import uploading
from llmcomp.digests import digests, file_sha256
from llmcomp.progress import Silent
from llmcomp.report import html, png
from llmcomp.report.schema import LayerReport, Machine, Origin, Report, Verification

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = [f"model-0000{number}-of-00006.safetensors" for number in range(1, 7)]


class Heard(Silent):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def report_of(directory: Path) -> Report:
    layer = LayerReport("model.layers.0.mlp.up_proj", 0, "mlp", (4, 4), "int4 g128", "gptq", 32, 10, 0.01)
    return Report(
        command="quantize", model="/home/somebody/base", source="/home/somebody/base", output=str(directory),
        created="2026-11-21T10:41:07+00:00", machine=Machine("a CPU", 1, 1, "cpu", {"torch": "2"}),
        architecture="LlamaForCausalLM", task="causal-lm", recipe={"steps": []}, format="compressed-tensors",
        calibration={}, layers=[layer], verification=Verification(True, ["all"], 0.0, 1),
        origin=Origin("org/base", COMMIT, "apache-2.0", languages=["en"]), files=digests(directory),
        llmcomp_version="0.1.0",
    )  # fmt: skip


def write(directory: Path, report: Report) -> None:
    (directory / "llmcomp_report.json").write_text(report.to_json(), encoding="utf-8")


def make_artefact(tmp_path: Path) -> Path:
    """A directory with six shards, config, tokenizer, recipe and report."""
    directory = tmp_path / "mine"
    directory.mkdir()
    for number, name in enumerate(SHARDS):
        (directory / name).write_bytes(bytes([number]) * 40_000)
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text('{"model": {}}')
    (directory / "llmcomp_recipe.yaml").write_text("steps: []\n")
    write(directory, report_of(directory))
    return directory


@contextmanager
def quick_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub for this process, with waits between tries, and plots, that take no time."""
    import huggingface_hub.utils._http as client

    class Quick:
        def __getattr__(self, name: str) -> Any:
            import time

            return (lambda seconds: None) if name == "sleep" else getattr(time, name)

    monkeypatch.setattr(png, "drawings", lambda report: {"sizes": ("sizes", b"\x89PNG")})  # a second each
    monkeypatch.setattr(html, "render", lambda report: f"<!doctype html>{report.model}")
    monkeypatch.setattr(uploading, "time", Quick())
    monkeypatch.setattr(client, "time", Quick())
    with inside(tmp_path / "hub", monkeypatch) as running:
        yield running


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


def sent_weights(hub: HubServer) -> int:
    return sum(request.startswith("PUT /lfs/") for request in hub.requests)
