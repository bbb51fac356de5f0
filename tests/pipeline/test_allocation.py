"""How the C library is told to treat large blocks: apart while activations wait, reused while a block learns."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from llmcomp.pipeline.memory import anonymous_memory, keep_large_blocks_apart, reusing_large_blocks

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="these are limits of glibc's allocator")

_ELEMENTS = 2**18  # 1 MB of float32
_TIMES = 50


def _faults() -> int:
    """Page faults of making and freeing one large tensor again and again."""
    torch.ones(_ELEMENTS)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(_TIMES):
        torch.ones(_ELEMENTS)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_freed_blocks_are_reused_while_it_lasts_and_mapped_anew_afterwards() -> None:
    keep_large_blocks_apart()
    before = _faults()
    with reusing_large_blocks():
        within = _faults()
    after = _faults()
    assert min(before, after) >= _TIMES  # each one faults in pages of its own
    assert within < before / 4  # the heap grows at first


def test_what_was_kept_is_given_back() -> None:
    keep_large_blocks_apart()
    base = anonymous_memory()
    with reusing_large_blocks():
        many = [torch.ones(_ELEMENTS) for _ in range(64)]
        del many
        held = anonymous_memory() - base
    assert held > 32 * 4 * _ELEMENTS  # half of them, at least
    assert anonymous_memory() - base < held / 4


def test_an_error_inside_ends_it_too() -> None:
    with pytest.raises(ZeroDivisionError), reusing_large_blocks():
        _ = 1 / 0
    assert _faults() >= _TIMES
