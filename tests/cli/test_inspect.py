"""`llmcomp inspect`: real sizes of real files, what would be compressed, what not, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny import tiny
from typer.testing import CliRunner

from llmcomp.cli.inspect import inspect as verb
from llmcomp.errors import BadCheckpoint, ModelNotFound
from llmcomp.formats import FORMATS
from llmcomp.recipe import Override, QuantizeStep

app = typer.Typer()
app.command()(verb)


def as_json(path: Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, [str(path), "--json"])
    assert result.exception is None, result.exception
    return json.loads(result.stdout)


def as_text(path: Path) -> str:
    result = CliRunner().invoke(app, [str(path)], env={"COLUMNS": "150"})
    assert result.exception is None, result.exception
    assert "\x1b" not in result.stdout
    return result.stdout


def test_every_byte_of_the_files_is_accounted_for(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    found = as_json(tiny("llama-untied", tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    assert found["bytes_before"] == sum(tensor.nbytes for tensor in stored.values())
    assert found["parameters"] == sum(tensor.numel() for tensor in stored.values())
    for item in (*found["items"], *found["others"]):
        assert item["bytes_before"] == stored[f"{item['name']}.weight"].nbytes
        assert item["shape"] == list(stored[f"{item['name']}.weight"].shape)
    named = sum(item["bytes_before"] for item in (*found["items"], *found["others"]))
    assert found["rest"] == found["bytes_before"] - named
    assert found["rest"] == sum(tensor.nbytes for name, tensor in stored.items() if "norm" in name)


def test_stages_are_those_that_read_the_same(tmp_path: Path) -> None:
    found = as_json(tiny("llama", tmp_path))
    stages: dict[int, set[str]] = {}
    for item in found["items"]:
        if item["block"] == 0:
            stages.setdefault(item["stage"], set()).add(item["name"].rsplit(".", 1)[-1])
    assert list(stages.values()) == [
        {"q_proj", "k_proj", "v_proj"},
        {"o_proj"},
        {"gate_proj", "up_proj"},
        {"down_proj"},
    ]


def test_a_tied_head_costs_nothing_and_says_so(tmp_path: Path) -> None:
    found = as_json(tiny("llama", tmp_path))
    head = next(item for item in found["items"] if item["role"] == "head")
    assert head["bytes_before"] == head["bytes_after"] == 0
    assert "model.embed_tokens.weight" in head["reason"]
    assert found["ties"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head: head not targeted; shares its storage with model.embed_tokens.weight" in as_text(
        tmp_path
    )


def test_blocks_that_are_alike_are_shown_once(tmp_path: Path) -> None:
    text = as_text(tiny("llama-untied", tmp_path, num_hidden_layers=4))
    assert "Blocks 0–3 of model.layers, each" in text
    assert text.count("q_proj") == 1
    assert "28 of 30 matrices compressed" in text


def test_groups_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    found = as_json(tiny("llama", tmp_path, hidden_size=96, intermediate_size=100, num_attention_heads=4))
    by_name = {item["name"]: item for item in found["items"]}
    q, down = by_name["model.layers.0.self_attn.q_proj"], by_name["model.layers.0.mlp.down_proj"]
    assert q["scheme"] == "int4 g32"
    assert "128 does not divide its width 96" in q["reason"]
    assert down["scheme"] == "int4 channel"
    assert "128 does not divide its width 100" in down["reason"]
    assert f"mlp.down_proj: {down['reason']}" in as_text(tmp_path)


def test_classifiers_and_poolers_stay_and_say_why(tmp_path: Path) -> None:
    found = as_json(tiny("bert-classifier", tmp_path))
    others = {item["name"]: item for item in found["others"]}
    assert "classifier" in others["classifier"]["reason"]
    assert "pooler" in others["bert.pooler.dense"]["reason"]
    assert found["task"] == "sequence-classification"
    text = as_text(tmp_path)
    assert "classifier: classifier: its outputs are the answer itself" in text


def test_conv1d_shows_shapes_as_methods_see_them(tmp_path: Path) -> None:
    found = as_json(tiny("gpt2", tmp_path))
    attention = next(item for item in found["items"] if item["name"].endswith("attn.c_attn"))
    assert attention["shape"][0] == 3 * attention["shape"][1]
    assert any("Conv1D" in note for note in found["notes"])


def test_what_a_format_stores_dense_is_named(tmp_path: Path) -> None:
    from llmcomp.adapters.discover import discover, skeleton
    from llmcomp.checkpoint import Checkpoint, bind
    from llmcomp.report.structure import structure

    built = skeleton(tiny("gpt2", tmp_path))
    binding = bind(Checkpoint.open(tmp_path), built)
    step = QuantizeStep(
        targets=("attention", "mlp", "embeddings"), overrides=(Override("blocks:1", skip=True),)
    )
    found = structure(discover(built), binding, step, "compressed-tensors")
    embeddings = found.items[0]
    assert embeddings.scheme is None
    assert "Conv1D" in embeddings.reason
    skipped = [item for item in found.items if item.block == 1]
    assert all(item.scheme is None and "blocks:1" in item.reason for item in skipped)
    assert all(item.scheme for item in found.items if item.block == 0)
    assert found.bytes_after < found.bytes_before


def test_a_tie_that_ends_is_counted(tmp_path: Path) -> None:
    from llmcomp.adapters.discover import discover, skeleton
    from llmcomp.checkpoint import Checkpoint, bind
    from llmcomp.report.structure import structure

    built = skeleton(tiny("llama", tmp_path))
    binding = bind(Checkpoint.open(tmp_path), built)
    found = structure(discover(built), binding, QuantizeStep(targets=("embeddings",), bits=8))
    embeddings, head = found.items[0], found.items[-1]
    assert embeddings.scheme == "int8 g128"
    assert (head.bytes_before, head.bytes_after) == (0, embeddings.bytes_before)
    assert "no longer shares" in head.reason
    assert found.bytes_after - found.bytes_before == embeddings.bytes_after


def test_bytes_after_are_what_the_format_writes(tmp_path: Path) -> None:
    import torch

    from llmcomp.adapters.discover import discover, skeleton
    from llmcomp.schemes import Scheme
    from llmcomp.weights import QuantizedWeight

    found = as_json(tiny("llama", tmp_path, dtype=torch.bfloat16))
    by_name = {item["name"]: item for item in found["items"]}
    for ref in discover(skeleton(tmp_path)).blocks[0].linears:
        item = by_name[ref.name]
        group = int(item["scheme"].removeprefix("int4 g"))
        layout = FORMATS["compressed-tensors"]([(ref, Scheme(4, group))])
        values = torch.zeros(ref.out_features, ref.in_features, dtype=torch.int8)
        scale = torch.ones(ref.out_features, ref.in_features // group, dtype=torch.bfloat16)
        tensors = layout.tensors(ref, QuantizedWeight(values, scale, None, Scheme(4, group)))
        assert item["bytes_after"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("width", [80, 120])
def test_fits_the_width(tmp_path: Path, width: int) -> None:
    result = CliRunner().invoke(app, [str(tiny("roberta", tmp_path))], env={"COLUMNS": str(width)})
    assert max(map(len, result.stdout.splitlines())) <= width
    assert "roberta.embeddings.word_embeddings" in result.stdout


def test_unknown_and_compressed_models_are_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(tmp_path / "nothing-here")])
    assert isinstance(result.exception, ModelNotFound)
    config = json.loads((tiny("llama", tmp_path) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(app, [str(tmp_path), "--json"])
    assert isinstance(result.exception, BadCheckpoint)
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["lm", "minilm-sst2"])
def test_trained_models(assets: Path, name: str) -> None:
    found = as_json(assets / "models" / name)
    assert found["bytes_after"] < found["bytes_before"]
    assert sum(item["scheme"] is not None for item in found["items"]) >= 36
