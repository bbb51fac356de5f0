"""Patterns: what can be, what they are called, which masks hold them; and the examples in their docstrings."""

from __future__ import annotations

import doctest
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcomp import patterns
from llmcomp.errors import BadRecipe, RunError
from llmcomp.patterns import Pattern, check_mask, holds
from llmcomp.schemes import Scheme
from llmcomp.weights import QuantizedWeight, SparseWeight


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(patterns)
    assert result.attempted >= 3
    assert result.failed == 0


@given(st.integers(1, 40), st.integers(1, 40))
def test_any_n_of_m_says_what_it_removes(kept: int, more: int) -> None:
    pattern = Pattern.parse(f"{kept}:{kept + more}")
    assert pattern.sparsity == pytest.approx(more / (kept + more))
    assert pattern == Pattern.parse(pattern.label) == Pattern.parse(pattern.label, pattern.sparsity)
    assert 2**pattern.index_bits >= kept + more > 2 ** (pattern.index_bits - 1)
    assert pattern.fits(3 * (kept + more))
    assert not pattern.fits(3 * (kept + more) + 1)


def test_unstructured_patterns() -> None:
    assert Pattern.parse("unstructured").sparsity == 0.5
    assert Pattern.parse("unstructured", 0.655).label == "unstructured 65.5%"
    assert Pattern.parse("unstructured", 0.7).removes(10) == 7
    assert Pattern.parse("unstructured", 0.7).fits(7)


@pytest.mark.parametrize(
    ("text", "sparsity", "said"),
    [
        ("4:4", None, "--pattern 4:4 cannot be: N:M keeps N of every M weights, N at least 1 and"),
        ("0:4", None, "--pattern 0:4 cannot be: N:M keeps N"),
        ("8:4", None, "--pattern 8:4 cannot be: N:M keeps N"),
        ("2-4", None, "--pattern 2-4 cannot be: it is 2:4, 4:8, any other N:M, or unstructured."),
        ("-2:4", None, "--pattern -2:4 cannot be: it is"),
        ("unstructured", 0.0, "--sparsity 0.0 cannot be: it is a share between 0 and 1, such as 0.5."),
        ("unstructured", 1.0, "--sparsity 1.0 cannot be"),
        ("unstructured", float("nan"), "--sparsity nan cannot be"),
        ("2:4", 0.7, "--pattern 2:4 removes 0.5 of the weights, not --sparsity 0.7: leave --sparsity out"),
    ],
)
def test_what_cannot_be(text: str, sparsity: float | None, said: str) -> None:
    with pytest.raises(BadRecipe, match="^" + re.escape(said)):
        Pattern.parse(text, sparsity)


def test_a_width_that_does_not_divide() -> None:
    Pattern.parse("2:4").check_width(64)
    Pattern.parse("unstructured").check_width(7)
    said = "--pattern 2:4 does not fit lm_head of 30 inputs, which 4 does not divide: take a pattern whose M divides it"
    with pytest.raises(BadRecipe, match=said):
        Pattern.parse("2:4").check_width(30, "lm_head")


def test_masks_are_exact_or_an_error() -> None:
    pattern = Pattern.parse("2:4")
    mask = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    check_mask(pattern, mask)
    values = torch.ones(2, 8) * mask
    assert torch.equal(SparseWeight(values, mask, pattern).dense(), values)
    for wrong in (mask.logical_xor(torch.eye(2, 8).bool()), mask[:, :6], mask.roll(1, 1)):
        assert not holds(pattern, wrong)
        with pytest.raises(RunError, match="does not keep exactly 2 of every 4 weights"):
            SparseWeight(torch.zeros(wrong.shape), wrong, pattern)
    with pytest.raises(RunError, match="A weight that its mask removes is not zero"):
        SparseWeight(torch.ones(2, 8), mask, pattern)
    grid = torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 1), None, Scheme(4)
    with pytest.raises(RunError, match="A mask comes with its pattern"):
        QuantizedWeight(*grid, mask=mask)
    with pytest.raises(RunError, match="exactly 2 of every 4"):
        QuantizedWeight(*grid, pattern=pattern, mask=~mask.roll(1, 1))


def test_bytes_of_what_is_kept_and_where_it_stands() -> None:
    mask = torch.tensor([True, False, False, True]).repeat(6, 16)
    half = SparseWeight(torch.zeros(6, 64, dtype=torch.bfloat16), mask, Pattern.parse("2:4"))
    assert half.nbytes == 6 * 32 * 2 + 6 * 32 * 2 // 8
    eight = SparseWeight(half.values, mask, Pattern.parse("4:8"))
    assert eight.nbytes == 6 * 32 * 2 + 6 * 32 * 3 // 8
    loose = SparseWeight(half.values, mask, Pattern.parse("unstructured"))
    assert loose.nbytes == 6 * 64 * 2
    scale = torch.ones(6, 2, dtype=torch.bfloat16)
    packed = QuantizedWeight(torch.zeros(6, 64, dtype=torch.int8), scale, None, Scheme(4, 32))
    sparse = QuantizedWeight(packed.values, scale, None, packed.scheme, pattern=half.pattern, mask=mask)
    assert packed.nbytes == 6 * 64 // 2 + scale.nbytes
    assert sparse.nbytes == 6 * 32 // 2 + 6 * 32 * 2 // 8 + scale.nbytes


def test_rows_of_a_weight_keep_their_mask() -> None:
    mask = torch.tensor([[True, False], [False, True], [True, False]])
    weight = SparseWeight(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), mask, Pattern.parse("1:2"))
    assert torch.equal(weight.rows(1, 3).mask, mask[1:])
    assert weight.rows(1, 3).dense().tolist() == [[0.0, 2.0], [3.0, 0.0]]
    assert weight.rows(1, 3).shape == (2, 2)
