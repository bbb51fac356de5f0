"""What is measured on: which positions of a batch are scored, and against which token.

Causal models, and decoders beside an encoder: every token but the first of a window, from the position before it.
Masked models: pseudo-perplexity (Salazar et al. 2020, arXiv 1910.14659) over one seeded choice of 15% of a window's
tokens, all of them replaced by the mask token at once; exact pseudo-perplexity would cost one forward per token.
Padding is neither scored nor attended to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llmcomp.errors import BadData
from llmcomp.measure.embeddings import Sentences

MASKED_SHARE = 0.15


class TokenBatch(Protocol):
    """Token ids [rows, length] with an attention mask of the same shape, None where nothing is padded; `context`: what
    the model reads besides, by name (`llmcomp.feeds.call`)."""

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def attention_mask(self) -> Tensor | None: ...

    @property
    def context(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Masking:
    """How a masked language model is asked.

    Attributes:
        mask_id: the mask token.
        special_ids: never masked (separators, padding).
        seed: of the choice; window number and seed alone decide it, not how windows are batched.
    """

    mask_id: int
    special_ids: frozenset[int] = frozenset()
    seed: int = 0


@dataclass(frozen=True)
class Subject:
    """What is measured on, beside the batches.

    Attributes:
        task: see `llmcomp.adapters.base.Adapter.task`.
        data: in words, for the report.
        labels: [rows], class numbers or scores; None where there are none.
        masking: how a masked language model is asked, else None.
        seed: of the bootstrap.
        sentences: of a sentence encoder, which texts the batches hold and what is done with them, else None.
        positions_at_once: positions whose logits exist together, None for `forward.BYTES_AT_ONCE`' worth.
    """

    task: str
    data: str = ""
    labels: np.ndarray | None = None
    masking: Masking | None = None
    seed: int = 0
    sentences: Sentences | None = None
    positions_at_once: int | None = None


@dataclass(frozen=True)
class Scored:
    """What to feed and what to score.

    Attributes:
        input_ids: [rows, length], with mask tokens where a masked model is asked.
        rows, columns: [positions], where the prediction stands.
        targets: [positions], the right token.
    """

    input_ids: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor


def causal(batch: TokenBatch) -> Scored:
    """Each real token of a window is predicted from the position before it."""
    ids, real = batch.input_ids, _real(batch)
    rows, columns = (real[:, :-1] & real[:, 1:]).nonzero(as_tuple=True)
    return Scored(ids, rows, columns, ids[rows, columns + 1])


def masked(batch: TokenBatch, masking: Masking, first_window: int) -> Scored:
    """15% of each window's ordinary tokens, at least one, hidden behind the mask token.

    Args:
        first_window: number of the batch's first row among all windows.
    """
    ids = batch.input_ids
    allowed = _real(batch)
    if masking.special_ids:
        allowed &= ~torch.isin(ids, torch.tensor(sorted(masking.special_ids), device=ids.device))
    chosen = torch.zeros_like(allowed)
    for row in range(len(ids)):
        places = allowed[row].nonzero()[:, 0]
        if len(places):
            generator = torch.Generator().manual_seed(masking.seed * 1_000_003 + first_window + row)
            order = torch.randperm(len(places), generator=generator).to(places.device)
            chosen[row, places[order[: max(1, round(MASKED_SHARE * len(places)))]]] = True
    rows, columns = chosen.nonzero(as_tuple=True)
    return Scored(ids.masked_fill(chosen, masking.mask_id), rows, columns, ids[rows, columns])


def scored(
    batches: Iterable[TokenBatch], task: str, masking: Masking | None
) -> Iterable[tuple[TokenBatch, Scored]]:
    """Each batch with what is scored in it.

    Raises:
        BadData: a masked language model without a mask token.
    """
    if task == "masked-lm" and masking is None:
        raise BadData("A masked language model needs the id of its mask token; the tokenizer names none.")
    window = 0
    for batch in batches:
        yield (
            batch,
            causal(batch) if masking is None else masked(batch, masking, window),
        )
        window += len(batch.input_ids)


def real_positions(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Rows and columns of everything that is not padding."""
    rows, columns = _real(batch).nonzero(as_tuple=True)
    return rows, columns


def count_rows(batches: Sequence[TokenBatch]) -> int:
    return sum(len(batch.input_ids) for batch in batches)


def _real(batch: TokenBatch) -> Tensor:
    if batch.attention_mask is None:
        return torch.ones_like(batch.input_ids, dtype=torch.bool)
    return batch.attention_mask.bool()
