"""Shards, checkpoints and publishing: whole or not at all, and one sentence when the disk says no."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llmcomp.errors import OutputExists, RunError, UserError
from llmcomp.formats import save
from llmcomp.formats.save import (
    ShardWriter,
    checkpoint_config,
    partial_of,
    preflight,
    publish,
)
from llmcomp.session import default_output

SOURCE = Path("a-model-elsewhere")


@pytest.fixture
def writer(tmp_path: Path) -> ShardWriter:
    return ShardWriter(partial_of(tmp_path / "out"))


def two_shards(writer: ShardWriter) -> None:
    writer.write("block-00000", {"a": torch.arange(4.0)})
    writer.write("block-00001", {"b": torch.arange(6.0).view(2, 3).t()})


def no_temporaries(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if "tmp" in path.name]


def test_write_names_its_bytes(writer: ShardWriter) -> None:
    shard = writer.write("block-00000", {"a": torch.zeros(3)})
    assert writer.holds(shard)
    assert writer.shards() == ["block-00000"]
    path = writer.partial / "blocks" / "block-00000.safetensors"
    assert shard.nbytes == path.stat().st_size
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert not writer.holds(shard)
    path.unlink()
    assert not writer.holds(shard)


def test_files_get_the_users_usual_mode(writer: ShardWriter, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    two_shards(writer)
    directory = writer.finish(["block-00000", "block-00001"], {})
    modes = {path.stat().st_mode for path in directory.iterdir()}
    assert modes == {(tmp_path / "usual").stat().st_mode}


def test_writing_twice_gives_the_same_bytes(writer: ShardWriter) -> None:
    tensors = {"b": torch.arange(5.0), "a": torch.ones(2)}
    assert writer.write("x", tensors) == writer.write("x", dict(reversed(tensors.items())))


def test_finish_makes_an_indexed_checkpoint(writer: ShardWriter, tmp_path: Path) -> None:
    two_shards(writer)
    writer.write("block-00007", {"stale": torch.zeros(1)})
    (tmp_path / "tokenizer.json").write_text("{}")
    for _ in range(2):  # a second call after a kill does the same
        order, files = ["block-00000", "block-00001"], [tmp_path / "tokenizer.json"]
        directory = writer.finish(order, {"model_type": "x"}, files, {"note.txt": "hi"})
    assert {path.name for path in directory.iterdir()} == {
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "note.txt", "tokenizer.json",
    }  # fmt: skip
    index = json.loads((directory / save.INDEX).read_text())
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }
    assert index["metadata"]["total_size"] == 40
    assert torch.equal(load_file(directory / index["weight_map"]["b"])["b"], torch.arange(6.0).view(2, 3).t())
    assert writer.shards() == ["block-00000", "block-00001", "block-00007"]  # the run could still resume


def test_folders_of_copied_files_are_kept(writer: ShardWriter, tmp_path: Path) -> None:
    two_shards(writer)
    source = tmp_path / "source"
    (source / "1_Pooling").mkdir(parents=True)
    (source / "2_Normalize").mkdir()
    (source / "1_Pooling/config.json").write_text("{}")
    files = [source / "1_Pooling/config.json", source / "2_Normalize"]
    directory = writer.finish(["block-00000"], {}, files, root=source)
    assert (directory / "1_Pooling/config.json").read_text() == "{}"
    assert (directory / "2_Normalize").is_dir()


def test_one_shard_needs_no_index(writer: ShardWriter) -> None:
    writer.write("block-00000", {"a": torch.zeros(2)})
    directory = writer.finish(["block-00000"], {})
    assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors"}


def test_finish_without_hard_links(writer: ShardWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    two_shards(writer)
    directory = writer.finish(["block-00000", "block-00001"], {})
    assert len(list(directory.glob("*.safetensors"))) == 2


def test_finish_refuses_a_missing_shard_and_a_tensor_in_two(writer: ShardWriter) -> None:
    two_shards(writer)
    with pytest.raises(RunError, match="Shard block-00002 is missing"):
        writer.finish(["block-00000", "block-00002"], {})
    writer.write("block-00001", {"a": torch.zeros(2)})
    with pytest.raises(RunError, match="two shards"):
        writer.finish(["block-00000", "block-00001"], {})


def test_publish_appears_at_once_and_leaves_nothing(writer: ShardWriter, tmp_path: Path) -> None:
    two_shards(writer)
    writer.finish(["block-00000", "block-00001"], {})
    publish(writer.partial, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").is_file()


def existing(tmp_path: Path) -> Path:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")
    return output


def test_publish_overwrites_only_when_told(writer: ShardWriter, tmp_path: Path) -> None:
    output = existing(tmp_path)
    two_shards(writer)
    writer.finish(["block-00000", "block-00001"], {"new": True})
    with pytest.raises(OutputExists, match="--overwrite"):
        publish(writer.partial, output)
    assert (output / "config.json").read_text() == "old"
    publish(writer.partial, output, overwrite=True)
    assert json.loads((output / "config.json").read_text()) == {"new": True}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_rename_puts_the_old_output_back(
    writer: ShardWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = existing(tmp_path)
    two_shards(writer)
    checkpoint = writer.finish(["block-00000", "block-00001"], {})
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self == checkpoint:
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(RunError, match="could not be written"):
        publish(writer.partial, output, overwrite=True)
    assert (output / "config.json").read_text() == "old"
    assert checkpoint.is_dir()


def test_a_kill_between_the_renames_is_finished_by_the_next_run(writer: ShardWriter, tmp_path: Path) -> None:
    output = existing(tmp_path)
    two_shards(writer)
    writer.finish(["block-00000", "block-00001"], {"new": True})
    output.rename(tmp_path / ".out.replaced")
    publish(writer.partial, output, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((output / "config.json").read_text()) == {"new": True}


def test_overwrite_never_deletes_what_is_no_checkpoint(writer: ShardWriter, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(home)
    (tmp_path / "file").write_text("x")
    for name, what in (("home", "no checkpoint"), ("link", "no directory"), ("file", "no directory")):
        with pytest.raises(OutputExists, match=what):
            publish(writer.partial, tmp_path / name, overwrite=True)
        with pytest.raises(OutputExists, match=what):
            preflight(SOURCE, tmp_path / name, True, 0)
    assert (home / "thesis.txt").is_file()


FULL_TEXT = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize("where", ["safetensors", "fsync"])
def test_full_disk(writer: ShardWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    first = writer.write("block-00000", {"a": torch.zeros(3)})

    def full_file(_tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError(FULL_TEXT)

    def full_sync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "safetensors":
        monkeypatch.setattr(save, "save_file", full_file)
    else:
        monkeypatch.setattr(os, "fsync", full_sync)
    with pytest.raises(RunError, match=r"disk .* is full; make room"):
        writer.write("block-00001", {"b": torch.zeros(3)})
    assert writer.shards() == ["block-00000"]
    assert writer.holds(first)
    assert no_temporaries(tmp_path)
    with pytest.raises(RunError, match="is full"), save.writing(tmp_path):
        full_sync(0)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_read_only_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="cannot be written"):
        ShardWriter(tmp_path / "partial")


def test_an_interrupted_write_leaves_no_file(writer: ShardWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        writer.write("block-00000", {"a": torch.zeros(3)})
    assert writer.shards() == []
    assert no_temporaries(writer.partial)


def test_strays_of_a_killed_run_are_swept(writer: ShardWriter) -> None:
    two_shards(writer)
    (writer.partial / "blocks" / ".tmpXy12").write_bytes(b"half")
    again = ShardWriter(writer.partial)
    assert again.shards() == ["block-00000", "block-00001"]
    assert no_temporaries(writer.partial)


def test_preflight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preflight(SOURCE, tmp_path / "new" / "deep", False, 1000)
    assert not (tmp_path / "new").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExists, match="already exists"):
        preflight(SOURCE, tmp_path / "out", False, 0)
    preflight(SOURCE, tmp_path / "out", True, 0)
    with pytest.raises(UserError, match=r"needs 1000000\.00 GB, but its disk has"):
        preflight(SOURCE, tmp_path / "big", False, 10**15)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        preflight(SOURCE, tmp_path / "file" / "out", False, 0)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="cannot be written to"):
        preflight(SOURCE, tmp_path / "new", False, 0)


def test_what_is_read_is_never_overwritten(tmp_path: Path) -> None:
    source, link = tmp_path / "models" / "m", tmp_path / "link"
    source.mkdir(parents=True)
    (source / "config.json").touch()
    link.symlink_to(source.parent)
    for output in (source, source.parent, link / "m"):
        with pytest.raises(OutputExists, match="holds what is read, so --overwrite leaves it"):
            preflight(source, output, True, 0)
    preflight(source, tmp_path / "models" / "other", True, 0)


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert partial_of(Path("a/b")) == tmp_path / "a" / ".b.partial"
    assert default_output("google-bert/bert-base-uncased", "gptq-w4") == Path("bert-base-uncased-gptq-w4")
    assert default_output("sample:lm", "rtn-w3") == Path("sample-lm-rtn-w3")
    assert default_output("../models/lm/", "rtn-w3") == Path("lm-rtn-w3")
    assert default_output(".", "rtn-w3") == Path(f"{tmp_path.name}-rtn-w3")


def test_checkpoint_config_keeps_the_source() -> None:
    source = {"model_type": "llama", "torch_dtype": "float16", "custom": 7, "tie_word_embeddings": True}
    config = checkpoint_config(source, "LlamaForCausalLM", "bfloat16", {"quant_method": "x"}, untied=True)
    assert config == {
        "model_type": "llama", "custom": 7, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16",
        "tie_word_embeddings": False, "quantization_config": {"quant_method": "x"},
    }  # fmt: skip
    assert checkpoint_config(source, "L", "float32", None)["tie_word_embeddings"] is True


def test_overwriting_an_empty_directory(writer: ShardWriter, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    two_shards(writer)
    shutil.copytree(writer.finish(["block-00000"], {}), tmp_path / "copy")
    publish(writer.partial, tmp_path / "out", overwrite=True)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "copy").iterdir()}
