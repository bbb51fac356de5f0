"""`llmcomp plan`: from config alone, with quantize's flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny import tiny
from typer.testing import CliRunner

from llmcomp.cli.plan import plan as verb
from llmcomp.errors import BadCheckpoint, BadRecipe, ModelNotFound
from llmcomp.methods import METHODS

app = typer.Typer()
app.command()(verb)


def as_json(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exception is None, result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def only_config(directory: Path, **changed: Any) -> str:
    config = json.loads((tiny("llama", directory / "whole") / "config.json").read_text()) | changed
    (directory / "bare").mkdir()
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "bare" / "config.json").write_text(json.dumps(kept))
    return str(directory / "bare")


def test_a_config_is_enough_and_says_the_same_as_the_whole_model(tmp_path: Path) -> None:
    bare = as_json(only_config(tmp_path), "--bits", "4")
    whole = as_json(str(tmp_path / "whole"), "--bits", "4")
    for one in (bare, whole):
        assert one["rows"][0]["bytes_after"] < one["bytes_before"]
    sizes = [[row["bytes_after"], row["peak_memory"]] for row in bare["rows"]]
    assert sizes == [[row["bytes_after"], row["peak_memory"]] for row in whole["rows"]]


def test_without_bits_all_widths_stand_beside_each_other(tmp_path: Path) -> None:
    found = as_json(only_config(tmp_path))
    sizes = {row["bits"]: row["bytes_after"] for row in found["rows"] if row["method"] == "gptq"}
    assert sorted(sizes) == [2, 3, 4, 8]
    assert sizes[2] < sizes[3] < sizes[4] < sizes[8]
    assert len(found["rows"]) == 4 * len(METHODS)


def test_a_config_without_a_dtype_is_taken_as_float32_and_says_so(tmp_path: Path) -> None:
    found = as_json(only_config(tmp_path, dtype=None), "--bits", "4")
    assert found["dtype"] == "float32"
    assert any("names no dtype" in note and "float32 is assumed" in note for note in found["notes"])


def test_terms_of_memory_are_in_the_json(tmp_path: Path) -> None:
    row = as_json(only_config(tmp_path), "--bits", "4")["rows"][0]
    assert sum(row["terms"].values()) == row["peak_memory"]
    assert row["terms"]["allocator"] > 0


def test_the_text_fits_and_names_every_method(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [only_config(tmp_path), "--bits", "4"], env={"COLUMNS": "100"})
    assert result.exception is None, result.exception
    assert all(method in result.stdout for method in ("gptq", "rtn-clip", "rtn"))
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_samples_need_no_network() -> None:
    found = as_json("sample:lm", "--bits", "4")
    assert found["rows"][0]["bytes_after"] < found["bytes_before"]


def test_what_quantize_refuses_is_refused(tmp_path: Path) -> None:
    bare = only_config(tmp_path)
    for arguments, error in (
        ([bare, "--bits", "5"], BadRecipe),
        ([bare, "--target", "nonsense"], BadRecipe),
        ([str(tmp_path / "nothing")], ModelNotFound),
    ):
        assert isinstance(CliRunner().invoke(app, arguments).exception, error)


def test_a_compressed_model_is_refused(tmp_path: Path) -> None:
    bare = only_config(tmp_path, quantization_config={"quant_method": "gptq"})
    result = CliRunner().invoke(app, [bare])
    assert isinstance(result.exception, BadCheckpoint)
    assert "already quantized" in str(result.exception)


@pytest.mark.parametrize("name", ["lm", "minilm-sst2"])
def test_trained_models(assets: Path, name: str) -> None:
    found = as_json(str(assets / "models" / name), "--bits", "4", "--samples", "8")
    assert found["rows"][0]["bytes_after"] < found["bytes_before"]
    assert found["rows"][0]["seconds"] > 0
