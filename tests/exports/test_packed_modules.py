"""The arrays of MatMulNBits and the modules that stand for them, against slow float64 versions."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from checkpoints import rtn
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from llmcomp.exports.packed_modules import (
    AS_STORED,
    DECODED,
    TRACE,
    Blocks,
    NBitsEmbedding,
    NBitsLinear,
    RoundedLinear,
    blocks_of,
)
from llmcomp.schemes import INT8_DYNAMIC, INT8_STATIC, Scheme
from llmcomp.weights import QuantizedWeight

SCHEMES = [
    Scheme(bits, group, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (None, 32, 128)
    for symmetric in (True, False)
]


def weight_of(scheme: Scheme, rows: int, columns: int, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    return rtn(torch.randn(rows, columns, generator=generator), scheme)


def slow_dense(weight: QuantizedWeight) -> np.ndarray:
    """float64 [out, in], one weight at a time."""
    rows, columns = weight.shape
    size = columns // weight.scale.shape[1]
    found = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            group = column // size
            zero = 0 if weight.zero_point is None else int(weight.zero_point[row, group])
            found[row, column] = (int(weight.values[row, column]) - zero) * float(weight.scale[row, group])
    return found


def slow_decode(blocks: Blocks, columns: int) -> np.ndarray:
    """What ONNX Runtime's documentation says that the arrays mean, one weight at a time."""
    rows, count, _ = blocks.packed.shape
    mask = (1 << blocks.bits) - 1
    found = np.zeros((rows, count * blocks.block))
    for row in range(rows):
        for block in range(count):
            zero = 1 << (blocks.bits - 1)
            if blocks.zeros is not None:
                at = block * blocks.bits
                zero = (int(blocks.zeros[row, at // 8]) >> (at % 8)) & mask
            for place in range(blocks.block):
                at = place * blocks.bits
                value = (int(blocks.packed[row, block, at // 8]) >> (at % 8)) & mask
                found[row, block * blocks.block + place] = (value - zero) * float(blocks.scales[row, block])
    assert not found[:, columns:].any(), "what fills up the last block must be zero"
    return found[:, :columns]


def nbits_product(weight: QuantizedWeight, inputs: np.ndarray) -> np.ndarray:
    """onnxruntime's own MatMulNBits in float32."""
    blocks, (rows, columns) = blocks_of(weight), weight.shape
    arrays = {"w": blocks.packed, "s": blocks.scales} | ({} if blocks.zeros is None else {"z": blocks.zeros})
    node = helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft", K=columns, N=rows, bits=blocks.bits,
        block_size=blocks.block,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in arrays.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    session = onnxruntime.InferenceSession(
        helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    return session.run(None, {"x": inputs})[0]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_onnxruntime_multiplies_by_our_integers(scheme: Scheme) -> None:
    weight = weight_of(scheme, 6, 256)
    inputs = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    wanted = inputs.astype(np.float64) @ slow_dense(weight).T
    assert np.abs(nbits_product(weight, inputs) - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("columns", [16, 48, 80, 100, 130])
@pytest.mark.parametrize("scheme", [Scheme(4), Scheme(2, None, False), Scheme(8, None, False)], ids=lambda s: s.label)
def test_rows_of_any_width_with_one_scale(columns: int, scheme: Scheme) -> None:
    weight = weight_of(scheme, 4, columns)
    inputs = np.random.default_rng(0).standard_normal((2, columns)).astype(np.float32)
    wanted = inputs.astype(np.float64) @ slow_dense(weight).T
    assert np.abs(nbits_product(weight, inputs) - wanted).max() < 1e-5 * np.abs(wanted).max()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from((2, 3, 4, 8)), st.booleans(), st.sampled_from((None, 32, 64)), st.integers(1, 5),
    st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_arrays_hold_the_very_integers(
    bits: int, symmetric: bool, group: int | None, rows: int, count: int, seed: int
) -> None:
    columns = count * (group or 23)
    weight = weight_of(Scheme(bits, group, symmetric), rows, columns, seed)
    np.testing.assert_array_equal(slow_decode(blocks_of(weight), columns), slow_dense(weight))


def rounded_slowly(inputs: np.ndarray, scale: float | None) -> np.ndarray:
    """Each token in steps of its largest entry / 127.5, or of `scale`; float64."""
    found = np.zeros(inputs.shape)
    for token in range(len(inputs)):
        step = np.float32(scale or np.float32(np.abs(inputs[token]).max()) / np.float32(127.5))
        for column, value in enumerate(inputs[token]):
            found[token, column] = min(max(np.rint(np.float32(value) / step), -128), 127) * np.float64(step)
    return found


@pytest.mark.parametrize(("activations", "scale"), [(INT8_DYNAMIC, None), (INT8_STATIC, 0.01)])
def test_inputs_are_rounded_as_the_scheme_says(activations: str, scale: float | None) -> None:
    made = weight_of(Scheme(8, activations=activations), 5, 32)
    weight = QuantizedWeight(
        made.values, made.scale, None, made.scheme, None if scale is None else torch.tensor([scale])
    )
    linear = RoundedLinear(lambda: weight, torch.arange(5.0))
    inputs = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    tokens = inputs.reshape(6, 32).numpy()
    for mode, rounded in ((AS_STORED, rounded_slowly(tokens, scale)), (DECODED, tokens.astype(np.float64))):
        linear.mode = mode
        wanted = rounded @ slow_dense(weight).T + np.arange(5)
        assert np.abs(linear(inputs).reshape(6, 5).numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_weights_alone_leave_inputs_as_they_are() -> None:
    linear = RoundedLinear(lambda: weight_of(Scheme(8), 5, 32), None)
    inputs = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    linear.mode = AS_STORED
    stored = linear(inputs)
    linear.mode = DECODED
    assert torch.equal(stored, linear(inputs))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_rows_of_embeddings_are_decoded(scheme: Scheme) -> None:
    weight = weight_of(scheme, 7, 128)
    embedding = NBitsEmbedding(lambda: weight)
    ids = torch.tensor([[0, 6, 3], [3, 1, 1]])
    wanted = slow_dense(weight)[ids.numpy()]
    for mode in (TRACE, AS_STORED):
        embedding.mode = mode
        np.testing.assert_allclose(embedding(ids).numpy(), wanted, rtol=1e-6)


def test_a_head_shares_the_arrays_of_its_embeddings() -> None:
    weight = weight_of(Scheme(4, 32, False), 8, 64)
    embedding = NBitsEmbedding(lambda: weight)
    head = NBitsLinear(lambda: weight, None, embedding.blocks)
    assert head.weight_packed.data_ptr() == embedding.weight_packed.data_ptr()


def test_the_nodes_of_a_rounded_linear_saturate_nowhere() -> None:
    """uint8 with int8 overflows 16 bits on CPUs with AVX2 alone; uint8 with uint8 must not, at full range."""
    weight = QuantizedWeight(torch.full((4, 256), 127, dtype=torch.int8), torch.ones(4, 1), None, Scheme(8))
    linear = RoundedLinear(lambda: weight, None)
    factors = {"w": linear.weight_quantized, "a": linear.input_zero_point, "z": linear.weight_zero_point}
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "a", "z"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 256])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, 4])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in factors.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": np.full((1, 256), 255, dtype=np.uint8)})[0]
    assert (found == 127 * 127 * 256).all()
