"""Files that anybody may have written: they are read, or refused by an error of ours, and nothing else.

LLMCOMP_FUZZ=3000 tries so many of each kind.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmcomp.calibration.data import read_texts
from llmcomp.checkpoint import Checkpoint
from llmcomp.errors import LlmcompError
from llmcomp.provenance import front_matter, origin_of
from llmcomp.recipe import Recipe, check
from llmcomp.report.schema import LayerReport, Machine, Measured, Origin, Report, Size, Verification
from llmcomp.shards import read_shard

EXAMPLES = int(os.environ.get("LLMCOMP_FUZZ", "60"))
MANY = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
data = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
RECIPE = Recipe().to_yaml()
HEADER = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def put(tree: Any, path: list[int], value: Any) -> Any:
    """`tree` with `value` in the place that the numbers lead to."""
    if not path or not isinstance(tree, dict | list) or not tree:
        return value
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = keys[path[0] % len(keys)]
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[key] = put(tree[key], path[1:], value)
    return copy


places = st.lists(st.integers(0, 60), min_size=1, max_size=4)


def survives(call: Any) -> None:
    """It returns, or raises an error of ours with one sentence in it."""
    try:
        call()
    except LlmcompError as error:
        assert str(error).strip() and "Traceback" not in str(error)


@MANY
@given(places, data)
@example([0, 0, 3], 10**30)
@example([0], [[]])
def test_recipes_with_anything_in_any_place(path: list[int], value: Any) -> None:
    import yaml

    changed = yaml.safe_dump(put(yaml.safe_load(RECIPE), path, value), allow_unicode=True)
    survives(lambda: check(Recipe.from_yaml(changed)))


@MANY
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")))
def test_texts_that_are_no_recipe(text: str) -> None:
    survives(lambda: Recipe.from_yaml(text))


@MANY
@given(places, data)
def test_configs_with_anything_in_any_place(path: list[int], value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        (where / "config.json").write_text(json.dumps(put(CONFIG | {"auto_map": {}, "dtype": "float32"}, path, value)))
        (where / "model.safetensors").write_bytes(shard(json.dumps(HEADER).encode(), 8))
        survives(lambda: Checkpoint.open(where))


@MANY
@given(st.binary(max_size=80))
def test_bytes_that_are_no_config(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        (where / "config.json").write_bytes(content)
        (where / "model.safetensors").write_bytes(shard(json.dumps(HEADER).encode(), 8))
        survives(lambda: Checkpoint.open(where))


@MANY
@given(places, data, st.integers(0, 24))
@example([0, 2, 1], -8, 8)
@example([0, 1, 0], -2, 8)
@example([0, 2, 1], 2**63, 8)
def test_headers_with_anything_in_any_place(path: list[int], value: Any, nbytes: int) -> None:
    header = json.dumps(put(HEADER, path, value)).encode()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        file.write_bytes(shard(header, nbytes))
        survives(lambda: read_shard(file))


@MANY
@given(st.integers(0, 2**64 - 1), st.binary(max_size=64))
@example(2**63, b"{}")
@example(2, b"[]")
def test_shards_that_lie_about_their_header(length: int, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        file.write_bytes(length.to_bytes(8, "little") + content)
        survives(lambda: read_shard(file))


@MANY
@given(data)
@example({"weight_map": {"a": "../outside.safetensors"}})
@example({"weight_map": {"a": "/etc/passwd"}})
def test_indices_with_anything_in_them(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "inside"
        where.mkdir()
        (Path(folder) / "outside.safetensors").write_bytes(shard(json.dumps(HEADER).encode(), 8))
        (where / "config.json").write_text(json.dumps(CONFIG))
        (where / "model.safetensors.index.json").write_text(json.dumps(value))
        with pytest.raises(LlmcompError):  # no file that an index may name is there
            Checkpoint.open(where)


@MANY
@given(st.sampled_from(["txt", "jsonl", "csv", "parquet", "safetensors"]), st.binary(max_size=200))
@example("jsonl", b'{"text": 3}\n{"text": null}\n')
@example("jsonl", b'{"text": "a"}\n[1]\n')
@example("csv", b'text,label\n"unclosed,1\n')
@example("txt", b"\xff\xfe\x00")
@example("safetensors", (2).to_bytes(8, "little") + b"{}")
def test_calibration_files_with_anything_in_them(kind: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"mine.{kind}"
        file.write_bytes(content)
        survives(lambda: read_texts(str(file)))


@MANY
@given(st.text(max_size=80))
def test_cards_with_anything_at_their_top(text: str) -> None:
    assert isinstance(front_matter(f"---\n{text}\n---\n"), dict)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "README.md").write_text(f"---\n{text}\n---\n", encoding="utf-8", errors="replace")
        assert origin_of(Path(folder)).repo is None


@MANY
@given(places, data)
@example([0], {"schema_version": 1})
def test_reports_with_anything_in_any_place(path: list[int], value: Any) -> None:
    report = Report(
        "quantize", "m", "m", "o", "now", Machine("cpu", 1, 1, "cpu", {}), "A", "causal-lm", {}, "dense", {},
        layers=[LayerReport("a", 0, "mlp", (1, 1), "int4", "rtn", 2, 1)], origin=Origin("a/b"),
        after=Measured(Size(1, 1, {}), 0.0), verification=Verification(True, [], None, 1), files={"a": "0"},
    )  # fmt: skip
    survives(lambda: Report.from_json(json.dumps(put(json.loads(report.to_json()), path, value))))


@MANY
@given(data)
def test_reports_that_are_none(value: Any) -> None:
    survives(lambda: Report.from_json(json.dumps(value)))


def shard(header: bytes, nbytes: int) -> bytes:
    """A safetensors file of this header and so many bytes of data."""
    return len(header).to_bytes(8, "little") + header + bytes(nbytes)
