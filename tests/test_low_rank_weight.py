"""LowRankWeight shows itself dense by the arithmetic that it states, and knows its bytes."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from reference.layers import weights

from llmcomp.methods.rtn import rtn
from llmcomp.schemes import Scheme
from llmcomp.weights import LowRankWeight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_dense_is_the_exact_sum_rounded_once(dtype: torch.dtype, with_base: bool, quantized: bool) -> None:
    left, right = weights(7, 32, 1, dtype), weights(32, 11, 2, dtype)
    base = rtn(weights(7, 11, 3), None, Scheme(4), dtype).weight if with_base else None
    if quantized:
        four = rtn(left.float(), None, Scheme(4, 32), dtype).weight
        held = LowRankWeight(four, rtn(right.float(), None, Scheme(8), dtype).weight, base)
    else:
        held = LowRankWeight(left, right, base)
    first, second = held.factors()
    under = torch.zeros(7, 11, dtype=dtype) if base is None else base.dense()
    dense = held.dense()
    assert dense.dtype == first.dtype == second.dtype == held.dtype == dtype
    for row in range(7):
        for column in range(11):
            terms = zip(first[row].tolist(), second[:, column].tolist(), strict=True)
            exact = sum((Fraction(a) * Fraction(b) for a, b in terms), Fraction(float(under[row, column])))
            found = Fraction(float(dense[row, column]))
            for toward in (-torch.inf, torch.inf):  # no other number of the dtype is nearer
                other = torch.nextafter(dense[row, column], torch.tensor(toward, dtype=dtype))
                assert abs(found - exact) <= abs(Fraction(float(other)) - exact)


def test_threads_and_shapes_change_no_bit_of_sixteen() -> None:
    left, right = weights(1500, 64, 4, torch.bfloat16), weights(64, 96, 5, torch.bfloat16)
    whole = LowRankWeight(left, right).dense()
    assert torch.equal(whole[1400:1407], LowRankWeight(left[1400:1407], right).dense())
    backwards = torch.arange(63, -1, -1)
    assert torch.equal(whole, LowRankWeight(left[:, backwards], right[backwards]).dense())


def test_shape_rank_and_bytes() -> None:
    left, right = weights(40, 8, 6, torch.bfloat16), weights(8, 64, 7, torch.bfloat16)
    held = LowRankWeight(left, right)
    assert (held.shape, held.rank, held.nbytes) == (torch.Size((40, 64)), 8, 2 * 8 * (40 + 64))
    four, eight = rtn(right.float(), None, Scheme(4, 32), torch.bfloat16).weight, Scheme(8)
    base = rtn(weights(40, 64, 8), None, Scheme(4), torch.bfloat16).weight
    nested = LowRankWeight(rtn(left.float(), None, eight, torch.bfloat16).weight, four, base)
    assert (nested.shape, nested.rank) == (held.shape, 8)
    assert nested.nbytes == (40 * 8 + 2 * 40) + (8 * 32 + 2 * 8 * 2) + (40 * 32 + 2 * 40)
