"""pack and unpack are inverse, and lay bits as compressed-tensors does."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcomp import packing
from llmcomp.schemes import BITS


def integers(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    span = 1 << (bits - 1)
    return torch.randint(-span, span, (rows, columns), generator=generator, dtype=torch.int8)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 70), st.integers(1, 140), st.sampled_from(BITS), st.sampled_from((0, 1)))
def test_same_words_as_compressed_tensors(rows: int, columns: int, bits: int, dim: int) -> None:
    values = integers(rows, columns, bits)
    before = values.clone()
    packed = packing.pack(values, bits, dim)
    assert torch.equal(values, before)
    assert packed.is_contiguous()
    assert torch.equal(packed, pack_to_int32(values, bits, dim))
    assert packed.shape[dim] == packing.words(values.shape[dim], bits)
    assert torch.equal(packing.unpack(packed, bits, values.shape[dim], dim), values)
    assert torch.equal(unpack_from_int32(packed, bits, values.shape, dim), values)


@pytest.mark.parametrize("bits", BITS)
def test_extremes_survive(bits: int) -> None:
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    values = torch.tensor([[low, high] * 20, [high, low] * 20], dtype=torch.int8)
    assert torch.equal(packing.unpack(packing.pack(values, bits), bits, 40), values)


@pytest.mark.parametrize("bits", BITS)
def test_a_transposed_view_packs_like_its_copy(bits: int) -> None:
    values = integers(33, 50, bits).t()
    assert torch.equal(packing.pack(values, bits), packing.pack(values.contiguous(), bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 32, 128])
def test_a_single_column_packs_along_it(bits: int, rows: int) -> None:
    """Zero points of a per-channel scheme: a transposed column counts as contiguous with stride 1."""
    values = integers(rows, 1, bits)
    packed = packing.pack(values, bits, 0)
    assert torch.equal(packed, pack_to_int32(values, bits, 0))
    assert torch.equal(packing.unpack(packed, bits, rows, 0), values)


def test_words_wastes_less_than_one_word() -> None:
    assert [packing.words(5632, bits) for bits in BITS] == [352, 528, 704, 1408]
    assert packing.words(33, 3) == 4
