"""QuantizedWeight decodes as compressed-tensors decodes, bit for bit, and knows its bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcomp import packing
from llmcomp.errors import RunError
from llmcomp.patterns import Pattern
from llmcomp.schemes import BITS, Scheme
from llmcomp.weights import QuantizedWeight


def random_weight(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype, seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, scheme.groups(columns))
    low, high = scheme.qmin, scheme.qmax + 1
    values = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand(shape, generator=generator) * 0.1 + 1e-4).to(dtype)
    zero = torch.randint(low, high, shape, generator=generator, dtype=torch.int8)
    return QuantizedWeight(values, scale, None if scheme.symmetric else zero, scheme)


def decoded_by_compressed_tensors(weight: QuantizedWeight) -> torch.Tensor:
    scheme = weight.scheme
    args = QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy="channel" if scheme.group_size is None else "group",
        group_size=scheme.group_size,
    )
    state = {
        "weight_packed": packing.pack(weight.values, scheme.bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.values.shape),
    }
    if weight.zero_point is not None:
        state["weight_zero_point"] = packing.pack(weight.zero_point, scheme.bits, 0)
    decoder = BaseCompressor.get_value_from_registry("pack-quantized")
    return decoder.decompress(state, QuantizationScheme(targets=["Linear"], weights=args))["weight"]


dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
schemes = st.builds(Scheme, st.sampled_from(BITS), st.sampled_from((None, 32, 64, 128)), st.booleans())


@settings(max_examples=80, deadline=None)
@given(schemes, st.integers(1, 40), st.integers(1, 3), st.integers(0, 99), dtypes)
def test_dense_is_what_the_reader_decodes(
    scheme: Scheme, rows: int, groups: int, seed: int, dtype: torch.dtype
) -> None:
    weight = random_weight(scheme, rows, groups * (scheme.group_size or 37), dtype, seed)
    dense, theirs = weight.dense(), decoded_by_compressed_tensors(weight)
    assert dense.dtype == theirs.dtype == dtype
    assert torch.equal(dense.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("bits", BITS)
def test_nbytes_are_those_of_the_packed_tensors(bits: int) -> None:
    weight = random_weight(Scheme(bits, 32, False), 24, 96, torch.bfloat16, 0)
    packed = packing.pack(weight.values, bits).nbytes + packing.pack(weight.zero_point, bits, 0).nbytes
    assert weight.nbytes == packed + weight.scale.nbytes


def test_a_removed_weight_is_zero_or_it_is_an_error() -> None:
    mask = torch.tensor([[True, True, False, False]])
    zero = torch.tensor([[3]], dtype=torch.int8)
    held = QuantizedWeight(
        torch.tensor([[7, -8, 3, 3]], dtype=torch.int8), torch.ones(1, 1), zero, Scheme(4, None, False), None,
        Pattern.parse("2:4"), mask,
    )  # fmt: skip
    assert held.dense().tolist() == [[4.0, -11.0, 0.0, 0.0]]
    with pytest.raises(RunError, match="not zero"):
        replace(held, zero_point=torch.zeros_like(zero))
