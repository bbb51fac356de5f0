"""Tiny sentence encoders, laid out as sentence-transformers saves them but made without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import WIDTH, tiny

OWN = "sentence_transformers.models."  # its packages changed with versions 5 and 6; the Hub has mostly these
NARROW = 24  # width of the embeddings after Dense


def sentence_encoder(
    directory: Path,
    model: str = "bert",
    *,
    after: tuple[str, ...] = ("Normalize",),
    seed: int = 0,
    **pooling: Any,
) -> Path:
    """Save a bare tiny model with its tokenizer, Pooling, and the modules `after` it, Dense or Normalize.

    Args:
        pooling: fields of Pooling's config; mean over tokens where none are given.
    """
    tiny(model, directory, tokenizer=True, bare=True, seed=seed)
    write_modules(directory, "Pooling", *after)
    mode = pooling or {"pooling_mode_mean_tokens": True}
    write_json(directory / "1_Pooling/config.json", {"word_embedding_dimension": WIDTH, **mode})
    for number, kind in enumerate(after, 2):
        folder = directory / f"{number}_{kind}"
        folder.mkdir(exist_ok=True)
        if kind == "Dense":
            write_dense(folder)
    write_json(directory / "sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": False})
    return directory


def write_modules(directory: Path, *kinds: str) -> None:
    """modules.json of a transformer and what comes after it, each in the folder NUMBER_KIND."""
    paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds, 1))]
    named = zip(paths, ("Transformer", *kinds), strict=True)
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": OWN + kind} for n, (path, kind) in enumerate(named)
    ]
    write_json(directory / "modules.json", modules)


def write_dense(
    folder: Path, activation: str = "Tanh", bias: bool = True, **more: Any
) -> dict[str, torch.Tensor]:
    """A Dense module WIDTH → NARROW with random weights, which are returned."""
    generator = torch.Generator().manual_seed(5)
    tensors = {"linear.weight": torch.randn(NARROW, WIDTH, generator=generator) / WIDTH**0.5}
    if bias:
        tensors["linear.bias"] = torch.randn(NARROW, generator=generator)
    config = {
        "in_features": WIDTH, "out_features": NARROW, "bias": bias,
        "activation_function": f"torch.nn.modules.activation.{activation}", **more,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    save_file(tensors, folder / "model.safetensors")
    return tensors


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_pairs(file: Path, count: int = 30) -> Path:
    """Pairs as JSON lines (first, second, score) of texts of many lengths; the more words they share the higher.

    The first texts come again after twelve pairs.
    """
    lines = []
    for number in range(count):
        start = number % 12
        words = [f"word{(start * 7 + step) % 23}" for step in range(3 + start % 9)]
        shared = number % 4
        other = words[:shared] + [f"other{number}"] * (3 + number % 5)
        lines.append(json.dumps({"first": " ".join(words), "second": " ".join(other), "score": shared / 3}))
    file.write_text("\n".join(lines) + "\n")
    return file
