"""Text for an encoder-decoder: what the encoder reads, and what the decoder writes.

Two columns of a table are taken as they are, the first to read and the second to write. Running text is cut into
windows, of which the encoder reads the first half and the decoder goes on with the second, so that it never writes
what the encoder has read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmcomp.calibration.data import Batch, Texts, special_affixes, window_starts, windows
from llmcomp.errors import BadData

TASK = "seq2seq-lm"


def pairs(
    texts: Texts, tokenizer: Any, *, samples: int, length: int, seed: int, start: int, max_length: int | None = None
) -> list[Batch]:
    """At most `samples` batches of one pair each, of at most `length` tokens together (of a table: each).

    Args:
        tokenizer: of transformers.
        start: the token that the decoder begins with.
        max_length: the model's positions.

    Raises:
        BadData: too little text, no pair with text in both columns, or token ids in place of text.
    """
    if texts.input_ids is not None:
        raise BadData(
            f"{texts.description}: an encoder-decoder reads pairs; give text, or a table with two text columns."
        )
    if texts.partners is not None:
        return _rows(texts, tokenizer, samples, min(length, max_length or length), seed, start)
    found = windows(
        texts, tokenizer, samples=samples, length=length, seed=seed, task=TASK, max_length=max_length
    )
    prefix, suffix = special_affixes(tokenizer)
    return [_halves(window.tolist(), len(prefix), suffix, start) for window in found]


def describe(texts: Texts, samples: Sequence[Batch]) -> str:
    """One phrase on what the pairs are."""
    read = sum(sample.context["input_ids"].numel() for sample in samples)
    written = sum(sample.input_ids.numel() for sample in samples)
    how = "the second column written" if texts.partners is not None else "the encoder reads the first half of each"
    return f"{texts.description}: {len(samples):,} pairs of {read:,} tokens read and {written:,} written in all, {how}"


def _halves(ids: list[int], prefix: int, suffix: list[int], start: int) -> Batch:
    body = ids[prefix : len(ids) - len(suffix)]
    middle = (len(body) + 1) // 2
    return _pair([*ids[:prefix], *body[:middle], *suffix], [start, *body[middle:]])


def _rows(texts: Texts, tokenizer: Any, samples: int, length: int, seed: int, start: int) -> list[Batch]:
    rows = zip(texts.rows, texts.partners or (), strict=True)
    both = [(one, two) for one, two in rows if one.strip() and two.strip()]
    if not both:
        raise BadData(f"{texts.description} has no row with text in both columns.")
    chosen = [both[first] for first in window_starts(len(both), min(samples, len(both)), 1, seed)]
    read = tokenizer([one for one, _ in chosen], truncation=True, max_length=length)["input_ids"]
    written = tokenizer(text_target=[two for _, two in chosen], truncation=True, max_length=length)["input_ids"]
    return [_pair(source, [start, *target][:length]) for source, target in zip(read, written, strict=True)]


def _pair(source: list[int], target: list[int]) -> Batch:
    return Batch(_row(target), None, {"input_ids": _row(source)})


def _row(ids: list[int]) -> Tensor:
    return torch.tensor([ids], dtype=torch.int64)
