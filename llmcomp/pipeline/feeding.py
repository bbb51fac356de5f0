"""Calibration data of models that read more than one text: pairs of texts, images, images with text, sound."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmcomp import feeds
from llmcomp.adapters.base import Adapter
from llmcomp.calibration import batching, media, pairs
from llmcomp.calibration.data import Batch, Texts, read_texts, window_starts
from llmcomp.calibration.lint import lint
from llmcomp.checkpoint import Checkpoint
from llmcomp.errors import BadData
from llmcomp.measure.inputs import class_numbers, max_positions
from llmcomp.progress import Progress
from llmcomp.recipe import Recipe
from llmcomp.tokenizing import forgetful

fingerprint = batching.fingerprint
LABELLED = "sequence-classification"  # the task whose loss wants labels
# What a report says of a vision-language model that was calibrated on text.
TEXT_ONLY = "Calibrated on text alone, not on images; give a table with the columns image and text for both."


@dataclass(frozen=True)
class Gathered:
    """Batches of one sample each; `facts`: the report's account of them."""

    samples: list[Batch]
    facts: dict[str, Any]


def needed(adapter: Adapter, source: str) -> bool:
    """Whether calibration data is more than windows of one text. A vision-language model does with text as well."""
    if feeds.composite(adapter.model):
        return media.is_media(source)
    return feeds.encoder_decoder(adapter.model) or media.kind_of(adapter.model) is not None


def gather(recipe: Recipe, checkpoint: Checkpoint, adapter: Adapter, progress: Progress) -> Gathered:
    """Read calibration data, and say what is odd about it.

    Raises:
        BadData: data that is missing, unusable, or of another kind than the model reads.
    """
    kind = media.kind_of(adapter.model)
    found = _texts(recipe, checkpoint, adapter, progress) if kind is None else _media(recipe, checkpoint, adapter, kind)
    progress.note(f"Calibrating on {found.facts['description']}.")
    for warning in found.facts["warnings"]:
        progress.note(warning)
    return found


def batches(samples: Sequence[Batch], adapter: Adapter, tokens: int) -> list[Batch]:
    """Samples of like shapes together, at most `tokens` of them."""
    each = tokens if feeds.composite(adapter.model) else adapter.sample_tokens  # some count patches of all images
    return batching.like(samples, tokens_per_batch=tokens, tokens_each=each)


def witness(samples: Sequence[Batch], model: Any, rows: int, tokens: int) -> dict[str, Tensor]:
    """Inputs for verification: a few samples, their texts cut at `tokens`."""
    if feeds.composite(model):  # as many image tokens as there are in the pixels
        rows, tokens = 1, max(sample.input_ids.shape[1] for sample in samples)
    found = batching.witness_of(samples, rows, tokens)
    return feeds.call(model, found.input_ids, None, found.context)


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """The tokenizer beside the weights.

    Raises:
        BadData: there is none that transformers can load.
    """
    import transformers

    try:
        return forgetful(transformers.AutoTokenizer.from_pretrained(
            str(checkpoint.path), local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
        ))  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadData(
            f"{checkpoint.path} has no tokenizer to read calibration text with ({reason}); add its tokenizer "
            "files, or calibrate on a .safetensors file of input_ids."
        ) from error


def row_labels(
    texts: Texts, found: Sequence[Tensor], made: Sequence[Batch], model: Any, seed: int
) -> tuple[list[Tensor], str]:
    """The labels of a classifier's windows for each batch, [rows], and a digest of them.

    Args:
        texts: what `windows` has read; found: the windows of its rows, by `seed`; made: their batches.

    Raises:
        BadData: rows without labels, or with labels that are not the model's.
    """
    if texts.labels is None or texts.running or texts.input_ids is not None:
        raise BadData(
            f"{texts.description} has no labels for the loss whose gradients --method taylor takes; give --calibration "
            "a table with a column 'label', or take --method activation."
        )
    if model.config.problem_type == "multi_label_classification":
        raise BadData("--method taylor knows one label a row, and this model has several; take --method activation.")
    rows = [number for number, row in enumerate(texts.rows) if row.strip()]
    chosen = [texts.labels[rows[start]] for start in window_starts(len(rows), len(found), 1, seed)]
    numbers = class_numbers(replace(texts, labels=chosen), model)
    by_length = sorted(range(len(found)), key=lambda number: len(found[number]))  # as `batches` orders windows
    labels = torch.from_numpy(numbers)[by_length]
    return list(labels.split([len(batch.input_ids) for batch in made])), hashlib.sha256(numbers.tobytes()).hexdigest()


def _media(recipe: Recipe, checkpoint: Checkpoint, adapter: Adapter, kind: str) -> Gathered:
    """Images, images with text, or sound, through the processor."""
    settings, model = recipe.calibration, adapter.model
    read = media.read_media(settings.source, kind, text_column=settings.text_column)
    processor = media.processor_of(checkpoint.path, model)
    samples = media.media_samples(
        read, model, processor, count=settings.samples, seed=recipe.seed, length=settings.sequence_length
    )
    warnings = list(read.warnings)
    if len(samples) < settings.samples:
        warnings.append(f"The data gave {len(samples):,} samples; {settings.samples:,} were asked for.")
    ids = sum(map(batching.weight, samples))
    tokens = ids + (adapter.sample_tokens or 0) * len(samples)
    described = f"{read.description}: {len(samples):,} samples, {tokens:,} tokens in all"
    facts = {
        "source": settings.source, "description": described, "samples": len(samples), "tokens": tokens,
        "warnings": warnings,
    }  # fmt: skip
    return Gathered(samples, facts)


def _texts(recipe: Recipe, checkpoint: Checkpoint, adapter: Adapter, progress: Progress) -> Gathered:
    """Pairs of an encoder-decoder."""
    settings = recipe.calibration
    texts = read_texts(settings.source, text_column=settings.text_column, paired=True, progress=progress)
    tokenizer = tokenizer_of(checkpoint)
    samples = pairs.pairs(
        texts, tokenizer, samples=settings.samples, length=settings.sequence_length, seed=recipe.seed,
        start=feeds.decoder_start(adapter.config), max_length=max_positions(adapter.model, tokenizer),
    )  # fmt: skip
    ids = [side for sample in samples for side in (sample.context["input_ids"][0], sample.input_ids[0, 1:])]
    warnings = lint(texts, ids, tokenizer, task=adapter.task, vocabulary=feeds.vocabulary(adapter.model))
    if len(samples) < settings.samples:
        warnings.append(f"The data gave {len(samples):,} pairs; {settings.samples:,} were asked for.")
    facts = {
        "source": settings.source, "description": pairs.describe(texts, samples), "samples": len(samples),
        "tokens": sum(map(batching.weight, samples)), "warnings": warnings,
    }  # fmt: skip
    return Gathered(samples, facts)
