"""Structured pruning: scores against the error of an actual removal and refit, greedy choice against all choices."""

from __future__ import annotations

import doctest
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.layers import gram_of, inputs, stats_of, weights
from reference.low_rank import loss
from torch import Tensor

from llmcomp.errors import BadRecipe, NumericalError
from llmcomp.methods import structured
from llmcomp.methods.structured import (
    PruneConfig,
    choose,
    compensate,
    compensated_importance,
    head_units,
    importance,
    kept_count,
    magnitude,
    most_important,
    neuron_units,
    prune,
    prune_by_size,
    taylor_importance,
)


def widened(weight: Tensor, columns: Tensor, width: int) -> Tensor:
    """float64 [out, width], zero in the columns that are gone."""
    full = torch.zeros(weight.shape[0], width, dtype=torch.float64)
    full[:, columns] = weight.double()
    return full


def damped(gram: Tensor, share: float) -> Tensor:
    return gram + share * float(gram.diagonal().mean()) * torch.eye(len(gram), dtype=torch.float64)


def loss_without(weight: Tensor, gram: Tensor, gone: list[int], units: Tensor) -> float:
    """What remains after the best refit without these units, by NumPy's least squares on a root of G."""
    kept = [c for u in range(len(units)) if u not in gone for c in units[u].tolist()]
    values, vectors = np.linalg.eigh(gram.numpy())
    tokens = (vectors * np.sqrt(values.clip(min=0))).T  # as good as X
    outputs = tokens @ weight.double().numpy().T
    fitted = np.linalg.lstsq(tokens[:, kept], outputs, rcond=None)[0]
    return float(np.square(outputs - tokens[:, kept] @ fitted).sum())


units_of = {"neurons": neuron_units(24), "heads": head_units(24, 4), "groups": head_units(24, 4, 2)}


@pytest.mark.parametrize("name", list(units_of))
def test_scores_are_what_a_removal_costs_without_and_with_refit(name: str) -> None:
    units = units_of[name]
    x, weight = inputs(300, 24, 1), weights(16, 24, 1)
    gram = gram_of(x)
    plain, refitted = importance(weight, stats_of(x).gram, units), compensated_importance(weight, gram, units, 0.05)
    assert plain.dtype == refitted.dtype == torch.float64
    for u, columns in enumerate(units):
        dropped = weight.double().clone()
        dropped[:, columns] = 0
        assert float(plain[u]) == pytest.approx(loss(weight - dropped, gram), rel=1e-5)
        assert float(refitted[u]) == pytest.approx(loss_without(weight, damped(gram, 0.05), [u], units), rel=1e-6)
    assert bool((compensated_importance(weight, gram, units, 1e-9) < plain).all())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(2, 400), st.sampled_from((torch.float32, torch.bfloat16)))
def test_the_refit_is_least_squares_and_never_worse_than_dropping(seed: int, tokens: int, dtype: torch.dtype) -> None:
    x, weight = inputs(tokens, 40, seed), weights(24, 40, seed, dtype)
    gram = gram_of(x)
    kept = torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:30].sort().values
    found = compensate(weight, stats_of(x).gram, kept)
    assert found.dtype == dtype
    left = loss(weight - widened(found, kept, 40), gram)
    dropped = loss(weight - widened(weight[:, kept], kept, 40), gram)
    assert left <= dropped * (1 + 1e-6) + (2e-4 if dtype == torch.bfloat16 else 1e-9) * loss(weight, gram)
    if tokens >= 100 and dtype == torch.float32:
        exact = compensate(weight, gram, kept, 1e-12)
        gone = [c for c in range(40) if c not in kept.tolist()]
        best = loss_without(weight, gram, gone, neuron_units(40))
        assert loss(weight - widened(exact, kept, 40), gram) == pytest.approx(best, rel=1e-4)
        # and in the damped norm the damped one is the best
        regular = damped(gram, 0.01 * float(gram.diagonal()[kept].mean() / gram.diagonal().mean()))
        error = loss(weight - widened(found, kept, 40), regular)
        assert error == pytest.approx(loss_without(weight, regular, gone, neuron_units(40)), rel=1e-4)


def test_where_nothing_is_removed_or_was_ever_seen_nothing_moves() -> None:
    x, weight = inputs(200, 32, 2), weights(20, 32, 2)
    assert torch.equal(compensate(weight, stats_of(x).gram, torch.arange(32)), weight)
    kept = torch.arange(4, 32)
    assert torch.equal(compensate(weight, torch.zeros(32, 32), kept), weight[:, 4:])
    x[:, 7] = 0
    assert torch.equal(compensate(weight, stats_of(x).gram, kept)[:, 3], weight[:, 7])


def test_what_is_kept_may_stand_in_any_order() -> None:
    x, weight = inputs(200, 32, 3), weights(20, 32, 3)
    kept, gram = torch.tensor([9, 3, 30, 12, 1, 0]), stats_of(x).gram
    in_order = compensate(weight, gram, kept.sort().values)
    assert torch.allclose(compensate(weight, gram, kept)[:, kept.argsort()], in_order)


@pytest.mark.parametrize("rounds", [3, 16])
@pytest.mark.parametrize("name", list(units_of))
def test_greedy_choice_is_that_of_a_slow_loop(name: str, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer rounds than units go the loop is followed where the pool holds its choice."""
    monkeypatch.setattr(structured, "_ROUNDS", rounds)
    monkeypatch.setattr(structured, "_POOL", 100)
    units = units_of[name]
    x, weight = inputs(300, 24, 4), weights(16, 24, 4)
    gram, gone = damped(gram_of(x), 0.01), []
    for _ in range(len(units) // 2):
        left = [u for u in range(len(units)) if u not in gone]
        gone.append(min(left, key=lambda u: loss_without(weight, gram, [*gone, u], units)))
    kept = choose(weight, gram_of(x), units, len(units) - len(gone))
    assert kept.tolist() == sorted(set(range(len(units))) - set(gone))


def test_of_neurons_that_say_the_same_one_stays() -> None:
    """Each of a pair is worth nothing beside the other; dropped together, both would be missed."""
    x = inputs(500, 20, 5)
    x = torch.cat([x, x + 0.01 * inputs(500, 20, 6)], 1)
    weight = weights(30, 40, 5)
    gram = stats_of(x).gram
    kept = choose(weight, gram, neuron_units(40), 20, 1e-6)
    assert sorted(k % 20 for k in kept.tolist()) == list(range(20))
    at_once = most_important(compensated_importance(weight, gram, neuron_units(40), 1e-6), 20)
    assert len({k % 20 for k in at_once.tolist()}) < 20


def test_greedy_choice_beats_scores_at_once_and_any_choice_beats_none_refitted() -> None:
    x = inputs(1500, 40, 7) @ weights(40, 96, 9) + 0.1 * inputs(1500, 96, 8)
    weight = weights(64, 96, 7, torch.bfloat16)
    gram, units, keep = gram_of(x), neuron_units(96), 60

    def left(kept: Tensor, refit: bool = True) -> float:
        some = compensate(weight, gram, kept) if refit else weight[:, kept]
        return loss(weight.double() - widened(some, kept, 96), gram)

    greedy = left(choose(weight, gram, units, keep))
    by_refit = left(most_important(compensated_importance(weight, gram, units), keep))
    by_norm = left(most_important(importance(weight, gram, units), keep))
    unfitted = left(most_important(importance(weight, gram, units), keep), refit=False)
    random = left(torch.randperm(96, generator=torch.Generator().manual_seed(0))[:keep].sort().values)
    assert greedy < 0.85 * by_refit < 0.85 * 0.9 * by_norm
    assert by_norm < 0.5 * random < 0.5 * unfitted


def test_greedy_is_near_the_best_of_all_choices() -> None:
    x, weight = inputs(300, 32, 8), weights(16, 32, 8)
    units, gram = head_units(32, 4), damped(gram_of(x), 0.01)
    best = min(loss_without(weight, gram, list(gone), units) for gone in combinations(range(8), 3))
    kept = choose(weight, gram_of(x), units, 5).tolist()
    assert loss_without(weight, gram, [u for u in range(8) if u not in kept], units) < 1.1 * best


def test_singular_inputs_are_pruned_first() -> None:
    x, weight = inputs(10, 48, 9), weights(20, 48, 9)
    x[:, [3, 40]] = 0
    kept = choose(weight, stats_of(x).gram, neuron_units(48), 30)
    assert not {3, 40} & set(kept.tolist())
    assert choose(weight, torch.zeros(48, 48), neuron_units(48), 47).numel() == 47


def test_taylor_is_the_first_order_change_of_the_loss() -> None:
    x, weight = inputs(60, 24, 10), weights(16, 24, 10).double().requires_grad_()
    target, units = weights(60, 16, 11).double(), head_units(24, 6)

    def objective(w: Tensor, part: slice) -> Tensor:
        return (x[part].double() @ w.T - target[part]).square().sum()

    parts = (slice(0, 30), slice(30, 60))
    gradients = [torch.autograd.grad(objective(weight, part), weight)[0] for part in parts]
    found = taylor_importance(weight.detach(), gradients, units)
    for u, columns in enumerate(units):
        wanted = 0.0
        for part in parts:
            smaller = weight.detach().clone()
            smaller[:, columns] *= 1 - 1e-6
            wanted += float((objective(smaller, part) - objective(weight.detach(), part)) / 1e-6) ** 2
        assert float(found[u]) == pytest.approx(wanted, rel=1e-3)


@given(st.integers(1, 999), st.integers(2, 6000), st.sampled_from((1, 1, 8, 64)))
def test_the_same_number_is_left_everywhere(thousandths: int, units: int, multiple: int) -> None:
    fraction = thousandths / 1000
    try:
        left = kept_count(fraction, units, multiple)
    except BadRecipe as refused:
        assert -(-(units - thousandths * units // 1000) // multiple) * multiple >= units
        if "take at least 0" in str(refused):
            smallest = float(str(refused).split("take at least ")[1].rstrip("."))
            assert kept_count(smallest, units, multiple) < units
        return
    assert 0 < left < units
    assert left % multiple == 0
    assert left - multiple < units - fraction * units + 1e-9 <= left + 1


@pytest.mark.parametrize(
    ("ask", "error", "why"),
    [
        (lambda: head_units(100, 16), BadRecipe, "Heads of 16, 1 to a group, do not divide a width of 100"),
        (lambda: kept_count(1.0, 8), BadRecipe, "A fraction of 1.0 cannot be pruned: it must lie above 0 and below 1"),
        (lambda: kept_count(0.1, 4), BadRecipe, r"Pruning 0.1 of 4 units .* removes none; take at least 0\.3\."),
        (lambda: choose(torch.ones(2, 3), torch.full((3, 3), torch.nan), neuron_units(3), 1), NumericalError, "NaN"),
    ],
)
def test_what_cannot_be_is_one_sentence(ask: object, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        ask()  # type: ignore[operator]


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(structured)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("name", list(units_of))
def test_pruning_chooses_refits_and_states_the_error_that_is_left(name: str) -> None:
    units = units_of[name]
    x, weight = inputs(300, 24, 3), weights(16, 24, 3)
    gram, keep = gram_of(x), len(units) // 2
    found = prune(weight, gram, units, keep, PruneConfig(damping=0.02))
    assert torch.equal(found.kept, choose(weight, gram, units, keep, 0.02))
    columns = units[found.kept].flatten()
    assert torch.equal(found.weight, compensate(weight, gram, columns, 0.02))
    outputs = x.double() @ weight.double().T
    left = outputs - x.double()[:, columns] @ found.weight.double().T
    assert found.error == pytest.approx(float(left.square().sum() / outputs.square().sum()), rel=1e-9)
    plain = prune(weight, gram, units, keep, PruneConfig(compensate=False))
    assert torch.equal(plain.weight, weight[:, units[plain.kept].flatten()])
    assert (found.error or 0) < (plain.error or 0)


def test_a_float64_weight_is_left_as_it_was() -> None:
    weight = weights(8, 24, 4).double()
    before = weight.clone()
    prune(weight, gram_of(inputs(100, 24, 4)), neuron_units(24), 12)
    assert torch.equal(weight, before)


def test_the_smallest_go_by_all_weights_of_a_unit() -> None:
    """A unit that is large in one matrix and zero in another counts both."""
    output, rows = torch.tensor([[3.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    given_ = [(output, neuron_units(3)), (rows, neuron_units(3))]
    assert magnitude(given_).tolist() == [9.0, 4.0, 2.0]
    found = prune_by_size(given_, 2)
    assert found.kept.tolist() == [0, 1] and found.weight.tolist() == [[3.0, 0.0]] and found.error is None


@pytest.mark.parametrize("width", [8, 24, 384, 1000, 1024, 4096, 11008, 14336])
def test_what_stays_is_a_multiple_that_divides_the_width_and_misses_little(width: int) -> None:
    multiple = PruneConfig().multiple_of(width)
    assert width % multiple == 0 and multiple <= max(1, width / 8)
