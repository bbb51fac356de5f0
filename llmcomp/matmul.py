"""Matrix products on the machine's fastest route that keeps the accuracy which is asked for.

Machines differ in what they multiply: some have units for bf16 (AVX512-BF16, AMX), many have none, and torch
then falls back on loops that are ten times slower than the same product in float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PIECE = 1 << 21  # elements of a weight that are widened at a time: 8 MB stay in the last-level cache


@contextlib.contextmanager
def fast_matmul(bf16_values: bool = False) -> Iterator[None]:
    """float32 products on the machine's fastest float32-accurate path.

    On x86 with AVX512-BF16 the switch hands float32 matrices to oneDNN instead of MKL, twice as fast on an
    EPYC and as accurate (tests/test_matmul.py). With AMX, and on other architectures, the same switch rounds
    the factors to bf16, so there it is used only where that loses nothing. It is process-wide, hence scoped.

    Args:
        bf16_values: every entry of both factors is a bf16 number.
    """
    if not (bf16_values or switch_is_exact()):
        yield
        return
    mkldnn: Any = torch.backends.mkldnn  # torch adds `matmul` at run time, where type checkers do not see it
    matmul = mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@functools.cache
def switch_is_exact() -> bool:
    """Whether oneDNN's switch for float32 products keeps float32's accuracy on this CPU."""
    return bool(torch.cpu._is_avx512_bf16_supported()) and not torch.cpu._is_amx_tile_supported()


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has units for products of `dtype`, rather than loops that convert number by number."""
    if dtype == torch.bfloat16:
        # oneDNN takes bf16 on any AVX512, and emulates it where the instruction is missing.
        emulated = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not emulated
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


@contextlib.contextmanager
def narrow_products(device: torch.device) -> Iterator[None]:
    """Products with factors rounded to bf16 where the device multiplies those faster, else as `fast_matmul` does.

    For gradients of which the signs are all that is used. Sums, norms and what is added to a residual stay float32.
    """
    if device.type == "cpu":
        narrow = multiplies(torch.bfloat16)
    else:
        narrow = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    with fast_matmul(), torch.autocast(device.type, torch.bfloat16, enabled=narrow):
        yield


class WideProducts(TorchFunctionMode):
    """While it lasts, bf16 and fp16 products on a CPU without units for them are computed in float32.

    The result is what such units give: terms summed in float32, the sum rounded once. Used where llmcomp runs a
    model for its own ends (calibration, verification, quality); never where it times one.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        route = _ROUTES.get(func)
        if route is None or not _is_slow(args):
            return func(*args, **(kwargs or {}))
        return route(func, *args, **(kwargs or {}))


def _is_slow(args: tuple[Any, ...]) -> bool:
    first = args[0] if args else None
    return isinstance(first, Tensor) and first.device.type == "cpu" and not multiplies(first.dtype)


def _linear(func: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight' + bias`, the weight widened a few rows at a time: a whole one would double what a block takes."""
    rows, columns = weight.shape
    if weight.dtype != x.dtype:  # torch's own error says it best
        return func(x, weight, bias)
    wide = x.float()
    out = x.new_empty(*x.shape[:-1], rows)
    step = max(64, _PIECE // columns)
    with fast_matmul():
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            out[..., part] = F.linear(wide, weight[part].float(), None if bias is None else bias[part].float())
    return out


def _widened(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`func` on float32 copies of its 16-bit arguments."""
    dtype = args[0].dtype
    with fast_matmul():
        result = func(*(_wide(one) for one in args), **{name: _wide(one) for name, one in kwargs.items()})
    return result.to(dtype)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


_ROUTES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _widened,
    torch.baddbmm: _widened,
    torch.matmul: _widened,
    torch.bmm: _widened,
    torch.mm: _widened,
    Tensor.matmul: _widened,
    Tensor.__matmul__: _widened,
}
