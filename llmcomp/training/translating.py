"""A teacher that reads the same text in tokens of its own.

A classifier's teacher is given the row as its own tokenizer has it; the classes are the same.

A language model says what comes next after so many characters, so two of them are compared where a token ends in both,
over the tokens that both vocabularies have, as text, and one outcome more, "any other token" (`llmcomp.kept`):

    L = T²/n Σ_i [Σ_{v shared} p(v|x_<i) log(p(v|x_<i) / q(v|x_<i)) + r_i log(r_i / s_i)]

over the n places i at which both have a boundary. That is exact where both would cut what follows in the same way, and
says nothing of tokens that one of them has alone. Where all of the student's tokens are the teacher's, too, there are
no others, and the teacher's distribution over them is scaled to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcomp.calibration.data import special_affixes
from llmcomp.errors import BadRecipe
from llmcomp.kept import Kept, over
from llmcomp.training.data import Batch, key_of, padded, rows_of
from llmcomp.training.distilling import Guide, Targets

Reader = Callable[[Guide], Guide]  # a teacher of its own tokens → one of the student's
_REMEMBERED = 1 << 14  # texts whose translation is kept


def shared_tokens(own: Any, its: Any) -> tuple[Tensor, Tensor]:
    """The tokens of two tokenizers that stand for the same characters: ids in one, and in the other, [k] each.

    Raises:
        BadRecipe: none at all.
    """
    one, other = _texts(own), _texts(its)
    both = sorted((number, other[text]) for text, number in one.items() if text in other)
    if not both:
        raise BadRecipe("The two tokenizers share no token, so --vocabulary shared has nothing to compare.")
    first, second = torch.tensor(both).unbind(-1)
    return first.clone(), second.clone()


def _texts(tokenizer: Any) -> dict[str, int]:
    """{characters: id}, blanks before a word among them; special tokens and pieces of characters left out."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = len(tokenizer.decode(before))
    special, found = set(tokenizer.all_special_ids), dict[str, int]()
    numbers = [number for number in range(len(tokenizer)) if number not in special]
    for number, text in zip(numbers, tokenizer.batch_decode([[*before, one] for one in numbers]), strict=True):
        said = text[start:]
        if said and "\ufffd" not in said:
            found.setdefault(said, number)
    return found


@dataclass(frozen=True)
class Translation:
    """A row in a teacher's tokens: ids int64 [L'], and for each of the student's L positions the one of the teacher
    behind the same characters, -1 where there is none."""

    ids: Tensor
    where: Tensor


def translator(own: Any, its: Any, longest: int | None) -> Callable[[np.ndarray], Translation]:
    """What translates a row of the student's ids; the last ones are remembered.

    Args:
        own, its: tokenizers, the teacher's a fast one. longest: how many tokens the teacher reads.
    """
    skipped, prefix = len(special_affixes(own)[0]), special_affixes(its)[0]

    @lru_cache(_REMEMBERED)
    def translate(row: bytes) -> Translation:
        ids = np.frombuffer(row, dtype="<i8").tolist()
        text, ends = _decoded(own, ids[skipped:])
        made = its(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        read = [*prefix, *made["input_ids"]][:longest]
        at = {0: len(prefix) - 1} if prefix else {}
        for place, (_, end) in enumerate(made["offset_mapping"], start=len(prefix)):
            if place < len(read):
                at[end] = place  # the last of the pieces of one character
        where = [at.get(0, -1)] * bool(skipped) + [at.get(end, -1) for end in ends]
        where = [-1] * (len(ids) - len(where)) + where
        return Translation(torch.tensor(read), torch.tensor([*where[:-1], -1]))  # after the last token is no label

    return lambda row: translate(np.ascontiguousarray(row, dtype="<i8").tobytes())


def _decoded(tokenizer: Any, ids: list[int]) -> tuple[str, list[int]]:
    """A text, and behind how many of its characters each token ends; -1 inside of a character."""
    text = tokenizer.decode(ids)
    parts = tokenizer.batch_decode([ids[: place + 1] for place in range(len(ids))])
    return text, [len(part) if part and text.startswith(part) else -1 for part in parts]


def aligned(
    collate: Callable[[Sequence[Batch]], Batch], translate: Callable[[np.ndarray], Translation]
) -> Callable[[Sequence[Batch]], Batch]:
    """Batches of which those positions are scored that a teacher has, too."""

    def made(samples: Sequence[Batch]) -> Batch:
        batch = collate(samples)
        scored = batch["scored"].clone()
        for number, row in enumerate(rows_of(batch)):
            scored[number, : len(row)] &= translate(row).where >= 0
        return {**batch, "scored": scored}

    return made


def of_next_tokens(
    translate: Callable[[np.ndarray], Translation], shared: tuple[Tensor, Tensor], classes: int, temperature: float,
    pad: int,
) -> Reader:  # fmt: skip
    """A language model's teacher, over the shared tokens at the positions that are aligned.

    Args:
        shared: as `shared_tokens` has them. classes: of the student. pad: a token of the teacher's.
    """
    own, its = shared

    def read(guide: Guide) -> Guide:
        def teach(inputs: Mapping[str, Tensor]) -> Targets:
            device = inputs["input_ids"].device
            found = [translate(row) for row in rows_of(inputs)]
            batch = padded([one.ids for one in found], pad)
            said = guide({name: value.to(device) for name, value in batch.items()}).logits
            assert isinstance(said, Tensor)
            picked = torch.cat([logits[one.where[one.where >= 0].to(said.device)]
                                for logits, one in zip(said, found, strict=True)])  # fmt: skip
            scaled = picked.float() / temperature
            if len(own) == classes:
                return Targets(Kept(scaled[:, its.to(device)].log_softmax(-1), None, classes))
            if len(its) == scaled.shape[-1]:  # the student alone has others, of which the teacher thinks nothing
                scaled = torch.nn.functional.pad(scaled, (0, 1), value=-60000.0)
            return Targets(Kept(over(scaled, its.to(device)), own.to(device), classes))

        return teach

    return read


def of_rows(pairs: Mapping[bytes, Tensor], pad: int) -> Reader:
    """A classifier's teacher, which reads the other half of each pair.

    Args:
        pairs: {`key_of` of a row: the same row in the teacher's ids}. pad: a token of the teacher's.
    """

    def read(guide: Guide) -> Guide:
        def teach(inputs: Mapping[str, Tensor]) -> Targets:
            batch = padded([pairs[key_of(row)] for row in rows_of(inputs)], pad)
            return guide({name: value.to(inputs["input_ids"].device) for name, value in batch.items()})

        return teach

    return read
