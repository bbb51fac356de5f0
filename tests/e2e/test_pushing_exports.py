"""Exports are pushed with a card that says how to load that file, and its code runs as it stands."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_artefact import contents
from hub_inside import inside
from hub_server import HubServer
from hub_writing import card_errors
from tiny import tiny

import llmcomp
from llmcomp.errors import BadCheckpoint
from llmcomp.export_record import RECORD_NAME, ExportRecord
from llmcomp.publishing import card_of, push

_FILES = {
    "gguf": {"model.gguf"}, "onnx": {"model.onnx"}, "openvino": {"openvino_model.xml", "openvino_model.bin"},
    "dense": {"model.safetensors"},
}  # fmt: skip
_SAID = {"gguf": r".*", "onnx": r".*", "openvino": r".*", "dense": r".*"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with inside(tmp_path / "hub", monkeypatch) as running:
        yield running


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A decoder and an encoder, 4 bits by rounding, in llmcomp's layout; of the decoder's source the card is known."""
    found = {}
    for name in ("llama", "bert-classifier"):
        folder = tmp_path_factory.mktemp(name)
        source = tiny(name, folder / "source", tokenizer=True, num_hidden_layers=1)
        (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n")
        llmcomp.quantize(str(source), method="rtn", bits=4, group_size=32, format="llmcomp", output=folder / "q",
                         evaluate=False, verify=False)  # fmt: skip
        found[name] = folder / "q"
    return found


def blocks(text: str) -> list[tuple[str, str, str, str]]:
    section = text.split("## How to load it")[1].split("\n## ")[0]
    return re.findall(r"### (.+?)\n\n(.+?)\n\n```(\w+)\n(.+?)\n```", section, re.DOTALL)


def run(text: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the code of a card prints, but for that which says it was not run."""
    capsys.readouterr()
    ran = [(title, code) for title, hint, language, code in blocks(text) if "Not run by" not in hint]
    for title, code in ran:
        exec(compile(code, title, "exec"), {})
    assert ran
    return [line for line in capsys.readouterr().out.splitlines() if line]


@pytest.mark.parametrize("form", _FILES)
def test_an_export_of_a_decoder(
    form: str, compressed: dict[str, Path], hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "secret-place" / "out"
    llmcomp.export(compressed["llama"], output, form)
    before = contents(output)
    result = push(output, "me/exported")
    there = contents(hub.root / "me/exported")
    assert _FILES[form] | {"README.md", RECORD_NAME, "tokenizer.json"} <= set(there) and result.sent
    assert {name for name in before if there[name] != before[name]} == {RECORD_NAME, "llmcomp_recipe.yaml"} & (
        {name for name in before if str(tmp_path.parent) in (output / name).read_text(errors="replace")}
    )
    for path in (hub.root / "me/exported").iterdir():
        assert str(tmp_path.parent).encode() not in path.read_bytes(), path
    text = (hub.root / "me/exported/README.md").read_text()
    assert card_errors(text) == [] and "license: apache-2.0" in text and "## How it was compared" in text
    assert "model-index" not in text, "nothing was measured of this file"
    run(text, capsys)
    assert push(output, "me/exported").sent == ()


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_an_export_of_an_encoder(
    form: str, compressed: dict[str, Path], hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llmcomp.export(compressed["bert-classifier"], tmp_path / "out", form)
    push(tmp_path / "out", "me/encoder")
    assert run((hub.root / "me/encoder/README.md").read_text(), capsys)[-1] == "[(1, 3)]"


def test_what_was_changed_after_the_export_is_not_pushed(
    compressed: dict[str, Path], hub: HubServer, tmp_path: Path
) -> None:
    llmcomp.export(compressed["llama"], tmp_path / "out", "gguf")
    with (tmp_path / "out" / "model.gguf").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BadCheckpoint, match=r"model\.gguf has other bytes; export it again"):
        push(tmp_path / "out", "me/exported")
    (tmp_path / "out" / RECORD_NAME).write_text("{}")
    with pytest.raises(BadCheckpoint, match=r"llmcomp_export\.json of .* cannot be read .*; export it again"):
        push(tmp_path / "out", "me/exported")
    assert hub.requests == []


def test_an_export_takes_the_place_of_another(compressed: dict[str, Path], hub: HubServer, tmp_path: Path) -> None:
    for form in ("gguf", "dense"):
        llmcomp.export(compressed["llama"], tmp_path / form, form)
        push(tmp_path / form, "me/exported")
    there = set(contents(hub.root / "me/exported"))
    assert "model.safetensors" in there and "model.gguf" not in there


def test_a_checkpoint_that_no_report_tells_of(tmp_path: Path) -> None:
    """A dense model that others made: nothing is said of compression."""
    source = tiny("llama", tmp_path / "source", tokenizer=True, num_hidden_layers=1)
    llmcomp.export(source, tmp_path / "out", "gguf")
    record = ExportRecord.read(tmp_path / "out")
    assert record.report is None and record.architecture == "LlamaForCausalLM" and record.task == "causal-lm"
    text = card_of(tmp_path / "out", "me/x").text
    assert card_errors(text) == [] and "compressed by llmcomp" not in text and "## Calibration data" not in text
    assert "source, exported as GGUF by llmcomp" in text


def test_the_record_does_not_travel_on(compressed: dict[str, Path], tmp_path: Path) -> None:
    """An export that is compressed, or exported, again has papers of its own."""
    llmcomp.export(compressed["llama"], tmp_path / "dense", "dense")
    llmcomp.quantize(str(tmp_path / "dense"), method="rtn", bits=8, output=tmp_path / "q", evaluate=False, verify=False)
    assert not (tmp_path / "q" / RECORD_NAME).exists()
    llmcomp.export(tmp_path / "q", tmp_path / "again", "dense")
    assert ExportRecord.read(tmp_path / "again").model == str(tmp_path / "q")
    shutil.rmtree(tmp_path / "again")
