"""The machine's fastest float32-accurate matrix product, for as long as a `with` lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def fast_matmul() -> Iterator[None]:
    """float32 products on the machine's fastest float32-accurate path.

    On x86 with AVX512-BF16 this hands float32 matrices to oneDNN instead of MKL, which was two to three times
    as fast on an EPYC; tests/test_matmul.py bounds its error. The setting is process-wide, so it is scoped.
    """
    mkldnn: Any = torch.backends.mkldnn  # torch adds `matmul` at run time, where type checkers do not see it
    matmul = mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
