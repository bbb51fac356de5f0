"""The fast product is float32-accurate on whatever machine this is, and its setting ends with its scope."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmcomp import matmul
from llmcomp.matmul import WideProducts, fast_matmul, narrow_products

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


@pytest.mark.parametrize("units", [True, False])
def test_narrow_products_round_factors_where_that_is_faster(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "multiplies", lambda dtype: units)
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(40, 64, generator=generator), torch.randn(30, 64, generator=generator, requires_grad=True)
    with narrow_products(torch.device("cpu")):
        found = F.linear(x, weight)
        found.float().square().sum().backward()
    assert found.dtype == (torch.bfloat16 if units else torch.float32)
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    wide = weight.detach().double()
    exact = x.double() @ wide.t()
    assert relative(found.detach(), exact, x.double().abs() @ wide.t().abs()) < (1e-2 if units else 2e-6)
    gradient = 2 * exact.t() @ x.double()
    assert torch.nn.functional.cosine_similarity(weight.grad.double(), gradient).min() > (0.999 if units else 1 - 1e-6)


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


def test_bf16_values_lose_nothing_on_any_machine() -> None:
    """Where the switch rounds factors to bf16, it may serve factors that are bf16 already."""
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(256, 256, generator=generator).bfloat16().float() for _ in range(2))
    with fast_matmul(bf16_values=True):
        product = a @ b
    assert relative(product, a.double() @ b.double(), a.double().abs() @ b.double().abs()) < 2e-6


# --- 16-bit products on CPUs without units for them ---


@pytest.fixture
def no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "multiplies", lambda dtype: dtype == torch.float32)


def products(dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """name → (result in `dtype`, the same in float64)."""
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(2, 7, 96, generator=generator).to(dtype), torch.randn(40, 96, generator=generator).to(dtype)
    bias = torch.randn(40, generator=generator).to(dtype)
    X, W, B = x.double(), w.double(), bias.double()
    flat = x.view(-1, 96)
    return {
        "linear": (F.linear(x, w), X @ W.t()),
        "with bias": (F.linear(x, w, bias), X @ W.t() + B),
        "addmm": (torch.addmm(bias, flat, w.t()), X.view(-1, 96) @ W.t() + B),
        "matmul": (torch.matmul(x, w.t()), X @ W.t()),
        "operator": (x @ w.t(), X @ W.t()),
        "bmm": (torch.bmm(x, x.transpose(1, 2)), X @ X.transpose(1, 2)),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_products_round_once(dtype: torch.dtype, no_units: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_PIECE", 64 * 96 // 2)  # two pieces of the weight
    with WideProducts():
        found = products(dtype)
    for name, (result, exact) in found.items():
        assert result.dtype == dtype, name
        half_a_unit = torch.finfo(dtype).eps / 2 * exact.abs()
        assert bool(((result.double() - exact).abs() <= 1.01 * half_a_unit + 1e-5).all()), name


def test_wide_products_leave_float32_and_machines_with_units_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_linear", None)  # would fail where it is called
    monkeypatch.setattr(matmul, "multiplies", lambda dtype: True)
    plain = products(torch.bfloat16)
    with WideProducts():
        for name, (result, _) in products(torch.bfloat16).items():
            assert torch.equal(result, plain[name][0])


def test_wide_products_keep_torchs_own_errors(no_units: None) -> None:
    x = torch.randn(3, 4).bfloat16()
    with WideProducts(), pytest.raises(RuntimeError, match="dtype"):
        F.linear(x, torch.randn(5, 4))
