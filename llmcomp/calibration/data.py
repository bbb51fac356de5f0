"""Text for calibration and evaluation, and how it becomes token windows and batches.

Sources: 'default' (WikiText-2 where it is cached or reachable, else the text that ships), 'sample' (the text
that ships), a local file (llmcomp.calibration.files), or a Hub dataset `name[:config[:split]]`. Calibration
never reads a test split. Running text (plain files, WikiText) is joined again before it is tokenized; rows of
a table stay apart for classifiers and are joined for language models.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcomp.calibration import files
from llmcomp.calibration.hub_data import dataset_columns
from llmcomp.errors import BadData
from llmcomp.progress import Progress, Silent

WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
LANGUAGE_MODELS = ("causal-lm", "masked-lm", "seq2seq-lm", "image-text-to-text")
_WRITES_ON = ("causal-lm", "image-text-to-text")  # an end token in the middle of a text would say that it ended
_DATASET = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?(:[^:/]+){0,2}")
_HELD_OUT = re.compile(r"(?i)(^|[^a-z])(test|valid|validation|dev|eval|evaluation|heldout)([^a-z]|$)")
_WHOLE = 2_000_000  # characters that are tokenized in two or three seconds
_CHARACTERS_PER_TOKEN = 8  # rarely more, on average over a window


@dataclass
class Texts:
    """What a source holds.

    Attributes:
        rows: texts; for running text its paragraphs, which "\\n\\n" joins to the original.
        labels: one per row (numbers or names; None of a row without one, where that was allowed), or None.
        description: what was read, in words.
        warnings: one sentence each.
        running: the rows follow each other.
        input_ids: int64 [samples, tokens] of a pre-tokenized source, which has no rows.
        partners: the second text of each row, where two columns were asked for.
    """

    rows: list[str]
    labels: list[Any] | None
    description: str
    warnings: list[str] = field(default_factory=list)
    running: bool = False
    input_ids: Tensor | None = None
    partners: list[str] | None = None


@dataclass(frozen=True)
class Batch:
    """input_ids int64 [B, T]; attention_mask int64 [B, T], 1 for tokens, or None where nothing is padded.

    `context`: what the model reads besides, by name: pixels, features, or what the encoder of an encoder-decoder reads,
    whose decoder reads input_ids. T is 0 for a model that reads no tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    context: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens, padding excluded."""
        return int(self.input_ids.numel() if self.attention_mask is None else self.attention_mask.sum())


def read_texts(
    source: str,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    split: str = "train",
    paired: bool = False,
    gaps: bool = False,
    progress: Progress | None = None,
) -> Texts:
    """Read calibration data.

    Args:
        source: see the head of this module; 'sample:classifier' is the labelled text of that sample model.
        text_column, label_column: in tables; guessed from usual names where None. One text column each.
        split: of a Hub dataset that names none.
        paired: `text_column` may name two, 'first,second'. gaps: rows may lack a label that others have.
        progress: hears which text 'default' meant.

    Raises:
        BadData: a test or validation split; missing, empty or unreadable data; a column that is not there.
    """
    refuse_held_out(source, split)
    texts = _read(source, text_column, label_column, split, progress or Silent(), held_out=False, gaps=gaps)
    if texts.partners is not None and not paired:
        raise BadData(f"Calibration reads one text column, not two ({text_column}); name the one to read.")
    texts.warnings += held_out_warnings(source)
    return texts


def refuse_held_out(source: str, split: str = "train") -> None:
    """Raises:
        BadData: a source that names a test or validation split.
    """
    named = _split_of(source) or split
    if _HELD_OUT.search(named):
        raise BadData(
            f"Calibration never reads a held-out split ({named!r} of {source}); use its train split."
        )


def held_out_warnings(source: str) -> list[str]:
    """What is odd about a file's or folder's name."""
    if _is_file(source) and _HELD_OUT.search(Path(source).stem):
        return [f"{source} looks like held-out data by its name; calibrate on training data."]
    return []


def evaluation_texts(
    source: str = "default",
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    split: str = "test",
    progress: Progress | None = None,
) -> Texts:
    """Read data to measure on: as `read_texts`, but of held-out text and test splits. For sentence encoders
    `text_column` may name two columns, 'first,second', whose rows are pairs.

    'default' is WikiText-2 test where cached or reachable, else the held-out text that ships; 'sample',
    'sample:lm' and 'sample:classifier' are the held-out text and rows that ship.

    Raises:
        BadData: as `read_texts`.
    """
    return _read(source, text_column, label_column, split, progress or Silent(), held_out=True)


def windows(
    texts: Texts,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    task: str,
    max_length: int | None = None,
) -> list[Tensor]:
    """Token ids of at most `samples` samples, each int64 of at most `length` tokens. Deterministic.

    Running text, and all text for language models, is cut into windows of exactly `length` that do not
    overlap, evenly spaced; the seed shifts them. Each begins (encoders: and ends) with the special tokens
    that the tokenizer adds by default, which count towards the length; a decoder whose tokenizer adds none
    gets none. Rows for other tasks are evenly spaced rows, special tokens included, cut at `length`.

    Args:
        tokenizer: of transformers; None is enough for pre-tokenized texts.
        task: as `Adapter.task`.
        max_length: the model's positions; a longer `length` is clipped to it.

    Raises:
        BadData: fewer tokens than one sample, no row with text, or nothing asked for.
    """
    length = min(length, max_length or length)
    if samples < 1 or length < 1:
        raise BadData(f"Asked for {samples} samples of {length} tokens; both must be at least 1.")
    if texts.input_ids is not None:
        return [row[:length].clone() for row in texts.input_ids[:samples]]
    if not texts.running and task not in LANGUAGE_MODELS:
        return _row_windows(texts, tokenizer, samples, length, seed)
    prefix, suffix = special_affixes(tokenizer)
    if task in _WRITES_ON:
        suffix = []
    body = length - len(prefix) - len(suffix)
    if body < 1:
        raise BadData(
            f"Samples of {length} tokens leave no room beside the special tokens; use a larger length."
        )
    text = "\n\n".join(texts.rows)
    pieces = _thinned(text, tokenizer, samples, body, seed)
    if pieces is None:
        ids = _token_ids(tokenizer, text)
        if len(ids) < body:
            raise BadData(
                f"{texts.description} has {len(ids):,} tokens, fewer than one sample of {length:,}; "
                "give more text or a smaller --sequence-length."
            )
        starts = window_starts(len(ids), min(samples, len(ids) // body), body, seed)
        pieces = [ids[start : start + body] for start in starts]
    return [torch.tensor(prefix + piece + suffix, dtype=torch.int64) for piece in pieces]


def window_starts(tokens: int, count: int, length: int, seed: int) -> list[int]:
    """Where `count` windows begin: evenly spaced, shifted by a share of the spacing, none overlapping.

    Shares of seeds 0, 1, 2, 3, 4 …: 0, 1/3, 2/3, 1/9, 4/9 … (the digits of the seed in base three, mirrored),
    so no two seeds take the same windows of a text that is long enough.
    """
    share, digit = 0.0, 1 / 3
    while seed:
        seed, rest = divmod(seed, 3)
        share, digit = share + rest * digit, digit / 3
    spacing = (tokens - length) / count
    if spacing >= length:
        return [int((i + share) * spacing) for i in range(count)]
    spacing = tokens // count  # tight: only what is left between two windows can be shifted
    return [int(i * spacing + share * (spacing - length)) for i in range(count)]


def special_affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts by default before and after one text: ([CLS], [SEP]), (<s>, nothing) …"""
    probe = "a"
    inner = tokenizer(probe, add_special_tokens=False)["input_ids"]
    outer = tokenizer(probe)["input_ids"]
    for start in range(len(outer) - len(inner) + 1):
        if outer[start : start + len(inner)] == inner:
            return list(outer[:start]), list(outer[start + len(inner) :])
    return [], []


def describe(texts: Texts, found: Sequence[Tensor], tokenizer: Any, task: str) -> str:
    """One phrase on what the windows are: source, how many of what length, which token they begin with."""
    lengths = sorted({len(window) for window in found})
    size = f"{lengths[0]:,}" if len(lengths) == 1 else f"{lengths[0]:,} to {lengths[-1]:,}"
    words = f"{texts.description}: {len(found):,} samples of {size} tokens, {sum(map(len, found)):,} in all"
    if texts.input_ids is not None:
        return words
    prefix, suffix = special_affixes(tokenizer)
    if not prefix:
        return f"{words}, no beginning token"
    first = " ".join(tokenizer.convert_ids_to_tokens(prefix))
    last = " ".join(tokenizer.convert_ids_to_tokens(suffix)) if task not in _WRITES_ON else ""
    return f"{words}, each in {first} … {last}" if last else f"{words}, each beginning with {first}"


def batches(found: Sequence[Tensor], *, tokens_per_batch: int, pad_id: int | None) -> list[Batch]:
    """Group windows of like length, shortest first; the same windows always give the same batches.

    Args:
        tokens_per_batch: rows × longest row stay within it, but a batch has at least one row.
        pad_id: token that fills shorter rows on the right; None is taken as 0 (it is masked anyway).
    """
    result: list[Batch] = []
    group: list[Tensor] = []
    for window in sorted(found, key=len):  # stable
        if group and (len(group) + 1) * len(window) > tokens_per_batch:
            result.append(_padded(group, pad_id or 0))
            group = []
        group.append(window)
    return [*result, _padded(group, pad_id or 0)] if group else result


def fingerprint(found: Sequence[Tensor]) -> str:
    """SHA-256 (hexadecimal) of the token ids in their order: equal if a resumed run reads the same data."""
    digest = hashlib.sha256()
    for window in found:
        digest.update(len(window).to_bytes(8, "little"))
        digest.update(window.to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _padded(group: list[Tensor], pad_id: int) -> Batch:
    longest = max(map(len, group))
    if all(len(window) == longest for window in group):
        return Batch(torch.stack(group))
    ids = torch.full((len(group), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(group):
        ids[row, : len(window)] = window
        mask[row, : len(window)] = 1
    return Batch(ids, mask)


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: a text longer than the model is what is wanted here, not worth a warning.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _thinned(text: str, tokenizer: Any, samples: int, length: int, seed: int) -> list[list[int]] | None:
    """Windows of a text far longer than needed, from evenly spaced stretches of it; None where it is not.

    Ten megabytes take ten seconds to tokenize on one core, of which a calibration reads one twentieth.
    """
    stretch = length * _CHARACTERS_PER_TOKEN
    if len(text) < max(_WHOLE, samples * stretch):
        return None
    pieces = []
    for start in window_starts(len(text), samples, stretch, seed):
        part = text[start : start + stretch]
        word = re.search(r"\s", part) if start else None  # begin at a word
        pieces.append(_token_ids(tokenizer, part[word.end() :] if word else part)[:length])
    return pieces if all(len(piece) == length for piece in pieces) else None


def _row_windows(texts: Texts, tokenizer: Any, samples: int, length: int, seed: int) -> list[Tensor]:
    rows = [row for row in texts.rows if row.strip()]
    if not rows:
        raise BadData(f"{texts.description} has no row with text in it.")
    chosen = [rows[start] for start in window_starts(len(rows), min(samples, len(rows)), 1, seed)]
    encoded = tokenizer(chosen, truncation=True, max_length=length)["input_ids"]
    return [torch.tensor(ids, dtype=torch.int64) for ids in encoded]


def _read(
    source: str,
    text_column: str | None,
    label_column: str | None,
    split: str,
    progress: Progress,
    *,
    held_out: bool,
    gaps: bool = False,
) -> Texts:
    if source == "default":
        return _default("test" if held_out else "train", held_out, progress)
    if source == "sample:classifier":
        return _shipped_rows(held_out)
    if source == "sample" or source.startswith("sample:"):
        return _shipped_text(held_out)
    if _is_file(source):
        return _file(Path(source).expanduser(), text_column, label_column, gaps)
    if not _DATASET.fullmatch(source):
        raise BadData(
            f"{source!r} is neither a file nor a Hub dataset; expected a path or org/name[:config[:split]]."
        )
    name, config, named = [*source.split(":"), None, None][:3]
    columns = dataset_columns(str(name), config, named or split)
    return _table(columns, text_column, label_column, f"{source} ({named or split})", gaps)


def _default(split: str, held_out: bool, progress: Progress) -> Texts:
    try:
        rows = dataset_columns(*WIKITEXT, split)["text"]
    except BadData as error:
        texts = _shipped_text(held_out)
        progress.note(f"Taking {texts.description}, since WikiText-2 cannot be had: {error}")
        return texts
    progress.note(f"Taking WikiText-2 {split}.")
    return Texts(rows, None, f"WikiText-2 {split} ({WIKITEXT[0]}, {WIKITEXT[1]})", running=True)


def _shipped_text(held_out: bool) -> Texts:
    from llmcomp.samples import calibration_text, validation_text

    text = files.read_text(validation_text() if held_out else calibration_text())
    kind = "held-out " if held_out else ""
    description = f"the {kind}text that ships with llmcomp (documentation of Python's standard library)"
    return Texts(text.split("\n\n"), None, description, running=True)


def _shipped_rows(held_out: bool) -> Texts:
    from llmcomp.samples import classifier_calibration, classifier_validation

    path = classifier_validation() if held_out else classifier_calibration()
    columns = files.read_columns(path)
    kind = "held-out " if held_out else ""
    description = (
        f"the {kind}labelled rows that ship with llmcomp (documentation of Python's standard library)"
    )
    return Texts(columns["text"], columns["label"], description)


def _file(path: Path, text_column: str | None, label_column: str | None, gaps: bool) -> Texts:
    files.require(path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        ids = files.read_token_ids(path)
        return Texts([], None, f"{path}, {len(ids):,} samples of token ids", running=True, input_ids=ids)
    if suffix == ".txt":
        if text_column or label_column:
            raise BadData(f"{path} is plain text without columns; drop --text-column and --label-column.")
        return Texts(files.read_text(path).split("\n\n"), None, str(path), running=True)
    return _table(files.read_columns(path), text_column, label_column, str(path), gaps)


def _table(columns: dict[str, list[Any]], text: str | None, label: str | None, where: str, gaps: bool) -> Texts:
    """Rows of a table; `text` may name two columns, 'first,second'."""
    first, second = files.text_columns(columns, text)
    rows = files.text_column(columns, first, where)
    partners = None if second is None else files.text_column(columns, second, where)
    labels = files.label_column(columns, label, where, gaps)
    return Texts(rows, labels, f"{where}, {len(rows):,} rows", partners=partners)


def _is_file(source: str) -> bool:
    path = Path(source).expanduser()
    return path.exists() or path.suffix.lower() in files.SUFFIXES or source.startswith((".", "/", "~"))


def _split_of(source: str) -> str | None:
    """The split that `name:config:split` names."""
    parts = source.split(":")
    return parts[2] if len(parts) == 3 and not _is_file(source) else None
