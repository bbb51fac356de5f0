"""What is odd about calibration data: one sentence each, with counts. Nothing is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmcomp.calibration.data import LANGUAGE_MODELS, Texts
from llmcomp.errors import BadData

FEW_TOKENS = 16_384  # Gram matrices of a few thousand inputs settle around here
MANY_UNKNOWN = 0.05
_LONG = 100  # characters from which a repeated paragraph of running text is no heading
_LOOKED_AT = 512  # rows tokenized again to see how many were cut


def lint(
    texts: Texts,
    found: Sequence[Tensor],
    tokenizer: Any,
    *,
    samples: int | None = None,
    task: str | None = None,
    vocabulary: int | None = None,
) -> list[str]:
    """Warnings on data that was read (`texts`) and cut into windows (`found`), those of `texts` first.

    Args:
        tokenizer: of transformers, or None for pre-tokenized texts.
        samples: how many were asked for.
        task: as `windows` was told; without it, nothing is said of rows that were cut.
        vocabulary: rows of the model's embedding; default the tokenizer's size.

    Raises:
        BadData: token ids outside of the vocabulary, which come from another model's tokenizer.
    """
    size = vocabulary or (len(tokenizer) if tokenizer is not None else None)
    tokens = torch.cat(list(found)) if found else torch.empty(0, dtype=torch.int64)
    if size is not None and tokens.numel() and int(tokens.max()) >= size:
        outside = int((tokens >= size).sum())
        raise BadData(
            f"{texts.description}: {outside:,} of {tokens.numel():,} token ids lie outside of the model's "
            f"vocabulary of {size:,} (largest {int(tokens.max()):,}); use this model's own tokenizer."
        )
    return [
        *texts.warnings,
        *_rows(texts),
        *_amount(found, tokens, samples),
        *_truncated(texts, found, tokenizer, task),
        *_padding(tokens, tokenizer),
        *_unknown(tokens, tokenizer),
    ]


def _rows(texts: Texts) -> list[str]:
    result = []
    total = len(texts.rows)
    empty = sum(not row.strip() for row in texts.rows)
    if empty and not texts.running:  # between paragraphs, blank lines are no fault
        result.append(f"{empty:,} of {total:,} rows are empty and were left out.")
    counts = Counter(
        row.strip() for row in texts.rows if row.strip() and (not texts.running or len(row) >= _LONG)
    )
    repeated = sum(count - 1 for count in counts.values())
    if repeated > (0.01 * total if texts.running else 0):  # a long text repeats a paragraph here and there
        kind = "paragraphs" if texts.running else "rows"
        result.append(f"{repeated:,} of {total:,} {kind} repeat an earlier one exactly.")
    return result


def _amount(found: Sequence[Tensor], tokens: Tensor, samples: int | None) -> list[str]:
    result = []
    if samples is not None and len(found) < samples:
        result.append(f"The data gave {len(found):,} samples; {samples:,} were asked for.")
    if tokens.numel() < FEW_TOKENS:
        result.append(
            f"Only {tokens.numel():,} tokens to calibrate on; {FEW_TOKENS:,} or more give steadier results."
        )
    return result


def _truncated(texts: Texts, found: Sequence[Tensor], tokenizer: Any, task: str | None) -> list[str]:
    joined = texts.running or task is None or task in LANGUAGE_MODELS
    if joined or tokenizer is None or not found:
        return []
    rows = [row for row in texts.rows if row.strip()]
    rows = rows[:: -(-len(rows) // _LOOKED_AT)]
    longest = max(map(len, found))
    cut = sum(len(ids) > longest for ids in tokenizer(rows, verbose=False)["input_ids"])
    if not cut:
        return []
    return [f"{cut:,} of {len(rows):,} rows looked at are longer than {longest:,} tokens and were cut there."]


def _padding(tokens: Tensor, tokenizer: Any) -> list[str]:
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or pad in (tokenizer.eos_token_id, tokenizer.bos_token_id) or not tokens.numel():
        return []
    padded = int((tokens == pad).sum())
    share = padded / tokens.numel()
    return (
        [f"{share:.0%} of the tokens are padding ({padded:,} of {tokens.numel():,})."] if share > 0.01 else []
    )


def _unknown(tokens: Tensor, tokenizer: Any) -> list[str]:
    unknown = getattr(tokenizer, "unk_token_id", None)
    # GPT-2 and its kin name their end token as unknown; a byte-level vocabulary knows every text.
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) or not tokens.numel():
        return []
    special = torch.tensor([i for i in tokenizer.all_special_ids if i != unknown], dtype=torch.int64)
    ordinary = tokens[~torch.isin(tokens, special)]
    missed = int((ordinary == unknown).sum())
    if missed <= MANY_UNKNOWN * max(1, ordinary.numel()):
        return []
    return [
        f"{missed / ordinary.numel():.0%} of the tokens ({missed:,} of {ordinary.numel():,}) are unknown "
        "to the tokenizer; calibrate on text in the model's language and script."
    ]
