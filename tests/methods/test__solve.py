"""The factor and the sweep against float64: R R' = H + shift, the same integers as textbook GPTQ and QuIP."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gptq as reference
from reference.gptq import StaticGrid
from reference.layers import gram_of, inputs, weights
from torch import Tensor

from llmcomp.methods._grid import search_grid
from llmcomp.methods._solve import Factor, factorize, permute_symmetric_, row_quadratics, sweep
from llmcomp.schemes import Scheme
from llmcomp.weights import dequantize

SIZES = (1, 31, 128, 129, 513, 700)


def gram(size: int, seed: int = 0, tokens: int | None = None) -> Tensor:
    """float32 X'X of a layer's inputs, exactly symmetric."""
    x = inputs(tokens or 2 * size + 8, size, seed, spread=0.5).double()
    return (x.T @ x).float()


def random_order(size: int, seed: int = 0) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def product(factor: Factor) -> Tensor:
    upper = factor.upper.double().triu()
    return upper @ upper.T


def shifted(matrix: Tensor, factor: Factor) -> Tensor:
    """H + shift in the factor's order, float64."""
    H = matrix.double()[factor.order][:, factor.order]
    return H + factor.shift * torch.eye(len(H), dtype=torch.float64)


def assert_factor_of(factor: Factor | None, matrix: Tensor) -> Factor:
    """R R' is H + shift, each entry to float32's accuracy relative to its row's and column's size."""
    assert factor is not None
    wanted = shifted(matrix, factor)
    size = wanted.diagonal().sqrt()
    assert float(((product(factor) - wanted) / torch.outer(size, size)).abs().max()) < 5e-6
    assert bool((factor.upper.diagonal() > 0).all())
    return factor


# --- the factor ---


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("permuted", [False, True])
def test_the_factor_times_itself_is_the_damped_matrix(size: int, permuted: bool) -> None:
    H = gram(size)
    order = random_order(size) if permuted else None
    factor = assert_factor_of(factorize(H.clone(), 0.01, order), H)
    assert torch.equal(factor.order, torch.arange(size) if order is None else order)
    assert factor.damping == 0.01
    assert factor.shift == pytest.approx(0.01 * float(H.double().diagonal().mean()), rel=1e-6)
    assert torch.equal(factor.pivots, factor.upper.diagonal() ** 2)


def test_it_takes_the_place_of_the_matrix() -> None:
    H = gram(129)
    factor = factorize(H, 0.01)
    assert factor is not None
    assert factor.upper.data_ptr() == H.data_ptr()


@pytest.mark.parametrize("dead", [1, 60, 127])
def test_dead_columns_get_the_damping_as_pivot_and_touch_nothing(dead: int) -> None:
    H = gram(128)
    columns = random_order(128, 3)[:dead]
    H[columns] = 0
    H[:, columns] = 0
    factor = assert_factor_of(factorize(H.clone(), 0.01), H)
    assert torch.allclose(factor.pivots[columns], torch.tensor(factor.shift), rtol=1e-4)
    coupling = factor.upper.triu(1)
    assert float(coupling[columns].abs().max()) == float(coupling[:, columns].abs().max()) == 0


@pytest.mark.parametrize("size", [64, 300, 512, 640, 700])
def test_with_fewer_tokens_than_columns_damping_grows_until_it_holds(size: int) -> None:
    H = gram(size, tokens=8)
    factor = assert_factor_of(factorize(H.clone(), 1e-10), H)
    assert factor.damping > 1e-10
    assert factor.damping < 1e-3  # and no further than the matrix needs
    steps = torch.tensor(factor.damping / 1e-10, dtype=torch.float64).log10()
    assert float(steps) == pytest.approx(round(float(steps)), abs=1e-9)
    assert assert_factor_of(factorize(H.clone(), 0.01), H).damping == 0.01


def slightly_indefinite(size: int) -> Tensor:
    """Smallest eigenvalue near -0.05 of the mean diagonal, in the rows that are factorized last."""
    H = gram(size)
    H /= H.diagonal().sqrt().outer(H.diagonal().sqrt()).clone()
    H[:2, 2:] *= 0.01
    H[2:, :2] *= 0.01
    H[:2, :2] = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    return H


@pytest.mark.parametrize("size", [2, 130, 640, 513, 1100])
def test_a_second_try_starts_from_the_restored_matrix(size: int) -> None:
    H = slightly_indefinite(size)
    second = assert_factor_of(factorize(H.clone(), 0.01), H)
    assert second.damping == pytest.approx(0.1)
    fresh = factorize(H.clone(), second.damping)
    assert fresh is not None
    assert torch.equal(second.upper.triu(), fresh.upper.triu())
    order = random_order(size, 1)
    permuted, fresh = factorize(H.clone(), 0.01, order), factorize(H.clone(), second.damping, order)
    assert permuted is not None
    assert fresh is not None
    assert torch.equal(permuted.upper.triu(), fresh.upper.triu())


@pytest.mark.parametrize("size", [2, 129, 600])
def test_an_indefinite_matrix_has_no_factor(size: int) -> None:
    H = torch.eye(size)
    H[0, 1] = H[1, 0] = 3.0
    assert factorize(H, 0.01) is None


def test_a_matrix_of_zeros_has_no_factor() -> None:
    assert factorize(torch.zeros(40, 40), 0.01) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40).flatmap(lambda n: st.permutations(range(n))), st.integers(0, 99))
def test_permuting_in_place_is_indexing_twice(order: list[int], seed: int) -> None:
    A = torch.randn(len(order), len(order), generator=torch.Generator().manual_seed(seed))
    A = A + A.T
    wanted = A[order][:, order]
    permute_symmetric_(A, torch.tensor(order))
    assert torch.equal(A, wanted)


@pytest.mark.parametrize("size", [512, 700, 1025])
def test_permuting_in_place_across_tiles(size: int) -> None:
    A, order = gram(size), random_order(size, 2)
    wanted = A[order][:, order]
    permute_symmetric_(A, order)
    assert torch.equal(A, wanted)


@pytest.mark.parametrize("size", SIZES)
def test_row_quadratics_are_the_undamped_loss(size: int) -> None:
    H, order = gram(size), random_order(size, 5)
    factor = factorize(H.clone(), 0.01, order)
    assert factor is not None
    rows = torch.randn(7, size, generator=torch.Generator().manual_seed(6))
    found = row_quadratics(factor, rows[:, order].t().contiguous())
    wanted = torch.stack([r @ H.double() @ r for r in rows.double()])
    assert found.dtype == torch.float64
    assert torch.allclose(found, wanted, rtol=2e-5)


# --- the sweep ---


def grid_of(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> StaticGrid:
    grid = search_grid(weight, scheme, dtype, None, (0.9,), 0)  # clips, as searched grids do
    return StaticGrid(grid.scale, grid.zero_point, scheme)


def swept(weight: Tensor, factor: Factor, grid: StaticGrid) -> tuple[Tensor, Tensor]:
    """(integers [rows, in], error [rows, in]) by `sweep`, in the weight's own order of columns."""
    columns, size = weight.shape[1], weight.shape[1] // grid.scale.shape[1]
    chosen = torch.empty(columns, weight.shape[0], dtype=torch.int8)

    def quantize_column(k: int, target: Tensor) -> Tensor:
        group = int(factor.order[k]) // size
        scale = grid.scale[:, group]
        zero = torch.zeros(len(scale)) if grid.zero_point is None else grid.zero_point[:, group].float()
        integers = (target / scale.float() + zero).round().clamp(grid.scheme.qmin, grid.scheme.qmax)
        chosen[k] = integers.to(torch.int8)
        return ((integers - zero).to(scale.dtype) * scale).float()

    error = sweep(weight.float().t()[factor.order].contiguous(), factor, quantize_column)
    inverse = factor.order.argsort()
    return chosen[inverse].t(), error[inverse].t()


CASES = [
    # width, scheme, act_order, dtype
    (96, Scheme(4, 32), True, torch.float32),
    (96, Scheme(4, 32, False), True, torch.float32),
    (96, Scheme(3, None), False, torch.float32),
    (96, Scheme(3, None, False), True, torch.float32),
    (64, Scheme(2, 64), True, torch.bfloat16),
    (64, Scheme(2, 32, False), False, torch.bfloat16),
    (50, Scheme(8, None), True, torch.float16),
    (160, Scheme(4, 32, False), True, torch.float32),  # more than one block of the sweep
    (33, Scheme(4, None), True, torch.float32),
]


@pytest.mark.parametrize(("width", "scheme", "act_order", "dtype"), CASES)
def test_the_sweep_chooses_what_textbook_gptq_and_quip_choose(
    width: int, scheme: Scheme, act_order: bool, dtype: torch.dtype
) -> None:
    H64 = gram_of(inputs(3 * width, width, width, spread=0.3))
    H, weight = H64.float(), weights(16, width, width)
    grid = grid_of(weight, scheme, dtype)
    order = H.diagonal().argsort(descending=True) if act_order else torch.arange(width)
    textbook = reference.gptq(weight, H, grid, order, 0.01)
    ldl = reference.quip(weight, H, grid, order, 0.01)
    assert torch.equal(textbook.values, ldl.values)  # QuIP's theorem 6
    factor = factorize(H.clone(), 0.01, order)
    assert factor is not None
    values, error = swept(weight, factor, grid)
    # Rows that have a target within a hair of a tie may part from float64 there, and from then on.
    clear = textbook.margin > 1e-4
    assert int(clear.sum()) >= 12
    assert torch.equal(values[clear].long(), textbook.values[clear])
    dense = dequantize(values, grid.scale, grid.zero_point)
    assert torch.allclose(error, weight - dense.float(), atol=1e-6)
    found, wanted = (reference.row_loss(weight, d, H) for d in (dense, textbook.dense))
    assert torch.allclose(found[clear], wanted[clear], rtol=1e-6)
    assert float(found.sum()) < 1.02 * float(wanted.sum())


def test_what_an_error_costs_after_compensation_is_its_pivot() -> None:
    """loss with damping = sum over columns of R_kk² (target - q)²: what the grid search weighs errors by."""
    H, weight = gram(64, 4), weights(8, 64, 4)
    grid, order = grid_of(weight, Scheme(3, 32), torch.float32), random_order(64, 4)
    ldl = reference.quip(weight, H, grid, order, 0.01)
    total = reference.row_loss(weight, ldl.dense, reference.damped(H, 0.01))
    assert ldl.loss is not None
    assert torch.allclose(ldl.loss, total, rtol=1e-9)
    factor = factorize(H.clone(), 0.01, order)
    assert factor is not None
    targets = []

    def keep(k: int, target: Tensor) -> Tensor:
        targets.append(target.clone())
        return torch.zeros_like(target)

    error = sweep(weight.t()[order].contiguous(), factor, keep)
    costs = (factor.pivots.double().unsqueeze(1) * torch.stack(targets).double().square()).sum(0)
    assert torch.equal(error, weight.t()[order])
    assert torch.allclose(
        costs, reference.row_loss(weight, torch.zeros_like(weight), shifted_back(H)), rtol=1e-4
    )


def shifted_back(H: Tensor) -> Tensor:
    return reference.damped(H, 0.01)


@pytest.mark.parametrize("width", [31, 128, 300])
def test_a_column_function_that_changes_nothing_leaves_no_error(width: int) -> None:
    factor = factorize(gram(width), 0.01)
    assert factor is not None
    weight = weights(5, width, 0).t().contiguous()
    before, seen = weight.clone(), []

    def keep(k: int, target: Tensor) -> Tensor:
        seen.append(k)
        return target

    assert float(sweep(weight, factor, keep).abs().max()) < 1e-7
    assert torch.equal(weight, before)
    assert seen == list(range(width))
