"""Ranks: what saves nothing is refused, bytes are never overstepped, and no exchange of ranks lowers the loss."""

from __future__ import annotations

import doctest
from collections.abc import Mapping
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmcomp.errors import BadRecipe
from llmcomp.methods import rank_budget
from llmcomp.methods.rank_budget import Spectrum, allocate, balanced, check_rank, largest_rank, rank_for

sizes = st.integers(2, 700)
SHAPES = ((16, 16), (24, 8), (8, 40), (5, 7), (2, 3), (1, 9), (30, 30))


def made_up(shape: tuple[int, int], seed: int) -> Spectrum:
    """Falling as those of weights do, the larger the seed the slower."""
    generator = torch.Generator().manual_seed(seed)
    count = min(shape)
    falling = torch.exp(-torch.arange(count) / (1 + seed % 5)) * (1 + seed % 3)
    noise = 1 + 0.2 * torch.rand(count, generator=generator, dtype=torch.float64)
    return Spectrum((falling * noise).sort(descending=True).values, shape)


def cost(shape: tuple[int, int], rank: int | None) -> int:
    """Bytes in 16-bit numbers."""
    return 2 * (shape[0] * shape[1] if rank is None else rank * sum(shape))


def total(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int | None]) -> tuple[int, float]:
    """(bytes, loss)."""
    loss = sum(float(spectra[n].energies[r:].sum()) for n, r in ranks.items() if r is not None)
    return sum(cost(spectra[n].shape, r) for n, r in ranks.items()), loss


@given(st.integers(1, 999), sizes, sizes)
def test_a_rank_keeps_at_most_its_ratio_and_one_more_would_not(thousandths: int, rows: int, columns: int) -> None:
    ratio, whole = thousandths / 1000, rows * columns
    if largest_rank(rows, columns) < 1:
        with pytest.raises(BadRecipe, match="leave it dense"):
            rank_for(ratio, rows, columns)
        return
    rank = rank_for(ratio, rows, columns)
    kept = Fraction(thousandths, 1000) * whole
    assert rank == 1 or rank * (rows + columns) <= kept
    assert (rank + 1) * (rows + columns) > kept
    assert rank * (rows + columns) < whole
    check_rank(rank, rows, columns)
    with pytest.raises(BadRecipe):
        check_rank(largest_rank(rows, columns) + 1, rows, columns)


def test_a_rank_in_groups() -> None:
    assert rank_for(0.5, 2048, 5632, 64) == 704
    assert rank_for(0.02, 2048, 2048, 32) == 32
    with pytest.raises(BadRecipe, match=r"Rank 32 saves nothing on a matrix \[48, 48\]; take 1 to 23"):
        rank_for(0.5, 48, 48, 32)


@pytest.mark.parametrize("ratio", [0, -1, 1, 1.5, float("nan")])
def test_a_ratio_is_a_share(ratio: float) -> None:
    with pytest.raises(BadRecipe, match=r"share of bytes kept, above 0 and below 1, such as 0\.8"):
        rank_for(ratio, 64, 64)


@settings(max_examples=150, deadline=None)
@example(  # an exchange leaves room for one more
    [((16, 16), 2), ((16, 16), 13), ((16, 16), 22), ((8, 40), 2), ((8, 40), 3), ((5, 7), 0)], 0.921875, 1
)
@given(
    st.lists(st.tuples(st.sampled_from(SHAPES), st.integers(0, 50)), min_size=1, max_size=7),
    st.floats(0.05, 1.2),
    st.sampled_from((1, 1, 2, 3)),
)
def test_the_budget_holds_and_no_exchange_of_one_for_one_lowers_the_loss(
    made: list[tuple[tuple[int, int], int]], share: float, multiple: int
) -> None:
    spectra = {f"m{n}": made_up(shape, seed) for n, (shape, seed) in enumerate(made)}
    budget = int(share * sum(cost(shape, None) for shape, _ in made))
    try:
        ranks = allocate(spectra, budget, 2, multiple)
    except BadRecipe as refused:
        assert "smallest ranks" in str(refused)
        smallest = {
            name: multiple if largest_rank(*one.shape) >= multiple else None for name, one in spectra.items()
        }
        assert total(spectra, smallest)[0] > budget
        return
    spent, loss = total(spectra, ranks)
    assert spent <= budget
    for name, rank in ranks.items():
        largest = largest_rank(*spectra[name].shape)
        assert rank is None or (multiple <= rank <= largest and rank % multiple == 0)

    def more(name: str) -> int | None:
        rank = ranks[name]
        assert rank is not None
        return rank + multiple if rank + multiple <= largest_rank(*spectra[name].shape) else None

    def less(name: str) -> int:
        rank = ranks[name]
        return largest_rank(*spectra[name].shape) // multiple * multiple if rank is None else rank - multiple

    for taker in (name for name, rank in ranks.items() if rank is not None):
        assert total(spectra, {**ranks, taker: more(taker)})[0] > budget, "there was room for more"
        for giver in ranks:
            if giver == taker or less(giver) < multiple:
                continue
            moved = {**ranks, taker: more(taker), giver: less(giver)}
            assert total(spectra, moved)[0] > budget or total(spectra, moved)[1] >= loss * (1 - 1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=3), st.floats(0.2, 0.85))
def test_equal_shapes_get_the_best_ranks_that_there_are(seeds: list[int], share: float) -> None:
    """Against all combinations of ranks, where none is dense: with one price greedy is exact."""
    spectra = {f"m{n}": made_up((12, 20), seed) for n, seed in enumerate(seeds)}
    budget = int(share * len(seeds) * cost((12, 20), None))
    ranks = allocate(spectra, budget, 2)
    if None in ranks.values():
        return
    choices = (dict(zip(spectra, found, strict=True)) for found in product(range(1, 8), repeat=len(seeds)))
    best = min(loss for spent, loss in (total(spectra, found) for found in choices) if spent <= budget)
    assert total(spectra, ranks)[1] == pytest.approx(best)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8, 0.9])
def test_equals_get_equal_ranks(ratio: float) -> None:
    one = made_up((60, 90), 4)
    spectra = {f"m{n}": one for n in range(9)}
    found = allocate(spectra, int(ratio * 9 * cost((60, 90), None)), 2)
    wanted = rank_for(ratio, 60, 90)
    assert set(found.values()) <= {wanted, wanted + 1}


def test_what_compresses_badly_gets_more_and_with_bytes_enough_stays_dense() -> None:
    flat = Spectrum(torch.full((40,), 1.0, dtype=torch.float64), (40, 40))
    steep = Spectrum(torch.exp(-torch.arange(40, dtype=torch.float64)), (40, 40))
    whole = cost((40, 40), None)
    found = allocate({"flat": flat, "steep": steep}, int(0.8 * 2 * whole), 2)
    assert found["flat"] is None
    assert 5 < found["steep"] < 13
    assert allocate({"flat": flat, "steep": steep}, 2 * whole, 2) == {"flat": None, "steep": None}
    assert allocate({}, 100, 2) == {}


def test_balanced_matrices_lose_their_size_at_the_ratio_whatever_their_scale() -> None:
    one, other = made_up((60, 90), 4), made_up((60, 30), 7)
    for spectrum in (one, other):
        found = balanced(spectrum, 0.4)
        size = spectrum.shape[0] * spectrum.shape[1]
        assert float(found.energies[rank_for(0.4, *spectrum.shape) :].sum()) == pytest.approx(size)
        assert float(found.energies[3] / found.energies[9]) == pytest.approx(
            float(spectrum.energies[3] / spectrum.energies[9])
        )
    budget = int(0.4 * (cost((60, 90), None) + cost((60, 30), None)))
    louder = Spectrum(one.energies * 1000, one.shape)
    found = allocate({"one": balanced(one, 0.4), "other": balanced(other, 0.4)}, budget, 2)
    assert found == allocate({"one": balanced(louder, 0.4), "other": balanced(other, 0.4)}, budget, 2)
    row = made_up((1, 9), 0)
    assert balanced(row, 0.4) is row
    with pytest.raises(BadRecipe, match="share of bytes kept"):
        balanced(one, 1.2)


def test_what_gains_nothing_is_not_bought() -> None:
    energies = torch.zeros(30, dtype=torch.float64)
    energies[:4] = 1
    assert allocate({"a": Spectrum(energies, (30, 30))}, 10**6, 2) == {"a": 4}


def test_a_budget_below_the_smallest_ranks_is_refused() -> None:
    spectra = {"a": made_up((30, 30), 0), "row": made_up((1, 9), 0)}
    assert allocate(spectra, 120 + 18, 2) == {"a": 1, "row": None}
    with pytest.raises(BadRecipe, match=r"ranks of all 2 matrices take 138 numbers, more than the 137 allowed"):
        allocate(spectra, 137, 2)


def test_hundreds_of_matrices_take_no_time() -> None:
    spectra = {f"m{n}": made_up(((2048, 2048), (5632, 2048), (256, 2048))[n % 3], n) for n in range(300)}
    budget = int(0.8 * sum(cost(one.shape, None) for one in spectra.values()))
    found = allocate(spectra, budget, 2)
    assert total(spectra, found)[0] <= budget


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(rank_budget)
    assert result.attempted and not result.failed
