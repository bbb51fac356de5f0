"""Peak anonymous memory of a stretch of work: what the process itself has allocated, mapped files apart."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from llmcomp.calibration.parking import HEAPED

_INTERVAL = 0.02
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h
_LARGE = HEAPED
_LARGEST = 2**25  # that glibc takes from a heap
# Bytes at the heap's end that are free and stay: glibc's own choice, and while they are reused.
_TRIMMED, _KEPT = 2**17, 2**30


class PeakMemory:
    """Samples in a thread while the `with` lasts; `peak` is in bytes over the value at entry."""

    def __init__(self) -> None:
        self.peak = 0
        self._base = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        return_freed_memory()  # free pages of the heap would hide what takes their place
        self._base = anonymous_memory()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self.peak = max(self.peak, anonymous_memory() - self._base)


def anonymous_memory() -> int:
    """Bytes of anonymous resident memory; where the system does not tell it apart, all resident memory."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def return_freed_memory() -> None:
    """Give freed heap pages back to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_large_blocks_apart() -> None:
    """Make the C library (glibc) map every block of 256 KB or more by itself, for the whole process.

    Left alone it raises that limit up to 32 MB as blocks are freed, and then activations come from one heap,
    where what waits and what is let go lie mixed: a small model's peak was twice as high, and another in each
    run. The price is the faults of fresh pages, a tenth of a small model's forward.
    """
    _allocate(_LARGE, _TRIMMED)


@contextmanager
def reusing_large_blocks(give_back: bool = True) -> Iterator[None]:
    """While it lasts, blocks up to 32 MB come from the heap and stay with it when they are freed. For work that makes
    the same large tensors again and again, scratch of products among them, and lets nothing wait meanwhile.

    Args:
        give_back: free pages when it ends; else they serve the next such work, until `return_freed_memory`.
    """
    _allocate(_LARGEST, _KEPT)
    try:
        yield
    finally:
        if give_back:
            keep_large_blocks_apart()
            return_freed_memory()
        else:
            _allocate(_LARGE, _KEPT)


def _allocate(apart: int, kept: int) -> None:
    """Set glibc's limits in bytes: of blocks that it maps by themselves, and of what it keeps."""
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        tune(_M_MMAP_THRESHOLD, apart)
        tune(_M_TRIM_THRESHOLD, kept)
