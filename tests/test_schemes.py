"""Schemes: ranges, labels, groups, what cannot be; and the examples in their docstrings."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcomp import schemes
from llmcomp.errors import BadRecipe
from llmcomp.schemes import ACTIVATIONS, BITS, GROUP_SIZES, Scheme


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(schemes)
    assert result.attempted >= 3
    assert result.failed == 0


@pytest.mark.parametrize(("bits", "low", "high"), [(2, -2, 1), (3, -4, 3), (4, -8, 7), (8, -128, 127)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_are_signed_and_fill_their_bits(bits: int, low: int, high: int, symmetric: bool) -> None:
    scheme = Scheme(bits, None, symmetric)
    assert (scheme.qmin, scheme.qmax) == (low, high)
    assert scheme.qmax - scheme.qmin + 1 == 2**bits


@given(st.sampled_from(BITS), st.sampled_from((None, *GROUP_SIZES)), st.booleans(), st.integers(1, 4096))
def test_groups_cover_a_row_exactly_where_the_scheme_fits(
    bits: int, size: int | None, symmetric: bool, width: int
) -> None:
    scheme = Scheme(bits, size, symmetric)
    assert scheme.fits(width) == (size is None or width % size == 0)
    if scheme.fits(width):
        assert scheme.groups(width) * (size or width) == width


def test_labels_tell_all_schemes_apart() -> None:
    every = [Scheme(b, g, s) for b in BITS for g in (None, *GROUP_SIZES) for s in (True, False)]
    assert len({scheme.label for scheme in every}) == len(every)
    assert Scheme(4, 128, False).label == "int4 g128 asym"
    assert Scheme(8).label == "int8 channel"


@pytest.mark.parametrize("bits", [0, 1, 5, 16, -4])
def test_bits_that_cannot_be(bits: int) -> None:
    with pytest.raises(BadRecipe, match=f"--bits {bits} cannot be: choose one of 2, 3, 4, 8"):
        Scheme(bits)


@pytest.mark.parametrize("size", [0, 1, 16, 100, 256, -1])
def test_group_sizes_that_cannot_be(size: int) -> None:
    with pytest.raises(
        BadRecipe, match=f"--group-size {size} cannot be: choose one of 32, 64, 128 or 'channel'"
    ):
        Scheme(4, size)


def test_a_scheme_is_a_value() -> None:
    assert Scheme(4, 64) == Scheme(4, 64)
    assert len({Scheme(4, 64), Scheme(4, 64), Scheme(4, 32)}) == 2
    with pytest.raises(AttributeError):
        Scheme().bits = 8  # type: ignore[misc]


def test_rounded_activations_have_a_label_of_their_own() -> None:
    assert Scheme(8, activations="int8-dynamic").label == "int8 channel a8"
    assert Scheme(8, activations="int8-static").label == "int8 channel a8 static"


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "stored"),
    [(4, None, True, "int4 channel"), (8, 128, True, "int8 g128"), (8, None, False, "int8 channel asym")],
)
def test_activations_want_weights_of_8_bits_per_channel(
    bits: int, group_size: int | None, symmetric: bool, stored: str
) -> None:
    for way in ACTIVATIONS:
        said = f"{way} needs symmetric weights of 8 bits per channel, not {stored}; take --bits 8"
        with pytest.raises(BadRecipe, match=said):
            Scheme(bits, group_size, symmetric, way)


def test_activations_that_cannot_be() -> None:
    with pytest.raises(BadRecipe, match="int4 cannot be: it is one of int8-dynamic, int8-static, or left out"):
        Scheme(8, activations="int4")
