"""How fast this process reads memory: the limit of decoding, which reads every weight for each new token.

As in STREAM (McCalpin 1995), one pass over a buffer that is much larger than the last-level cache; only reads,
since weights are only read. Which of torch's operators comes closest to the machine's limit depends on the
machine and on the threads, so several are tried and the fastest pass of all counts.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import psutil
import torch

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_ASSUMED_CACHE = 32 * 2**20  # where the system does not tell
_TIMES_CACHE = 8
_SMALLEST = 256 * 2**20
_WIDTH = 8192
PASSES = 5


def last_level_cache(folder: Path = _CACHES) -> int:
    """Bytes of the largest cache that a core can use, as Linux tells."""
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    found = [re.fullmatch(r"(\d+)([KMG]?)", size) for size in sizes]
    return max((int(m[1]) << 10 * " KMG".index(m[2] or " ") for m in found if m), default=_ASSUMED_CACHE)


def buffer_size(cache: int, available: int) -> int:
    """Bytes to read in a pass: well above the cache, at most a quarter of the memory that is free.

    >>> [buffer_size(cache << 20, 8 << 30) >> 20 for cache in (1, 32, 480)]
    [256, 256, 2048]
    """
    wanted = max(_SMALLEST, _TIMES_CACHE * cache)
    return max(_WIDTH * 4, min(wanted, available // 4) // (_WIDTH * 4) * (_WIDTH * 4))


def read_bandwidth(passes: int = PASSES, size: int | None = None) -> float:
    """Bytes a second that this process reads with torch's present number of threads.

    Args:
        passes: over the buffer with each operator, besides one that is not counted.
        size: of the buffer in bytes, a multiple of 32 KiB; by default `buffer_size` of this machine.
    """
    size = size or buffer_size(last_level_cache(), psutil.virtual_memory().available)
    matrix = torch.ones(size // (4 * _WIDTH), _WIDTH)
    flat, integers, vector = matrix.view(-1), matrix.view(torch.int32), torch.ones(_WIDTH)
    reads = (lambda: torch.mv(matrix, vector), lambda: torch.dot(flat, flat), integers.max)
    fastest = float("inf")
    for read in reads:
        for number in range(passes + 1):
            start = time.perf_counter()
            read()
            if number:
                fastest = min(fastest, time.perf_counter() - start)
    return size / fastest
