"""From texts to what `quality` takes: batches, with labels in the batches' order and words for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from llmcomp.calibration import batching, pairs
from llmcomp.calibration.data import Batch, Texts, batches, describe, evaluation_texts, window_starts, windows
from llmcomp.calibration.media import Media, chosen_labels, media_samples, processor_of, read_media
from llmcomp.errors import BadData
from llmcomp.feeds import decoder_start
from llmcomp.measure.embeddings import SentenceHead, Sentences
from llmcomp.measure.positions import MASKED_SHARE, Masking, Subject
from llmcomp.progress import Progress
from llmcomp.report.schema import FILE_NAME

if TYPE_CHECKING:
    from llmcomp.measure.run import Settings

_PARAGRAPHS_PER_WINDOW = 8  # about as many tokens as one window of running text
_PARAGRAPH_WORDS = 8
MEDIA = {"image-classification": "images", "speech-seq2seq": "sound"}  # what a task is measured on beside text
_IMAGE_TOKENS = 256  # about as many as an image of 224 pixels becomes
LANGUAGE_TASKS = ("causal-lm", "masked-lm", "image-text-to-text")


@dataclass(frozen=True)
class Inputs:
    """Ready to be measured on. `notes`: one sentence each, on what was left out."""

    batches: list[Batch]
    subject: Subject
    notes: list[str] = field(default_factory=list)


def default_texts(directory: str | Path, progress: Progress) -> Texts:
    """Held-out text for a model: that of the sample it was made from, else `evaluation_texts`' default."""
    model = original_model(directory)
    return evaluation_texts(model if model.startswith("sample:") else "default", progress=progress)


def default_against(directory: str | Path) -> str | None:
    """What a compressed checkpoint was made from, by its own report, where that can still be opened."""
    report, model = written_report(directory), original_model(directory)
    source = str((report.get("recovery") or report).get("source") or "")
    if model.startswith("sample:"):
        return model
    return source if source and Path(source).is_dir() else None


def original_model(directory: str | Path) -> str:
    """The name of the model that was compressed, by the checkpoint's own report, also after a recovery."""
    report = written_report(directory)
    return str((report.get("recovery") or report).get("model", ""))


def written_report(directory: str | Path) -> Mapping[str, Any]:
    """`llmcomp_report.json` as plain data; empty where there is none that can be read."""
    try:
        found = json.loads((Path(directory) / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def make_inputs(texts: Texts, tokenizer: Any, model: Any, task: str, settings: Settings) -> Inputs:
    """Windows of text for language models, rows for the others.

    Raises:
        BadData: too little text, or labels that are not the model's.
    """
    notes: list[str] = []
    if task == pairs.TASK:
        return _pairs(texts, tokenizer, model, settings)
    if texts.partners is not None:
        raise BadData(
            f"{texts.description}: two text columns are for sentence encoders (a directory with modules.json), "
            f"and the model's task is {task}; name one with --text-column."
        )
    labelled = texts.labels is not None and task == "sequence-classification"
    if texts.labels is not None and not labelled:
        notes.append(f"The labels of {texts.description} are not used: the model's task is {task}.")
    in_rows = not texts.running and texts.input_ids is None and task not in LANGUAGE_TASKS
    if in_rows:
        texts = _rows(texts, settings)
    found = windows(
        texts,
        tokenizer,
        samples=len(texts.rows) if in_rows else settings.windows,
        length=settings.sequence_length,
        seed=0 if in_rows else settings.seed,
        task=task,
        max_length=max_positions(model, tokenizer),
    )
    labels = None
    if labelled and in_rows:
        in_order = np.argsort([len(window) for window in found], kind="stable")  # as `batches` does
        if model.config.problem_type == "multi_label_classification":
            notes.append(
                "Labels are not used: a model with several labels a row is measured against its original."
            )
        else:
            labels = class_numbers(texts, model)[in_order]
    words = describe(texts, found, tokenizer, task)
    if task in LANGUAGE_TASKS:
        words += "; windows do not overlap"
    masking = None
    if task == "masked-lm":
        masking = _masking(tokenizer, settings.seed)
        words += (
            f"; pseudo-perplexity over {MASKED_SHARE:.0%} of tokens, masked at once (seed {settings.seed})"
        )
    subject = Subject(task, words, labels, masking, settings.seed)
    made = batches(found, tokens_per_batch=settings.tokens_per_batch, pad_id=tokenizer.pad_token_id)
    return Inputs(made, subject, notes)


def evaluation_data(
    task: str, source: str = "default", *, text_column: str | None = None, label_column: str | None = None,
    progress: Progress | None = None,
) -> Texts | Media:
    """Held-out data of the kind that a task is measured on.

    Raises:
        BadData: there is none, or it is of another kind.
    """
    if task in MEDIA:
        kind = MEDIA[task]
        return read_media(source, kind, text_column=text_column, label_column=label_column, split="test")
    return evaluation_texts(source, text_column=text_column, label_column=label_column, progress=progress)


def media_inputs(found: Media, directory: Path, model: Any, task: str, settings: Settings) -> Inputs:
    """Images with their labels, or sound with its transcripts, through the processor in `directory`.

    Raises:
        BadData: files that cannot be read, or labels that are not the model's.
    """
    count = settings.rows if task == "image-classification" else settings.windows
    samples = media_samples(
        found, model, processor_of(directory, model), count=count, seed=settings.seed, length=settings.sequence_length
    )
    labels, notes = None, list[str]()
    if task == "image-classification" and found.labels is not None:
        kept = replace(found, labels=chosen_labels(found, count, settings.seed))
        labels = class_numbers(kept, model)[batching.order(samples)]
    each = None if model.config.is_encoder_decoder else _IMAGE_TOKENS
    made = batching.like(samples, tokens_per_batch=settings.tokens_per_batch, tokens_each=each)
    words = f"{found.description}: {len(samples):,} samples"
    return Inputs(made, Subject(task, words, labels, seed=settings.seed), notes)


def _pairs(texts: Texts, tokenizer: Any, model: Any, settings: Settings) -> Inputs:
    """What the encoder reads and the decoder is scored on: two columns, or both halves of windows."""
    notes = []
    if texts.labels is not None:
        notes.append(f"The labels of {texts.description} are not used: the model's task is {pairs.TASK}.")
    found = pairs.pairs(
        texts, tokenizer, samples=settings.windows if texts.partners is None else settings.rows,
        length=settings.sequence_length, seed=settings.seed, start=decoder_start(model.config),
        max_length=max_positions(model, tokenizer),
    )  # fmt: skip
    made = batching.like(found, tokens_per_batch=settings.tokens_per_batch)
    words = f"{pairs.describe(texts, found)}; perplexity is of what is written"
    return Inputs(made, Subject(pairs.TASK, words, seed=settings.seed), notes)


def sentence_inputs(
    texts: Texts, tokenizer: Any, model: Any, heads: tuple[SentenceHead, ...], settings: Settings
) -> Inputs:
    """Texts for a sentence encoder, each once: rows of a table, both of a pair, or paragraphs of running text.

    Pairs are those of the data; where it has none, each text has one other of a seeded order, so that pairs
    share no text and can be resampled.

    Raises:
        BadData: no text, or scores that are no numbers.
    """
    notes: list[str] = []
    if texts.labels is not None and texts.partners is None:
        notes.append(
            f"The labels of {texts.description} are not used: scores are of pairs, in two columns "
            "(--text-column first,second)."
        )
    scores, couples = None, None
    if texts.input_ids is None:
        texts = _rows(_paragraphs(texts, settings) if texts.running else texts, settings)
        columns = [[heads[0].prepared(row) for row in column] for column in (texts.rows, texts.partners or [])]
        unique = {text: number for number, text in enumerate(dict.fromkeys([*columns[0], *columns[1]]))}
        if texts.partners is not None:
            couples = np.array([[unique[one], unique[other]] for one, other in zip(*columns, strict=True)])
            scores = None if texts.labels is None else _scores(texts)
        texts = replace(texts, rows=list(unique), running=False)
    limits = [settings.sequence_length, heads[0].max_length, max_positions(model, tokenizer)]
    found = windows(
        texts,
        tokenizer,
        samples=settings.windows if texts.input_ids is not None else len(texts.rows),
        length=min(limit for limit in limits if limit),
        seed=0,
        task="encoder",
    )
    if couples is None:
        shuffled = np.random.default_rng(settings.seed).permutation(len(found))
        couples = shuffled[: len(found) // 2 * 2].reshape(-1, 2)
    order = np.argsort([len(window) for window in found], kind="stable")  # as `batches` does
    words = f"{describe(texts, found, tokenizer, 'encoder')}, as pairs"
    subject = Subject(
        "encoder", words, seed=settings.seed, sentences=Sentences(heads, order, couples, scores)
    )
    made = batches(found, tokens_per_batch=settings.tokens_per_batch, pad_id=tokenizer.pad_token_id)
    return Inputs(made, subject, notes)


def _paragraphs(texts: Texts, settings: Settings) -> Texts:
    """Evenly spaced paragraphs that are more than a heading."""
    long = [row for row in texts.rows if len(row.split()) >= _PARAGRAPH_WORDS] or texts.rows
    count = min(len(long), _PARAGRAPHS_PER_WINDOW * settings.windows)
    return replace(texts, rows=[long[start] for start in window_starts(len(long), count, 1, settings.seed)])


def max_positions(model: Any, tokenizer: Any) -> int | None:
    """The longest input: positions of the config, less those RoBERTa-like embeddings keep for padding."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    limits.append(getattr(tokenizer, "model_max_length", None))
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            limits.append(
                module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
            )
    known = [limit for limit in limits if limit]
    return min(known) if known else None


def _rows(texts: Texts, settings: Settings) -> Texts:
    """At most `settings.rows` rows that hold text, evenly spaced, with their labels."""
    columns = [texts.rows, *([] if texts.partners is None else [texts.partners])]
    kept = [n for n, row in enumerate(zip(*columns, strict=True)) if all(text.strip() for text in row)]
    if not kept:
        raise BadData(f"{texts.description} has no row with text in it.")
    chosen = [
        kept[start] for start in window_starts(len(kept), min(settings.rows, len(kept)), 1, settings.seed)
    ]
    labels = None if texts.labels is None else [texts.labels[number] for number in chosen]
    partners = None if texts.partners is None else [texts.partners[number] for number in chosen]
    return replace(texts, rows=[texts.rows[number] for number in chosen], labels=labels, partners=partners)


def class_numbers(texts: Texts | Media, model: Any) -> np.ndarray:
    """The rows' labels as the model counts them: class numbers [rows], or scores where it regresses.

    Raises:
        BadData: a label that the model has no class for, or no number where it regresses.
    """
    labels: Sequence[Any] = texts.labels or []
    config = model.config
    if config.problem_type == "regression" or config.num_labels == 1:
        return _scores(texts)
    numbers = [_class_number(label, config.label2id, config.num_labels) for label in labels]
    for label, number in zip(labels, numbers, strict=True):
        if number is None:
            names = ", ".join(map(str, list(config.label2id)[:8]))
            raise BadData(
                f"{texts.description}: label {label!r} is none of the model's {config.num_labels} classes "
                f"(0 to {config.num_labels - 1}; {names})."
            )
    return np.array(numbers, dtype=np.int64)


def _scores(texts: Texts | Media) -> np.ndarray:
    """The rows' labels as finite numbers, float64 [rows].

    Raises:
        BadData: a label that is none.
    """
    try:
        scores = np.array([float(label) for label in texts.labels or []])
    except (TypeError, ValueError) as error:
        raise BadData(
            f"{texts.description}: expected scores, and a label is no number ({error})."
        ) from error
    if len(wrong := np.flatnonzero(~np.isfinite(scores))):
        raise BadData(f"{texts.description}: expected scores, and row {wrong[0]} has {scores[wrong[0]]}.")
    return scores


def _class_number(label: Any, names: Mapping[str, int], count: int) -> int | None:
    if str(label) in names:
        return names[str(label)]
    try:
        number = int(label)
    except (TypeError, ValueError):
        return None
    return number if 0 <= number < count and number == float(label) else None


def _masking(tokenizer: Any, seed: int) -> Masking | None:
    """None where the tokenizer has no mask token; `positions.scored` then says so."""
    if tokenizer.mask_token_id is None:
        return None
    return Masking(tokenizer.mask_token_id, frozenset(tokenizer.all_special_ids), seed)
