"""Recipes, data and outputs that cannot be: the right exit status, one sentence, nothing half-written."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_command import Command, untouched
from safetensors.torch import save_file
from tiny import tiny

from llmcomp.formats import save
from llmcomp.formats.save import partial_of
from llmcomp.pipeline.journal import Journal

# --- recipes ---


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--bits", "5"], "--bits 5 cannot be: choose one of 2, 3, 4, 8"),
        (["--bits", "0"], "--bits 0"),
        (["--bits", "-4"], "--bits -4"),
        (["--group-size", "100"], "--group-size 100 cannot be"),
        (["--group-size", "row"], "--group-size row cannot be"),
        (["--group-size", "0"], "--group-size 0 cannot be"),
        (["--method", "gptqq"], "method 'gptqq' is not one of auto, gptq"),
        (["--activations", "int4"], "int4 cannot be: it is one of int8-dynamic, int8-static, or left out"),
        (["--activations", "int8-dynamic", "--bits", "4"], "needs symmetric weights of 8 bits per channel, not int4"),
        (["--activations", "int8-dynamic", "--format", "dense"], "dense cannot say that activations are rounded"),
        (["--activations", "int8-static", "--bits", "4"], "needs symmetric weights of 8 bits per channel, not int4"),
        (["--activations", "int8-static", "--method", "rtn"], "rtn reads no text; choose one of gptq, awq"),
        (["--format", "gguf"], "compressed-tensors"),
        (["--target", "atention"], "target 'atention' matches no weight"),
        (["--skip", "blocks:7-9"], "target 'blocks:7-9' matches no weight"),
        (["--skip", "re:("], "re:("),
        (["--override", "down_proj bit=8"], "unknown key 'bit'; did you mean 'bits'?"),
        (["--override", ""], "--override '' names no target; expected one and what differs, as 'down_proj bits=8'"),
        (["--override", "down_proj bits"], "expected NAME=VALUE"),
        (["--override", "down_proj bits=-4"], "--bits -4 cannot be"),
        (["--override", "down_proj bits=five"], "'bits' must be int"),
        (["--override", "down_proj bits=5"], "--bits 5 cannot be"),
        (["--skip", "attention", "--skip", "mlp"], "nothing to quantize"),
        (["--samples", "0"], "at least 1 sample"),
        (["--sequence-length", "1"], "at least 1 sample of 2 tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_recipes_that_cannot_be(flags: list[str], named: str, command: Command, llama: Path) -> None:
    assert named in command.refused(2, llama, *flags)
    assert untouched(command)


def test_all_problems_at_once(command: Command, llama: Path) -> None:
    said = command.refused(2, llama, "--method", "x", "--target", "y", "--skip", "z")
    assert "method 'x'" in said and "target 'y'" in said and "target 'z'" in said


def test_a_group_size_that_fits_no_layer(command: Command, tmp_path: Path) -> None:
    narrow = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "num_key_value_heads": 3}
    model = tiny("llama", tmp_path / "narrow", tokenizer=True, **narrow)
    said = command.refused(2, model, "--group-size", "128")
    assert "group_size 128 divides none of the widths [96, 160]" in said
    assert untouched(command)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("steps: [{kind: quantize, bitz: 4}]", "unknown key 'bitz'; did you mean 'bits'?"),
        ("steps: [{kind: quantise}]", "kind"),
        ("steps: []", "'steps' must be a non-empty list"),
        ("steps: {", "is not YAML"),
        ("- 4", "must be a mapping"),
        ("steps: [{kind: quantize, options: {dampening: 1}}]", "dampening"),
        ("calibration: {samples: many}", "'samples' must be int"),
    ],
)
def test_recipe_files_that_cannot_be(
    content: str, named: str, command: Command, llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    assert named in command.refused(2, llama, "--recipe", str(path), "--no-evaluate")


def test_recipe_file_and_flags(command: Command, llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: [{kind: quantize}]")
    assert "drop --bits" in command.refused(2, llama, "--recipe", str(path), "--bits", "8")


def test_recipe_file_missing(command: Command, llama: Path, tmp_path: Path) -> None:
    assert "none.yaml" in command.refused(2, llama, "--recipe", str(tmp_path / "none.yaml"))


# --- data ---


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("missing.txt", None, "missing.txt"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n \t\n", "white space"),
        ("latin.txt", "Größe und Maß\n".encode("latin-1") * 500, "latin.txt"),
        ("short.txt", b"only five words in here", "fewer than one sample"),
        ("data.docx", b"PK", ".docx"),
        ("rows.jsonl", b'{"text": "fine"}\n{"text": \n', "rows.jsonl"),
        ("rows.csv", b"a,b\n1,2\n", "rows.csv"),
        ("rows.parquet", b"no parquet at all", "rows.parquet"),
        ("ids.safetensors", b"short", "ids.safetensors"),
    ],
)
def test_calibration_files(
    name: str, content: bytes | None, named: str, command: Command, llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert named in command.refused(2, llama, "--calibration", str(path))
    assert untouched(command)


def test_token_ids_of_another_vocabulary(command: Command, llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.full((8, 32), 40_000)}, path)
    assert "512" in command.refused(2, llama, "--calibration", str(path))


def test_evaluation_data_is_looked_at_before_the_work(command: Command, llama: Path, tmp_path: Path) -> None:
    more = ["--evaluate", "--eval-data", str(tmp_path / "none.txt")]
    assert "none.txt" in command.refused(2, llama, *more)
    assert untouched(command)


# --- outputs ---


def test_output_exists(command: Command, llama: Path, tmp_path: Path) -> None:
    taken = Command(tmp_path / "taken", command.text, command._captured)
    taken.output.mkdir()
    (taken.output / "mine.txt").write_text("dear")
    status, said = taken.run(llama)
    assert status == 2
    assert said == f"llmcomp: {taken.output} already exists; choose another --output or add --overwrite.\n"
    status, said = taken.run(llama, "--overwrite")
    assert status == 2 and "is no checkpoint, so --overwrite leaves it" in said
    assert [path.name for path in taken.output.iterdir()] == ["mine.txt"] and untouched(taken)


def test_the_model_itself_is_no_output(command: Command, llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    status, said = Command(model, command.text, command._captured).run(model, "--overwrite")
    assert status == 2 and "holds what is read, so --overwrite leaves it" in said
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_output_is_a_file(command: Command, llama: Path, tmp_path: Path) -> None:
    taken = Command(tmp_path / "file", command.text, command._captured)
    taken.output.write_text("dear")
    assert taken.run(llama, "--overwrite")[0] == 2
    assert taken.output.read_text() == "dear"


def test_read_only_output(
    command: Command, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    if os.geteuid() == 0:  # root may write anywhere
        may = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and may(path, mode))
    closed.chmod(0o555)
    inside = Command(closed / "q", command.text, command._captured)
    said = inside.refused(2, llama)
    assert f"{closed} cannot be written to" in said
    assert list(closed.iterdir()) == []


def test_output_that_becomes_read_only(
    command: Command, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(save, "save_file", forbidden)
    assert "cannot be written" in command.refused(2, llama)


def test_too_little_room(command: Command, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(llama)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    said = command.refused(2, llama)
    assert "free" in said and untouched(command)


class Full:
    """Stands for a function that writes; from the n-th call on, the disk is full."""

    def __init__(self, function: Callable[..., Any], calls: int) -> None:
        self.function, self.left = function, calls

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.function(*arguments, **keywords)


@pytest.mark.parametrize(
    ("name", "calls"), [("save_file", 0), ("save_file", 2), ("_write_text", 0), ("_write_text", 1), ("_sync", 3)]
)
def test_disk_becomes_full(
    name: str, calls: int, command: Command, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(save, name, Full(getattr(save, name), calls))
        said = command.refused(1, llama)
    assert "is full; make room, then the same command resumes" in said
    status, said = command.run(llama)
    assert status == 0, said
    assert ("Resuming" in said) == (calls > 0 or name == "_write_text")
    assert untouched(command)


def test_disk_too_full_for_waiting_activations(
    command: Command, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", Full(os.posix_fallocate, 3))
    assert "is full" in command.refused(1, llama, "--activation-memory", "0")


def test_disk_too_full_for_the_report(
    command: Command, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(self: Path, *arguments: Any, **keywords: Any) -> int:
        if self.name.startswith("llmcomp_report"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert "is full" in command.refused(1, llama)
    assert command.run(llama)[0] == 0


def test_recipe_that_cannot_be_saved(command: Command, llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "no" / "such" / "place.yaml"
    assert "place.yaml" in command.refused(2, llama, "--save-recipe", str(path))


# --- Ctrl-C ---


@pytest.mark.parametrize("after", [0, 2])
def test_ctrl_c(after: int, command: Command, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Journal.add

    def interrupted(self: Journal, *arguments: Any) -> None:
        if len(self.done) == after:
            os.kill(os.getpid(), signal.SIGINT)
        add(self, *arguments)

    mine = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", interrupted)
        assert command.refused(130, llama) == "Interrupted; the same command resumes where it stopped."
    assert signal.getsignal(signal.SIGINT) is mine, "a caller's own handler is gone"
    assert partial_of(command.output).is_dir()
    status, said = command.run(llama)
    assert status == 0 and ("Resuming" in said) == (after > 0)
    assert untouched(command)
