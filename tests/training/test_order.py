"""Samples of like length read together: every one once an epoch, the same for a seed and an epoch, less padding."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmcomp.training.order import GroupedByLength


def drawn(lengths: list[int], step: int, seed: int = 0, epoch: int = 0) -> list[int]:
    order = GroupedByLength(lengths, step, seed)
    order.set_epoch(epoch)
    return list(order)


@given(st.lists(st.integers(1, 60), min_size=1), st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 9))
def test_every_sample_comes_once_and_the_longest_first(lengths: list[int], step: int, seed: int, epoch: int) -> None:
    found = drawn(lengths, step, seed, epoch)
    assert sorted(found) == list(range(len(lengths)))
    assert found == drawn(lengths, step, seed, epoch)
    whole = found[: len(found) // step * step]
    if whole:
        assert max(lengths[number] for number in whole[:step]) == max(lengths[number] for number in whole)


@given(st.integers(0, 2**31), st.integers(1, 16))
def test_a_step_is_a_run_of_the_sorted_window(seed: int, step: int) -> None:
    """Within one window no sample's length lies between those of a step that it is not in."""
    lengths = np.random.default_rng(seed).permutation(50 * step).tolist()
    found = drawn(lengths, step, seed)
    for start in range(0, len(found), step):
        inside = [lengths[number] for number in found[start : start + step]]
        assert max(inside) - min(inside) == step - 1


def test_little_is_padding() -> None:
    lengths = np.random.default_rng(0).geometric(0.08, 2000).tolist()

    def tokens(order: list[int]) -> int:
        return sum(16 * max(lengths[one] for one in order[start : start + 16]) for start in range(0, 2000, 16))

    assert tokens(drawn(lengths, 16)) < 1.15 * sum(lengths)
    assert tokens(list(range(2000))) > 2 * sum(lengths)


def test_seeds_and_epochs_differ() -> None:
    lengths = [3] * 40
    assert len({tuple(drawn(lengths, 4, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
