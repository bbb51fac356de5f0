"""Exports that are transformers checkpoints again: the same integers, and nothing else than they promise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import tiny

import llmcomp
from llmcomp.cli.main import main
from llmcomp.errors import BadRecipe, OutputExists, UserError
from llmcomp.exports.checkpoint import nbytes
from llmcomp.formats import FORMATS
from llmcomp.formats.opening import open_checkpoint
from llmcomp.measure.cost import size_of
from llmcomp.native import unwrap


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "source"
    return tiny("llama-untied", folder, dtype=torch.bfloat16, tokenizer=True)


def compressed(source: Path, output: Path, form: str, **step: object) -> Path:
    options = llmcomp.RunOptions(output=output, verify=False, evaluate=False)
    return llmcomp.quantize(str(source), format=form, options=options, **step).output


SCHEMES = {
    "int4": {"bits": 4, "method": "rtn"},
    "int3-asym": {"bits": 3, "method": "rtn", "symmetric": False},
    "w8a8": {"bits": 8, "method": "rtn", "activations": "int8-dynamic"},
    "w8a8-static": {"bits": 8, "method": "rtn-clip", "activations": "int8-static"},
}


@pytest.mark.parametrize("name", SCHEMES)
def test_there_and_back_again(name: str, source: Path, tmp_path: Path) -> None:
    first = compressed(source, tmp_path / "first", "compressed-tensors", **SCHEMES[name])
    llmcomp.export(first, tmp_path / "packed", "llmcomp")
    llmcomp.export(tmp_path / "packed", tmp_path / "again", "compressed-tensors")
    one, other = open_checkpoint(first), open_checkpoint(tmp_path / "again")
    assert one.schemes == other.schemes
    for form, place in (("llmcomp", tmp_path / "packed"), ("compressed-tensors", tmp_path / "again")):
        layout = FORMATS[form]([(one.ref(module), scheme) for module, scheme in one.schemes.items()], one.skeleton)
        assert nbytes(one, layout) == size_of(place, role=lambda name: "all").parts["all"]
    for module in one.schemes:
        before, after = one.weight(module), other.weight(module)
        assert torch.equal(before.values, after.values)
        assert torch.equal(before.scale, after.scale)
        assert (before.input_scale is None) == (after.input_scale is None)
        assert before.input_scale is None or torch.equal(before.input_scale, after.input_scale)
    ids = torch.randint(5, 60, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [llmcomp.load(place)(ids).logits for place in (first, tmp_path / "packed")]
    assert torch.equal(*outputs)
    assert not list((tmp_path / "packed").glob("llmcomp_report*"))


def test_configs_of_older_tools_keep_their_dtype(source: Path, tmp_path: Path) -> None:
    first = compressed(source, tmp_path / "first", "compressed-tensors", bits=4, method="rtn")
    config = json.loads((first / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (first / "config.json").write_text(json.dumps(config))
    llmcomp.export(first, tmp_path / "dense", "dense")
    llmcomp.export(first, tmp_path / "packed", "llmcomp")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == "bfloat16"
    assert unwrap(json.loads((tmp_path / "packed" / "config.json").read_text()))["dtype"] == "bfloat16"


def test_what_cannot_be_exported_leaves_nothing(source: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "not" / "there"):  # nor the folders that the output would lie in
        with pytest.raises(BadRecipe, match="holds no packed weights"):
            llmcomp.export(source, folder / "out", "llmcomp")
    with pytest.raises(BadRecipe, match="choose one of compressed-tensors"):
        llmcomp.export(source, tmp_path / "out", "marlin")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_what_is_larger_than_the_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compressed(source, tmp_path / "first", "compressed-tensors", bits=4, method="rtn")
    sizes = [sum(file.stat().st_size for file in one.glob("*.safetensors")) for one in (first, source)]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=sum(sizes) // 2))
    with pytest.raises(UserError, match=r"^The export to dense needs \d+\.\d\d GB, but its disk has"):
        llmcomp.export(first, tmp_path / "new" / "dense", "dense")
    assert list(tmp_path.iterdir()) == [first]
    llmcomp.export(first, tmp_path / "new" / "packed", "llmcomp")
    assert sorted(tmp_path.iterdir()) == [first, tmp_path / "new"]


def test_a_source_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    first = compressed(source, tmp_path / "outer" / "first", "compressed-tensors", bits=4, method="rtn")
    before = sorted(first.iterdir())
    for output in (first, first.parent):
        with pytest.raises(OutputExists, match="holds what is read"):
            llmcomp.export(first, output, "dense", overwrite=True)
    assert sorted(first.iterdir()) == before


def test_the_verb(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = compressed(source, tmp_path / "first", "llmcomp", bits=4, method="rtn")
    for form in ("gguf", "dense"):
        arguments = ["export", str(first), str(tmp_path / form), "--format", form]
        assert main(arguments) == 0
        assert main(arguments) == 2  # it is there
        assert "already exists" in capsys.readouterr().err
        assert main([*arguments, "--overwrite", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["output"] == str(tmp_path / form)
