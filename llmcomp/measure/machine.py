"""The machine that figures were taken on, for the report."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import psutil
import torch

from llmcomp.report.schema import Machine

_TOLD = ("llmcomp", "torch", "transformers", "compressed-tensors", "bitsandbytes", "safetensors")


def this_machine(device: str = "cpu") -> Machine:
    """CPU, torch threads, memory in bytes, the device used, versions of what decides the figures."""
    versions = {"python": platform.python_version()}
    for name in _TOLD:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree without being installed
            continue
    return Machine(_cpu(), torch.get_num_threads(), psutil.virtual_memory().total, device, versions)


def _cpu() -> str:
    """The model name where the system tells it, else the architecture."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or os.name
