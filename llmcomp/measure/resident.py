"""Resident memory of this process, in bytes. Mapped pages of weight files count while they are resident."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil


def resident_now() -> int:
    """As any tool shows it."""
    return int(psutil.Process().memory_info().rss)


def resident_peak() -> int:
    """The most bytes this process has had resident. Linux counts from exec on."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
