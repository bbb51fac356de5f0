"""More text of the kind that there is: words replaced by what a masked language model finds likely in their place.

TinyBERT's data augmentation (arXiv:1909.10351, algorithm 1), by which a small student sees what its teacher says of
sentences that nobody wrote:

    for each of N copies of a sentence
        for each of its words
            with probability p replace it by one of K candidates, drawn evenly

Candidates of a word that is one piece for the tokenizer are the likeliest words where it is masked. The paper takes
those of a word of several pieces from GloVe; here they are the words whose embedding in the same model lies nearest, by
the cosine, to the mean of the pieces'. Candidates are found once for each sentence, as the authors' program does. A
copy has no label: it may say the opposite, and the teacher says what.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcomp.calibration.data import Texts
from llmcomp.errors import BadCheckpoint, BadData
from llmcomp.formats.save import writing
from llmcomp.matmul import WideProducts
from llmcomp.progress import Progress, Silent

_WORD = re.compile(r"[^\W\d_]+")
_AT_ONCE = 1 << 12  # tokens of a forward


@dataclass(frozen=True)
class Augmentation:
    """How much is made of a text.

    Attributes:
        copies: N, of each row. share: p, of its words that are replaced. candidates: K, for each of them.
        seed: of all draws; those of a row depend on nothing else but its text and number.
    """

    copies: int = 20
    share: float = 0.4
    candidates: int = 15
    seed: int = 0

    def check(self) -> None:
        """Refuse numbers that cannot be.

        Raises:
            BadData: naming one.
        """
        if self.copies < 1 or self.candidates < 1 or not 0 < self.share <= 1:
            raise BadData(
                f"Augmentation takes at least 1 copy and 1 candidate and a share above 0 and at most 1, and was given "
                f"{self.copies}, {self.candidates} and {self.share}."
            )


@dataclass
class Filler:
    """A masked language model that says what could stand in a word's place.

    Attributes:
        words: texts of the tokens that are a word by themselves; ids: theirs [n]; vectors: their embeddings, of
            length 1 [n, C].
    """

    model: Any
    tokenizer: Any
    words: list[str] = field(default_factory=list)
    ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    vectors: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Filler:
        """Of a model in eval mode and its tokenizer, a fast one.

        Raises:
            BadCheckpoint: no mask token, or no token that is a word.
        """
        if tokenizer.mask_token_id is None or not tokenizer.is_fast:
            raise BadCheckpoint("Augmentation wants a masked language model whose fast tokenizer has a mask token.")
        known = whole_words(tokenizer)
        if not known:
            raise BadCheckpoint("No token of the masked language model is a word by itself.")
        ids = torch.tensor(list(known))
        vectors = model.get_input_embeddings().weight.detach().float().cpu()
        return cls(model, tokenizer, list(known.values()), ids, torch.nn.functional.normalize(vectors[ids], dim=-1))

    def candidates(self, text: str, count: int) -> list[tuple[int, int, list[str]]]:
        """(start, end, likeliest words first) for each word of a text that the model reads."""
        made = self.tokenizer(text, return_offsets_mapping=True, truncation=True)
        ids, spans = made["input_ids"], made["offset_mapping"]
        words = list(_words_of(text, spans))
        single = [pieces[0] for _, _, pieces in words if len(pieces) == 1]
        likely = dict(zip(single, self._masked(ids, single, count), strict=True))
        found = []
        for start, end, pieces in words:
            near = likely[pieces[0]] if len(pieces) == 1 else self._near([ids[piece] for piece in pieces], count)
            found.append((start, end, near))
        return found

    def _masked(self, ids: list[int], places: Sequence[int], count: int) -> list[list[str]]:
        """The likeliest words at each place, where that alone is masked."""
        rows, found = torch.tensor(ids).repeat(len(places), 1), list[list[str]]()
        rows[torch.arange(len(places)), torch.tensor(list(places), dtype=torch.int64)] = self.tokenizer.mask_token_id
        device = next(self.model.parameters()).device
        size = max(1, _AT_ONCE // len(ids))
        for start in range(0, len(places), size):
            part = rows[start : start + size].to(device)
            with torch.inference_mode():
                logits = self.model(input_ids=part, attention_mask=torch.ones_like(part)).logits.float().cpu()
            at = logits[torch.arange(len(part)), torch.tensor(places[start : start + size])][:, self.ids]
            found += self._texts(at, count)
        return found

    def _near(self, pieces: list[int], count: int) -> list[str]:
        """Words whose embedding is nearest to the mean of the pieces'."""
        weight = self.model.get_input_embeddings().weight.detach()
        mean = weight[torch.tensor(pieces, device=weight.device)].float().mean(0).cpu()
        return self._texts((self.vectors @ mean)[None], count)[0]

    def _texts(self, scores: Tensor, count: int) -> list[list[str]]:
        best = scores.topk(min(count, len(self.words)), dim=-1).indices
        return [[self.words[number] for number in row] for row in best.tolist()]


def whole_words(tokenizer: Any) -> dict[int, str]:
    """{id: word} of the tokens that stand for a word of letters within a text, in the order of ids."""
    special, found = set(tokenizer.all_special_ids), dict[int, str]()
    numbers = [number for number in range(len(tokenizer)) if number not in special]
    texts = [text.strip() for text in tokenizer.batch_decode([[number] for number in numbers])]
    texts = [text for text in dict.fromkeys(texts) if _WORD.fullmatch(text)]
    if not texts:
        return found
    # Behind a blank, as within a text: some tokenizers have other tokens for a word that begins one.
    made = tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, made, strict=True):
        if len(ids) == 1 and ids[0] not in special:
            found.setdefault(ids[0], text)
    return dict(sorted(found.items()))


def _words_of(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, list[int]]]:
    """(start, end, numbers of its pieces) of each word of letters that tokens cover, and no other character."""
    places = [(start + len(text[start:end]) - len(text[start:end].lstrip()), end) for start, end in spans]
    for word in _WORD.finditer(text):
        start, end = word.span()
        pieces = [number for number, (one, other) in enumerate(places) if one < other and start < other and one < end]
        if pieces and places[pieces[0]][0] == start and places[pieces[-1]][1] == end:
            yield start, end, pieces


def copies_of(
    text: str, found: Sequence[tuple[int, int, list[str]]], settings: Augmentation, random: np.random.Generator
) -> list[str]:
    """The copies of one sentence.

    Args:
        found: as `Filler.candidates` gives them.
    """
    made = []
    for _ in range(settings.copies):
        parts, last = [], 0
        for start, end, words in found:
            if random.random() <= settings.share:
                parts += [text[last:start], words[int(random.integers(len(words)))]]
                last = end
        made.append("".join([*parts, text[last:]]))
    return made


def augment(
    texts: Texts, filler: Filler, settings: Augmentation, output: Path, progress: Progress | None = None, *,
    columns: tuple[str, str] = ("text", "label"),
) -> Path:  # fmt: skip
    """Write rows and their copies as .jsonl; a copy's label is null. What a killed run has written is gone on with, and
    gives the same bytes.

    Args:
        texts: rows, with labels or without. columns: keys of the text and the label.

    Raises:
        BadData: nothing to augment, or numbers that cannot be.
    """
    settings.check()
    if texts.input_ids is not None or texts.running or not texts.rows:
        raise BadData(f"{texts.description} has no rows; augmentation is for a table of sentences.")
    progress = progress or Silent()
    partial, done = _partial(texts, filler, settings, output)
    progress.phase("augment", len(texts.rows))
    progress.step(done)
    with writing(output), partial.open("ab") as file, WideProducts():
        for number in range(done, len(texts.rows)):
            row = texts.rows[number]
            seed = hashlib.sha256(f"{settings.seed} {number} {row}".encode()).digest()
            random = np.random.default_rng(list(seed))
            label = None if texts.labels is None else texts.labels[number]
            copies = copies_of(row, filler.candidates(row, settings.candidates), settings, random)
            lines = [(row, label), *((copy, None) for copy in copies)]
            said = [json.dumps(dict(zip(columns, line, strict=True)), ensure_ascii=False) + "\n" for line in lines]
            file.write("".join(said).encode())
            file.flush()
            progress.step()
    partial.replace(output)
    return output


def _partial(texts: Texts, filler: Filler, settings: Augmentation, output: Path) -> tuple[Path, int]:
    """The file that is being written, cut to whole rows, and how many of them it has."""
    said = repr((settings, texts.rows, texts.labels, filler.model.config.to_json_string()))
    first = next(filler.model.parameters()).detach().float().flatten()[:4096].cpu().numpy().tobytes()
    name = hashlib.sha256(said.encode() + first).hexdigest()[:12]
    partial, size = output.parent / f".{output.name}.{name}.partial", settings.copies + 1
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        lines = partial.read_bytes().splitlines(keepends=True) if partial.exists() else []
        done = sum(line.endswith(b"\n") for line in lines) // size
        partial.write_bytes(b"".join(lines[: done * size]))
    return partial, done
