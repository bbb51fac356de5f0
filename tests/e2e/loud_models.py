"""Tiny models with loud channels, which searches for scales find worth scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import DECODERS, build, write_tokenizer

from llmcomp.adapters.discover import discover
from llmcomp.adapters.folds import Fold, folds
from llmcomp.experts import split_experts


def loud(name: str, directory: Path, dtype: torch.dtype, **overrides: Any) -> Path:
    """A tiny model in which every 32nd channel of what can be scaled is sixteen times as loud."""
    model, twin = build(name, dtype=dtype, **overrides), build(name, **overrides)
    split_experts(twin)
    for fold in folds(discover(twin.to("meta"))).values():
        if not isinstance(fold, Fold) or ".experts." in fold.producer:  # experts are fused in `model`
            continue
        producer, rows = model.get_submodule(fold.producer), fold.channels.unique()[::32]
        with torch.no_grad():
            if fold.kind == "linear":
                (producer.weight.T if name == "gpt2" else producer.weight)[rows] *= 16
            else:
                producer.weight[rows] = 16 if fold.kind == "norm" else 15
    model.save_pretrained(directory)
    write_tokenizer(directory, encoder=name not in DECODERS)
    return directory
