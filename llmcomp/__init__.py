"""llmcomp: make Hugging Face models smaller, see what it cost, get a checkpoint that other software loads.

Public names are imported on first use, so that `import llmcomp` and `llmcomp --help` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = [
    "Calibration",
    "CompressResult",
    "DistillPlan",
    "ExportResult",
    "FactorizeStep",
    "LlmcompError",
    "Lora",
    "Optimization",
    "Override",
    "PruneStep",
    "PruningPlan",
    "PushResult",
    "QuantizeStep",
    "Recipe",
    "Report",
    "RunError",
    "RunOptions",
    "SparsifyStep",
    "Teaching",
    "UserError",
    "bench",
    "compress",
    "distill",
    "evaluate",
    "export",
    "factorize",
    "load",
    "prune",
    "prune_in_training",
    "push",
    "quantize",
    "recover",
    "sparsify",
]

_HOMES: dict[str, tuple[str, ...]] = {
    "llmcomp.api": (
        "bench", "compress", "evaluate", "export", "factorize", "load", "prune", "quantize", "sparsify",
    ),
    "llmcomp.errors": ("LlmcompError", "RunError", "UserError"),
    "llmcomp.publishing": ("PushResult", "push"),
    "llmcomp.recipe": (
        "Calibration", "FactorizeStep", "Override", "PruneStep", "QuantizeStep", "Recipe", "SparsifyStep",
    ),
    "llmcomp.report.schema": ("Report",),
    "llmcomp.run_options": ("CompressResult", "ExportResult", "RunOptions"),
    "llmcomp.training.distill_plan": ("DistillPlan",),
    "llmcomp.training.pruning_plan": ("PruningPlan",),
    "llmcomp.training.settings": ("Lora", "Optimization", "Teaching"),
    "llmcomp.training_api": ("distill", "prune_in_training", "recover"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'llmcomp' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
