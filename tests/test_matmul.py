"""The fast product is float32-accurate on whatever machine this is, and its setting ends with its scope."""

from __future__ import annotations

import pytest
import torch

from llmcomp.matmul import fast_matmul

SHAPES = [(1, 1, 1), (3, 5, 7), (32, 32, 300), (129, 513, 65), (512, 2048, 512), (256, 128, 1024)]


def relative(found: torch.Tensor, exact: torch.Tensor, size: torch.Tensor) -> float:
    """Largest error over what the terms of each entry's sum amount to."""
    return float(((found.double() - exact).abs() / size).max())


@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
@pytest.mark.parametrize("outliers", [False, True])
def test_as_accurate_as_float32(rows: int, inner: int, columns: int, outliers: bool) -> None:
    generator = torch.Generator().manual_seed(rows + inner + columns)
    a, b = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    if outliers:
        a[::4] *= 1e4
        b[:, ::3] *= 1e-4
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    with fast_matmul():
        product = a @ b
        added = torch.zeros(rows, columns).addmm_(a, b)
        transposed = (b.t() @ a.t()).t()
    for found in (product, added, transposed):
        assert relative(found, exact, size) < 2e-6
    # What the bound is there to catch: one product of bfloat16 factors is a thousand times worse.
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    assert relative(rounded, exact, size) > 1e-5


def test_rank_one_updates_and_triangular_views_are_as_accurate() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(200, 200, generator=generator)
    x, y = torch.randn(200, generator=generator), torch.randn(200, generator=generator)
    with fast_matmul():
        updated = matrix.clone().addr_(x, y)
        product = matrix.triu().t() @ matrix[:, 10:150]
    assert torch.allclose(updated.double(), matrix.double() + torch.outer(x.double(), y.double()), atol=1e-6)
    upper = matrix.double().triu().t()
    size = upper.abs() @ matrix[:, 10:150].double().abs()
    assert relative(product, upper @ matrix[:, 10:150].double(), size) < 2e-6


def test_the_setting_is_scoped_also_when_an_error_leaves() -> None:
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with fast_matmul():
        inside = setting.fp32_precision
        with fast_matmul():
            pass
        assert setting.fp32_precision == inside
    assert setting.fp32_precision == before
    with pytest.raises(ValueError, match="out"), fast_matmul():
        raise ValueError("out")
    assert setting.fp32_precision == before
