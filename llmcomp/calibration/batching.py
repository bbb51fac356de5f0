"""Samples of models that read more than token ids, each a batch of one: brought together, cut, identified."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from llmcomp.calibration.data import Batch
from llmcomp.feeds import IDS


def like(samples: Sequence[Batch], *, tokens_per_batch: int, tokens_each: int | None = None) -> list[Batch]:
    """Batches of samples whose tensors all have the same shapes, so that nothing is padded; in the order of `order`.

    Args:
        tokens_per_batch: of one batch at most, but a batch has one sample.
        tokens_each: of a sample; None counts its token ids.
    """
    groups: dict[tuple[tuple[int, ...], ...], list[Batch]] = {}
    for number in order(samples):
        groups.setdefault(_shapes(samples[number]), []).append(samples[number])
    result = []
    for group in groups.values():
        size = max(1, tokens_per_batch // max(1, tokens_each or weight(group[0])))
        result += [joined(group[first : first + size]) for first in range(0, len(group), size)]
    return result


def order(samples: Sequence[Batch]) -> list[int]:
    """Numbers of the samples as `like` puts them: those of one shape together, the shape that comes first first."""
    first: dict[tuple[tuple[int, ...], ...], int] = {}
    for number, sample in enumerate(samples):
        first.setdefault(_shapes(sample), number)
    return sorted(range(len(samples)), key=lambda number: first[_shapes(samples[number])])


def joined(samples: Sequence[Batch]) -> Batch:
    """Samples of like shapes as one batch."""
    context = {name: torch.cat([one.context[name] for one in samples]) for name in samples[0].context}
    return Batch(torch.cat([one.input_ids for one in samples]), None, context)


def weight(sample: Batch) -> int:
    """Token ids of a sample, on both sides."""
    return sample.input_ids.numel() + (sample.context[IDS].numel() if IDS in sample.context else 0)


def witness_of(samples: Sequence[Batch], rows: int, tokens: int) -> Batch:
    """The beginning of the first `rows` samples of the shape of the longest, at most `tokens` ids on each side."""
    longest = max(samples, key=weight)
    alike = [sample for sample in samples if _shapes(sample) == _shapes(longest)][:rows]
    whole = joined(alike)
    context = {name: value[:, :tokens] if name == IDS else value for name, value in whole.context.items()}
    return Batch(whole.input_ids[:, :tokens], None, context)


def fingerprint(samples: Sequence[Batch]) -> str:
    """SHA-256 (hexadecimal) of all tensors, with their names and shapes, in their order."""
    digest = hashlib.sha256()
    for sample in samples:
        for name, value in {"": sample.input_ids, **sample.context}.items():
            digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
            digest.update(value.contiguous().view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def _shapes(sample: Batch) -> tuple[tuple[int, ...], ...]:
    return (tuple(sample.input_ids.shape), *(tuple(value.shape) for value in sample.context.values()))
