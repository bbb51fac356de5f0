"""Blocks hold the checkpoint's integers, and scales as float16, each weight checked against a slow decoder."""

from __future__ import annotations

import math
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import random_weight
from reference.gguf_float64 import decode_row

from llmcomp.exports import gguf_blocks
from llmcomp.schemes import BITS, GROUP_SIZES, Scheme
from llmcomp.weights import QuantizedWeight

SCHEMES = st.builds(Scheme, st.sampled_from(BITS), st.sampled_from((None, *GROUP_SIZES)), st.booleans())
DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))


def half(value: float) -> float:
    return float(np.float16(value))


@settings(max_examples=60, deadline=None)
@given(SCHEMES, st.integers(1, 3), st.sampled_from((128, 256)), DTYPES, st.integers(0, 10**6), st.integers(-9, 9))
def test_blocks_decode_to_the_integers(
    scheme: Scheme, rows: int, columns: int, dtype: torch.dtype, seed: int, exponent: int
) -> None:
    kind = gguf_blocks.kind_of(scheme, columns)
    if kind is None:
        assert scheme.bits == 8 and not scheme.symmetric
        return
    weight = random_weight((rows, columns), scheme, dtype, seed)
    weight = replace(weight, scale=weight.scale * 2.0**exponent)
    packed, rounding = gguf_blocks.pack(weight)
    assert packed.dtype == np.uint8 and packed.shape == (rows, gguf_blocks.row_bytes(kind, columns))
    groups, largest, changed, offset = scheme.groups(columns), 0.0, 0, 0.0
    for row in range(rows):
        found = decode_row(kind, packed[row].tobytes())
        for column in range(columns):
            group = column * groups // columns
            scale = float(weight.scale[row, group])
            zero = 0 if weight.zero_point is None else int(weight.zero_point[row, group])
            exact = (int(weight.values[row, column]) - zero) * half(scale)
            if kind == "Q4_1":
                lowest = (scheme.qmin - zero) * half(scale)
                exact = (int(weight.values[row, column]) - scheme.qmin) * half(scale) + half(lowest)
                offset = max(offset, abs(half(lowest) - lowest) / half(scale))
            assert found[column] == exact
        for scale in map(float, weight.scale[row]):
            changed += half(scale) != scale
            largest = max(largest, abs(half(scale) - scale) / scale)
    assert (rounding.scales, rounding.changed) == (rows * groups, changed)
    assert math.isclose(rounding.largest, largest) and math.isclose(rounding.offset, offset)
    # float16 has 11 bits, of which a scale or an offset loses half of the last one where it is not tiny.
    tiny = bool(weight.scale.float().min() < 2.0**-14)
    assert tiny or (rounding.largest <= 2.0**-11 and rounding.offset <= 15 * 2.0**-11)
    assert dtype != torch.float16 or rounding.changed == 0
    assert dtype != torch.bfloat16 or tiny or rounding.changed == 0


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 64, False), Scheme(8), Scheme(3, 128, False)], ids=str)
def test_the_gguf_package_decodes_the_same(scheme: Scheme) -> None:
    weight = random_weight((64, 256), scheme, torch.bfloat16)
    packed, _ = gguf_blocks.pack(weight)
    kind = gguf_blocks.kind_of(scheme, 256)
    assert kind is not None
    found = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
    wanted = np.array([decode_row(kind, row.tobytes()) for row in packed])
    assert np.allclose(found, wanted, rtol=1e-6, atol=1e-9)
    exact = replace(weight, scale=weight.scale.double()).dense().numpy()
    assert np.abs(found - exact).max() <= (15 * 2.0**-11 * float(weight.scale.max()) if kind == "Q4_1" else 0.0)


@pytest.mark.parametrize(
    ("scheme", "columns", "kind"),
    [
        (Scheme(4, 32), 64, "Q4_0"),
        (Scheme(4, None, False), 64, "Q4_1"),
        (Scheme(2, 32), 64, "Q4_0"),
        (Scheme(2, 32, False), 64, "Q4_0"),
        (Scheme(3, None, False), 96, "Q4_0"),
        (Scheme(8, 128), 128, "Q8_0"),
        (Scheme(8), 32, "Q8_0"),
        (Scheme(8, None, False), 64, None),
        (Scheme(8), 48, None),
        (Scheme(4), 33, None),
    ],
)
def test_which_kind_holds_what(scheme: Scheme, columns: int, kind: str | None) -> None:
    assert gguf_blocks.kind_of(scheme, columns) == kind


def test_scales_of_zeros_do_not_count() -> None:
    scheme = Scheme(4, 32)
    values = torch.zeros(1, 64, dtype=torch.int8)
    values[0, 40] = 3
    weight = QuantizedWeight(values, torch.tensor([[1e-30, 0.25]]), None, scheme)
    packed, rounding = gguf_blocks.pack(weight)
    assert rounding == gguf_blocks.Rounding(scales=1)
    assert sum(map(abs, decode_row("Q4_0", packed[0].tobytes()))) == 0.75


def test_a_scale_that_vanishes_is_told() -> None:
    weight = QuantizedWeight(torch.ones(1, 32, dtype=torch.int8), torch.tensor([[1e-9]]), None, Scheme(8))
    assert gguf_blocks.pack(weight)[1] == gguf_blocks.Rounding(1, 1, 1.0)


@pytest.mark.parametrize("scale", [1e6, float("nan"), float("inf")])
def test_a_scale_beyond_float16_is_refused(scale: float) -> None:
    weight = QuantizedWeight(torch.ones(1, 32, dtype=torch.int8), torch.tensor([[scale]]), None, Scheme(8))
    with pytest.raises(ValueError, match="float16"):
        gguf_blocks.pack(weight)


def test_what_no_block_holds_is_refused() -> None:
    weight = random_weight((2, 64), Scheme(8, None, False))
    with pytest.raises(ValueError, match="int8 channel asym"):
        gguf_blocks.pack(weight)
