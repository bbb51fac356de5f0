"""An ONNX graph as the benchmark times it: a decoder's past grows token by token, an encoder has none."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evals.peers.onnx_bench import Onnx
from llmcomp.errors import UserError
from llmcomp.measure.bench_process import Job

VOCABULARY, WIDTH = 8, 2
TABLE = np.random.default_rng(1).standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
HEAD = np.random.default_rng(2).standard_normal((WIDTH, VOCABULARY)).astype(np.float32)


def write(folder, decoder):
    """logits = TABLE[ids] @ HEAD; a decoder also appends TABLE[ids] to its past."""
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["rows"])]
    nodes.append(helper.make_node("MatMul", ["rows", "head"], ["logits"]))
    inputs, outputs = [ids], [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", 8])]
    weights = [numpy_helper.from_array(TABLE, "table"), numpy_helper.from_array(HEAD, "head")]
    if decoder:
        shape = ["batch", 1, "past", WIDTH]
        inputs.append(helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, shape))
        outputs.append(helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, ["batch", 1, "all", WIDTH]))
        weights.append(numpy_helper.from_array(np.array([1]), "one"))
        nodes.append(helper.make_node("Unsqueeze", ["rows", "one"], ["new"]))
        nodes.append(helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2))
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
    return Job(str(folder), 1, ((2, 3),), 4 if decoder else 0, 1)


def test_a_decoder_writes_the_most_probable_token_and_keeps_its_past(tmp_path):
    engine = Onnx(write(tmp_path, decoder=True))
    assert 0 < engine.load_seconds < engine.ready_seconds and engine.holding() is None
    prompt = engine.prompt(2, 3)
    assert prompt.shape == (2, 3) and prompt.max() < VOCABULARY
    engine.read(prompt)
    read = [prompt]
    for _ in range(4):
        expected = (TABLE[read[-1][:, -1:]].astype(np.float64) @ HEAD).argmax(-1)
        assert np.array_equal(engine.newest, expected)
        past = engine.past["past_key_values.0.key"].numpy()
        assert np.array_equal(past[:, 0], TABLE[np.concatenate(read, 1)])
        read.append(expected)
        engine.step()
    engine.read(prompt)  # afresh
    assert engine.past["past_key_values.0.key"].shape() == [2, 1, 3, WIDTH]


def test_an_encoder_has_no_past(tmp_path):
    engine = Onnx(write(tmp_path, decoder=False))
    engine.read(engine.prompt(2, 3))
    assert engine.past == {}


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match=r"onnxruntime cannot load .*model\.onnx: "):
        Onnx(Job(str(tmp_path), 1, ((1, 3),), 4, 1))
