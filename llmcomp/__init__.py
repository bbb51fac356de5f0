"""llmcomp: make Hugging Face models smaller, see what it cost, get a checkpoint that other software loads.

Public names are imported on first use, so that `import llmcomp` and `llmcomp --help` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = [
    "Calibration",
    "ExportResult",
    "LlmcompError",
    "Override",
    "QuantizeResult",
    "QuantizeStep",
    "Recipe",
    "Report",
    "RunError",
    "RunOptions",
    "UserError",
    "bench",
    "evaluate",
    "export",
    "load",
    "quantize",
]

_HOMES = {
    "llmcomp.api": ("ExportResult", "QuantizeResult", "RunOptions", "bench", "evaluate", "export", "load", "quantize"),
    "llmcomp.errors": ("LlmcompError", "RunError", "UserError"),
    "llmcomp.recipe": ("Calibration", "Override", "QuantizeStep", "Recipe"),
    "llmcomp.report.schema": ("Report",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'llmcomp' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
