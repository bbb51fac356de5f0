"""Files that onnxruntime runs: against transformers with the decoded weights, by names, shapes, cache and integers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from checkpoints import bert, gpt2, linears, write
from packed_checkpoints import BY_ROW, GROUPED, dense_model, in_turn, logits_by_steps, packed, relative
from tiny import tiny
from torch import Tensor

from llmcomp.errors import UnknownArchitecture, VerificationFailed
from llmcomp.exports import onnx as onnx_export
from llmcomp.exports.packed_modules import MIDDLE
from llmcomp.formats.opening import Opened, open_checkpoint
from llmcomp.schemes import Scheme


@dataclass
class Exported:
    opened: Opened
    out: Path
    notes: list[str]

    @property
    def graph(self) -> Any:
        return onnx.load(self.out / "model.onnx").graph

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = onnxruntime.InferenceSession(self.out / "model.onnx", providers=["CPUExecutionProvider"])
        return dict(zip((o.name for o in session.get_outputs()), session.run(None, dict(inputs)), strict=True))


def export(opened: Opened, out: Path) -> Exported:
    out.mkdir()
    return Exported(opened, out, onnx_export.export(opened, out))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """One block of a Llama, all kinds of groups, packed embeddings with a tied head."""
    folder = tmp_path_factory.mktemp("decoder")
    source = tiny("llama", folder / "source", num_hidden_layers=1)
    schemes = {**in_turn(source, GROUPED), "model.embed_tokens": Scheme(4, 32, False)}
    return export(packed(source, folder / "packed", schemes), folder / "out")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """One block of a BERT classifier in bfloat16, one scale a row, written as if it were large."""
    folder = tmp_path_factory.mktemp("encoder")
    source = tiny("bert-classifier", folder / "source", num_hidden_layers=1, dtype=torch.bfloat16)
    opened = packed(source, folder / "packed", in_turn(source, BY_ROW))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "ONE_FILE", 1000)
        return export(opened, folder / "out")


def test_prompt_and_cached_steps_are_one_pass_of_transformers(decoder: Exported) -> None:
    ids = torch.randint(5, 500, (3, 13), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = dense_model(decoder.opened)(ids).logits
    found = logits_by_steps(decoder.run, decoder.opened, ids)
    assert relative(found, wanted) < 0.05  # onnxruntime rounds inputs to 8 bits


def test_what_a_decoder_is_called_with(decoder: Exported) -> None:
    graph = decoder.graph
    names = {
        one.name: [dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim]
        for one in (*graph.input, *graph.output)
    }
    past, present = ["batch_size", 2, "past_sequence_length", 32], names.pop("present.0.key")
    assert present == names.pop("present.0.value") and present[:2] == past[:2]
    assert names == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "past_key_values.0.key": past,
        "past_key_values.0.value": past,
        "logits": ["batch_size", "sequence_length", 512],
    }


def test_each_packed_linear_is_one_product_and_no_weight_is_dense(decoder: Exported) -> None:
    counts = Counter(node.op_type for node in decoder.graph.node)
    assert counts["MatMulNBits"] == 8  # seven of the block, and the head
    floats = [one for one in decoder.graph.initializer if one.data_type == onnx.TensorProto.FLOAT]
    assert max(np.prod(one.dims) for one in floats) <= 512 * 4  # scales; a weight has 128 × 64 at least
    bytes_of_512_rows = [one for one in decoder.graph.initializer if one.dims[:1] == [512] and len(one.dims) == 3]
    assert [one.name for one in bytes_of_512_rows] == ["model.lm_head.weight_packed"]  # the embeddings', as well


def test_the_very_integers_of_the_checkpoint(decoder: Exported, encoder: Exported) -> None:
    initializers = (*decoder.graph.initializer, *encoder.graph.initializer)
    held = {one.name: onnx.numpy_helper.to_array(one) for one in initializers}
    name = "model.layers.0.self_attn.q_proj"
    values = decoder.opened.weight(name).values.numpy() + 8
    low, high = held[f"model.{name}.weight_packed"] & 15, held[f"model.{name}.weight_packed"] >> 4
    np.testing.assert_array_equal(np.stack((low, high), -1).reshape(values.shape), values)
    name = "bert.encoder.layer.0.attention.self.query"
    shifted = held[f"model.{name}.weight_quantized"].astype(int) - MIDDLE
    np.testing.assert_array_equal(shifted.T, encoder.opened.weight(name).values.numpy())


def test_notes_say_what_was_made_and_how_far_it_is(decoder: Exported, encoder: Exported) -> None:
    text = "\n".join(decoder.notes)
    assert "Embeddings packed in 4 bits: 1." in text
    assert "Of them 1 hold 3 bits in the space of 4" in text
    assert "without rounded inputs they differ by" in text and "As it is, the file differs by" in text
    text = "\n".join(encoder.notes)
    assert "products of 8-bit integers, inputs rounded by token: 1." in text
    assert "inputs rounded by token, which the checkpoint leaves open: 2." in text
    assert "inputs rounded by the checkpoint's scales: 1." in text


def test_a_classifier_answers_as_transformers(encoder: Exported) -> None:
    generator = torch.Generator().manual_seed(3)
    model = dense_model(encoder.opened)
    found, wanted = [], []
    for rows, tokens in ((4, 9), (1, 33), (5, 2)):
        ids = torch.randint(5, 500, (rows, tokens), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        inputs["attention_mask"][0, tokens // 2 :] = 0
        with torch.no_grad():
            wanted.append(model(**inputs).logits)
        found.append(encoder.run({name: value.numpy() for name, value in inputs.items()})["logits"])
    assert relative(np.concatenate(found), torch.cat(wanted)) < 0.05


def test_a_row_does_not_depend_on_what_else_is_in_the_batch(encoder: Exported) -> None:
    ids = np.random.default_rng(0).integers(5, 500, (6, 12))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    together = encoder.run(inputs)["logits"]
    alone = [encoder.run({name: value[row : row + 1] for name, value in inputs.items()})["logits"] for row in range(6)]
    assert np.abs(together - np.concatenate(alone)).max() < 1e-5


def test_the_config_lies_beside_it_and_nothing_else(decoder: Exported, encoder: Exported) -> None:
    assert sorted(path.name for path in decoder.out.iterdir()) == ["config.json", "model.onnx"]
    config = json.loads((decoder.out / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama" and "quantization_config" not in config
    assert sorted(path.name for path in encoder.out.iterdir()) == ["config.json", "model.onnx", "model.onnx.data"]


def test_a_file_that_computes_something_else_is_an_error(decoder: Exported, tmp_path: Path) -> None:
    """The scales of one linear are a tenth too large."""
    model = onnx.load(decoder.out / "model.onnx")
    scales = next(one for one in model.graph.initializer if one.name.endswith("up_proj.weight_scale"))
    scales.raw_data = (onnx.numpy_helper.to_array(scales) * np.float32(1.1)).tobytes()
    onnx.save(model, tmp_path / "model.onnx")
    traced, signature = traced_model(decoder.opened)
    with pytest.raises(VerificationFailed, match="so nothing was written"):
        onnx_export._compared(traced, signature, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def traced_model(opened: Opened) -> tuple[Any, Any]:
    signature = onnx_export.signature_of(opened, "causal-lm")
    return onnx_export.build(opened, signature, "causal-lm", onnx_export.choose_fastest(False))[0], signature


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("t5", "T5ForConditionalGeneration is an encoder-decoder"),
        ("vit-classifier", "ViTForImageClassification reads pixel_values"),
        ("llava", "LlavaForConditionalGeneration reads images as well as text"),
        ("mixtral", "MixtralForCausalLM is a mixture of experts"),
        ("bloom", "BloomForCausalLM takes no position_ids"),
    ],
)
def test_models_that_are_neither_are_refused(name: str, words: str, tmp_path: Path) -> None:
    source, out = tiny(name, tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    with pytest.raises(UnknownArchitecture, match=words):
        onnx_export.export(open_checkpoint(source), out)
    assert not list(out.iterdir())


def test_a_state_that_is_no_cache_of_keys_is_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnknownArchitecture, match="MambaForCausalLM takes no position_ids"):
        onnx_export.export(open_checkpoint(tmp_path), tmp_path)


def test_what_torch_cannot_trace_is_one_sentence(
    decoder: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def branches(self: Any, **inputs: Any) -> Tensor:
        ids: Tensor = inputs["input_ids"]
        return ids if bool(ids.sum() > 3) else -ids

    traced, signature = traced_model(decoder.opened)
    monkeypatch.setattr(type(traced), "forward", branches)
    with pytest.raises(UnknownArchitecture, match="LlamaForCausalLM cannot be written as ONNX; torch's exporter says"):
        onnx_export.write(traced, signature, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


SLOW = [
    ("bert", {"bare": True}), ("bert", {}), ("roberta-classifier", {}), ("distilbert", {}), ("electra-classifier", {}),
    ("mpnet", {"bare": True}), ("modernbert-classifier", {}), ("llama-untied", {}), ("mistral", {}), ("qwen3", {}),
    ("gemma2", {}), ("phi3", {}), ("gptj", {}), ("opt", {}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), SLOW, ids=lambda value: value if isinstance(value, str) else "")
def test_families(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """What `export` itself compares is what is asked for here; it raises otherwise."""
    source = tiny(name, tmp_path / "source", **settings)
    exported = export(packed(source, tmp_path / "packed", in_turn(source, [*GROUPED, *BY_ROW])), tmp_path / "out")
    wanted = "last_hidden_state" if settings else "logits"
    assert exported.graph.output[0].name == wanted


@pytest.mark.slow
def test_what_onnxruntime_cannot_run_is_one_sentence(tmp_path: Path) -> None:
    source = tiny("falcon-alibi", tmp_path / "source")
    with pytest.raises(UnknownArchitecture, match=r"onnxruntime .* cannot run what torch's exporter makes of"):
        export(open_checkpoint(source), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "outputs"),
    [("QuestionAnswering", ["start_logits", "end_logits"]), ("TokenClassification", ["logits"])],
)
def test_answers_for_each_token(kind: str, outputs: list[str], tmp_path: Path) -> None:
    bert(kind=getattr(transformers, f"BertFor{kind}")).save_pretrained(tmp_path / "source")
    opened = packed(tmp_path / "source", tmp_path / "packed", in_turn(tmp_path / "source", [Scheme(8)]))
    graph = export(opened, tmp_path / "out").graph
    assert [one.name for one in graph.output] == outputs
    sizes = [dim.dim_param for dim in graph.output[0].type.tensor_type.shape.dim]
    assert sizes[:2] == ["batch_size", "sequence_length"]


@pytest.mark.slow
def test_conv1d_is_a_linear(tmp_path: Path) -> None:
    model = gpt2()
    written = write(tmp_path, model, {name: Scheme(4, 32) for name in linears(model)})
    exported = export(open_checkpoint(written.directory), tmp_path / "onnx")
    assert Counter(node.op_type for node in exported.graph.node)["MatMulNBits"] == len(linears(model))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lm", "minilm-sst2"])
def test_trained_models(model: str, assets: Path, tmp_path: Path) -> None:
    source = assets / "models" / model
    opened = packed(source, tmp_path / "packed", in_turn(source, [Scheme(4, 32), Scheme(8)]))
    exported = export(opened, tmp_path / "out")
    assert "As it is, the file differs by" in exported.notes[-1]
