"""Shared fixtures: assets, threads, offline mode."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def assets_root() -> Path:
    return Path(os.environ.get("LLMCOMP_ASSETS", REPOSITORY.parent / "shared"))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real data and trained models; tests that need it skip where it is absent."""
    root = assets_root()
    if not (root / "models").is_dir():
        pytest.skip(f"assets absent: no models/ under {root} (set LLMCOMP_ASSETS)")
    return root
