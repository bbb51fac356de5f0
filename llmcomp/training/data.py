"""What a model is trained on: token windows and labels, put together as batches that say which positions count. Images
are `training.images`'.

A batch holds what the model reads, and beside it, aligned with the logits: `labels` (what is right at a position,
`losses.IGNORED` where nothing is known) and `scored` (bool, the positions that losses are averaged over).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llmcomp.calibration.data import Texts, fingerprint, window_starts, windows
from llmcomp.calibration.media import Media
from llmcomp.errors import BadData
from llmcomp.feeds import IDS, PIXELS
from llmcomp.losses import IGNORED
from llmcomp.measure.inputs import class_numbers, max_positions

Batch = dict[str, Tensor]
IMAGES = "image-classification"
CLASSIFIERS = ("sequence-classification", IMAGES)  # whose samples may have labels, or not
TASKS = ("causal-lm", "masked-lm", *CLASSIFIERS)
_ALL = 1_000_000_000  # samples: as many as the text gives
_MASKED = 0.15  # of the tokens, as BERT's authors have it (arXiv:1810.04805); of those
_AS_MASK, _AS_ANY = 0.8, 0.1  # become the mask token, or any other token; the rest stays
_HELD_OUT, _HELD_OUT_MOST = 0.05, 128
_WITNESSES, _WITNESS_TOKENS = 4, 64


class Samples(Dataset[Batch], ABC):
    """What a model reads, one by one.

    Attributes:
        labels: of each where there are labels; `IGNORED` or NaN of one that has none.
    """

    labels: Tensor | None

    @abstractmethod
    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, index: int) -> Batch:
        made = self.read(index)
        return made if self.labels is None else {**made, "labels": self.labels[index]}

    @abstractmethod
    def read(self, index: int) -> Batch:
        """What the model reads of one."""

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Tokens of each."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Equal if a resumed run reads the same, labels aside."""

    @abstractmethod
    def first(self) -> Batch:
        """A few, as one batch without padding or labels."""

    @abstractmethod
    def chosen(self, numbers: Sequence[int]) -> Samples:
        """Some, with their labels."""

    def held_out(self) -> tuple[Samples, Samples]:
        """Most of it, and every twentieth sample or so, for losses on the way.

        Raises:
            BadData: a single sample.
        """
        count = max(1, min(_HELD_OUT_MOST, int(len(self) * _HELD_OUT)))
        if len(self) < 2:
            raise BadData("One sample cannot be held out for --evaluate-every; give more data, or leave the flag out.")
        chosen = {int((n + 0.5) * len(self) / count) for n in range(count)}
        return self.chosen([n for n in range(len(self)) if n not in chosen]), self.chosen(sorted(chosen))

    def labelled(self) -> Samples:
        """Without those that have no label, where others have one."""
        if self.labels is None:
            return self
        known = self.labels.isfinite() if self.labels.is_floating_point() else self.labels != IGNORED
        return self if bool(known.all()) else self.chosen(known.nonzero()[:, 0].tolist())

    def _labels_of(self, numbers: Sequence[int]) -> Tensor | None:
        return None if self.labels is None else self.labels[torch.tensor(numbers)]


@dataclass(frozen=True)
class Windows(Samples):
    """Token ids."""

    windows: Sequence[Tensor]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.windows)

    def read(self, index: int) -> Batch:
        return {IDS: self.windows[index]}

    @property
    def lengths(self) -> list[int]:
        return [len(window) for window in self.windows]

    def fingerprint(self) -> str:
        return fingerprint(self.windows)

    def first(self) -> Batch:
        """The beginnings of the longest."""
        longest = sorted(self.windows, key=len, reverse=True)[:_WITNESSES]
        length = min(_WITNESS_TOKENS, *(len(window) for window in longest), _WITNESS_TOKENS)
        return {IDS: torch.stack([window[:length] for window in longest])}

    def chosen(self, numbers: Sequence[int]) -> Windows:
        return Windows([self.windows[n] for n in numbers], self._labels_of(numbers))


def samples_of(
    texts: Texts, tokenizer: Any, model: Any, task: str, *, length: int, count: int | None, seed: int,
    taught: bool = False,
) -> Windows:
    """Cut a text, or rows with labels, into samples for a model.

    Args:
        count: how many at most, evenly spaced; None for all.
        taught: by a teacher, who needs no labels.

    Raises:
        BadData: too little text, labels that are missing or not the model's.
    """
    if texts.partners is not None:
        raise BadData(f"{texts.description}: training reads one text column; name one with --text-column.")
    if task == "masked-lm" and tokenizer.mask_token_id is None:
        raise BadData("The tokenizer has no mask token, and a masked language model learns what is masked.")
    labels = None
    if task == "sequence-classification":
        if texts.labels is None and not taught:
            raise BadData(
                f"{texts.description} has no labels for a classifier to learn from; name their column with "
                "--label-column, or give a --teacher."
            )
        texts = _with_text(texts)
        labels = labels_of(texts, model)
    found = windows(
        texts, tokenizer, samples=count or _ALL, length=length, seed=0 if task in CLASSIFIERS else seed, task=task,
        max_length=max_positions(model, tokenizer),
    )  # fmt: skip
    if labels is not None and len(found) < len(labels):
        labels = labels[torch.tensor(evenly(len(labels), len(found)))]
    known = model.config.vocab_size
    if (largest := max(int(window.max()) for window in found)) >= known:
        raise BadData(f"{texts.description} has token {largest}, and the model knows {known}; tokenize it by its own.")
    return Windows(found, labels)


def labels_of(texts: Texts | Media, model: Any) -> Tensor | None:
    """As the model counts them; `IGNORED`, of scores NaN, of rows that have none; None where no row has one.

    Raises:
        BadData: labels that are not the model's, or a model of several for one row.
    """
    if model.config.problem_type == "multi_label_classification":
        raise BadData("A classifier with several labels a row cannot be trained here; one label a row can.")
    if texts.labels is None:
        return None
    said = texts.labels
    known = [number for number, label in enumerate(said) if label is not None]
    found = torch.from_numpy(class_numbers(replace(texts, labels=[said[number] for number in known]), model))
    empty = float("nan") if found.is_floating_point() else IGNORED
    labels = torch.full((len(said),), empty, dtype=found.dtype)
    labels[torch.tensor(known)] = found
    return labels


def _with_text(texts: Texts) -> Texts:
    """Without the rows that hold none."""
    kept = [number for number, row in enumerate(texts.rows) if row.strip()]
    if not kept:
        raise BadData(f"{texts.description} has no row with text in it.")
    labels = None if texts.labels is None else [texts.labels[number] for number in kept]
    return replace(texts, rows=[texts.rows[number] for number in kept], labels=labels, running=False)


def evenly(rows: int, count: int) -> list[int]:
    """Numbers of evenly spaced rows."""
    return window_starts(rows, count, 1, 0)  # as `windows` chooses rows with seed 0


def collator(
    task: str, reader: Any, regression: bool = False, masks: int | None = None
) -> Callable[[Sequence[Batch]], Batch]:
    """Samples → batch, for a task.

    Args:
        reader: of `training.reading`; None for token ids that need neither padding nor masking.
        regression: labels are numbers.
        masks: a seed with which each sample is masked in one way for good; None masks it anew each time.
    """
    pad = getattr(reader, "pad_token_id", None) or 0

    def collate(samples: Sequence[Batch]) -> Batch:
        batch = _pictures(samples) if task == IMAGES else padded([sample[IDS] for sample in samples], pad)
        if task == "causal-lm":
            return {**batch, **_next_tokens(batch)}
        if task == "masked-lm":
            drawn = None if masks is None else [_generator(sample["input_ids"], masks) for sample in samples]
            return {**batch, **_masked(batch, reader, drawn)}
        rows = len(samples)
        unknown = torch.full((rows,), float("nan")) if regression else torch.full((rows,), IGNORED)
        labels = torch.stack([sample["labels"] for sample in samples]) if "labels" in samples[0] else unknown
        return {**batch, "labels": labels, "scored": torch.ones(rows, dtype=torch.bool)}

    return collate


def padded(rows: Sequence[Tensor], pad: int) -> Batch:
    """Rows of token ids as one batch, with a mask where lengths differ."""
    longest = max(map(len, rows))
    if all(len(row) == longest for row in rows):
        return {"input_ids": torch.stack(list(rows))}
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def _pictures(samples: Sequence[Batch]) -> Batch:
    shapes = {tuple(sample[PIXELS].shape) for sample in samples}
    if len(shapes) > 1:
        raise BadData(
            f"The processor makes images of several sizes ({' and '.join(map(str, sorted(shapes)))}), which are no "
            "batch; take --batch-size 1, or a processor that makes all alike."
        )
    return {PIXELS: torch.stack([sample[PIXELS] for sample in samples])}


def rows_of(batch: Mapping[str, Tensor]) -> list[np.ndarray]:
    """Of each row what the model reads: token ids without padding, or pixel values."""
    if PIXELS in batch:
        return list(batch[PIXELS].cpu().numpy())
    ids = batch["input_ids"].cpu().numpy()
    if "attention_mask" not in batch:
        return list(ids)
    return [row[there] for row, there in zip(ids, batch["attention_mask"].cpu().numpy() > 0, strict=True)]


def key_of(row: np.ndarray) -> bytes:
    """A digest of token ids or pixel values, 16 bytes."""
    if row.dtype.kind != "f":
        return hashlib.blake2b(np.ascontiguousarray(row, dtype="<i8").tobytes(), digest_size=16).digest()
    pixels = np.ascontiguousarray(row, dtype="<f4").tobytes()
    return hashlib.blake2b(f"{row.shape}".encode() + pixels, digest_size=16).digest()


def _next_tokens(batch: Batch) -> Batch:
    """At each position the token that follows; nothing at the last one."""
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[:, :-1] = batch["input_ids"][:, 1:]
    if "attention_mask" in batch:
        labels[:, :-1][batch["attention_mask"][:, 1:] == 0] = IGNORED
    return {"labels": labels, "scored": labels != IGNORED}


def _masked(batch: Batch, tokenizer: Any, generators: Sequence[torch.Generator] | None) -> Batch:
    """What was hidden, where it was; drawn anew each time, from torch's own state, which a resumed run restores, or of
    each row by its own generator."""
    ids = batch["input_ids"]
    special = torch.isin(ids, torch.tensor(sorted(tokenizer.all_special_ids)))
    if generators is None:
        chance, draw, others = torch.rand(ids.shape), torch.rand(ids.shape), torch.randint(len(tokenizer), ids.shape)
    else:  # token by token, so that padding changes nothing
        drawn = [torch.rand(ids.shape[1], 3, generator=one) for one in generators]
        chance, draw, share = torch.stack(drawn).unbind(-1)
        others = (share * len(tokenizer)).long()
    hidden = (chance < _MASKED) & ~special
    shown = torch.where(hidden & (draw < _AS_MASK), torch.full_like(ids, tokenizer.mask_token_id), ids)
    shown = torch.where(hidden & (draw >= 1 - _AS_ANY), others, shown)
    return {"input_ids": shown, "labels": torch.where(hidden, ids, torch.full_like(ids, IGNORED)), "scored": hidden}


def _generator(ids: Tensor, seed: int) -> torch.Generator:
    """Of a sample, whatever its place in the data."""
    digest = hashlib.blake2b(key_of(ids.numpy()) + str(seed).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
