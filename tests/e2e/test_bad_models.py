"""Models that cannot be quantized: the right exit status, one sentence that says why, nothing half-written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_command import ONE_FILE, Command, edit_json, untouched
from e2e_runs import hashes
from safetensors.torch import load_file, save_file
from tiny import tiny

import llmcomp


def test_unknown_model(command: Command) -> None:
    said = command.refused(2, "no-such-org/no-such-model")
    assert "neither cached" in said and "sample:lm" in said
    assert untouched(command)


def test_unknown_path(command: Command, tmp_path: Path) -> None:
    assert "There is no directory" in command.refused(2, tmp_path / "nowhere")


def test_unknown_sample(command: Command) -> None:
    assert "sample:lm" in command.refused(2, "sample:nothing")


def test_empty_directory(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in command.refused(2, tmp_path / "empty")


def test_config_without_weights(command: Command, model: Path) -> None:
    (model / ONE_FILE).unlink()
    assert "has no weights" in command.refused(2, model)


def test_config_that_is_no_json(command: Command, model: Path) -> None:
    (model / "config.json").write_text("{ not json")
    assert "config.json" in command.refused(2, model)


def test_unknown_model_type(command: Command, model: Path) -> None:
    edit_json(model / "config.json", lambda config: config.update(model_type="nosuch"))
    assert "names no model type that transformers" in command.refused(2, model)


@pytest.mark.parametrize("keep", [4, 300, -5])
def test_truncated_weights(keep: int, command: Command, model: Path) -> None:
    weights = model / ONE_FILE
    weights.write_bytes(weights.read_bytes()[:keep])
    assert ONE_FILE in command.refused(2, model)
    assert untouched(command)


def test_corrupt_header(command: Command, model: Path) -> None:
    content = bytearray((model / ONE_FILE).read_bytes())
    content[8:40] = b"x" * 32
    (model / ONE_FILE).write_bytes(content)
    assert ONE_FILE in command.refused(2, model)


def test_missing_shard(command: Command, tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "sharded", tokenizer=True, shard="300KB")
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    assert shards[1].name in command.refused(2, model)


def test_index_pointing_outside(command: Command, tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "sharded", tokenizer=True, shard="300KB")
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.rename(tmp_path / "outside.safetensors")

    def outside(index: dict[str, Any]) -> None:
        table = index["weight_map"]
        table.update({key: "../outside.safetensors" for key, name in table.items() if name == shard.name})

    edit_json(model / "model.safetensors.index.json", outside)
    assert "../outside.safetensors" in command.refused(2, model)


def test_tensor_missing(command: Command, model: Path) -> None:
    tensors = load_file(model / ONE_FILE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / ONE_FILE, metadata={"format": "pt"})
    assert "up_proj" in command.refused(2, model)


def test_tensor_of_another_shape(command: Command, model: Path) -> None:
    tensors = load_file(model / ONE_FILE)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(8, 8)
    save_file(tensors, model / ONE_FILE, metadata={"format": "pt"})
    assert "up_proj" in command.refused(2, model)


def only_a_pickle(model: Path) -> None:
    torch.save(load_file(model / ONE_FILE), model / "pytorch_model.bin")
    (model / ONE_FILE).unlink()


def test_pickle_only(command: Command, model: Path) -> None:
    only_a_pickle(model)
    said = command.refused(2, model)
    assert "pytorch_model.bin" in said and "--allow-pickle" in said


def test_a_pickle_that_is_allowed(command: Command, model: Path, llama: Path) -> None:
    only_a_pickle(model)
    status, said = command.run(model, "--allow-pickle")
    assert status == 0, said
    other = Command(command.output.with_name("same"), command.text, command._captured)
    assert other.run(llama)[0] == 0
    assert hashes(other.output) == hashes(command.output)


def test_a_pickle_that_is_allowed_is_measured_too(model: Path, tmp_path: Path) -> None:
    only_a_pickle(model)
    found = llmcomp.quantize(str(model), method="rtn", allow_pickle=True, verify=False, output=tmp_path / "out")
    assert found.report.divergence is not None and found.report.divergence.kl_mean.value > 0


@pytest.mark.parametrize(
    "wants",
    [
        {"model_type": "mine", "architectures": ["MyModel"]},
        {"model_type": "mine"},
        {"architectures": ["MyModel"]},
    ],
    ids=["type and class", "type", "class"],
)
def test_remote_code_wanted(wants: dict[str, Any], command: Command, model: Path, tmp_path: Path) -> None:
    proof = tmp_path / "the-code-ran"
    (model / "modeling_mine.py").write_text(f"open({str(proof)!r}, 'w').close()\n")
    auto = {"AutoConfig": "modeling_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"}
    edit_json(model / "config.json", lambda config: config.update(wants, auto_map=auto))
    assert "--trust-remote-code" in command.refused(2, model)
    assert not proof.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, command: Command, model: Path) -> None:
    tensors = load_file(model / ONE_FILE)
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = value
    save_file(tensors, model / ONE_FILE, metadata={"format": "pt"})
    assert "model.layers.1.self_attn.v_proj.weight holds NaN or Inf" in command.refused(1, model)


def test_already_quantized(command: Command, model: Path, tmp_path: Path) -> None:
    first = Command(tmp_path / "first", command.text, command._captured)
    assert first.run(model)[0] == 0
    assert "quantized" in command.refused(2, first.output)


def test_without_a_tokenizer(command: Command, model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert "tokenizer" in command.refused(2, model)


def test_blocks_that_cannot_be_found(command: Command, tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_channels=3)
    ResNetModel(config).save_pretrained(tmp_path / "resnet")
    assert "ResNetModel" in command.refused(2, tmp_path / "resnet")
