"""What a model is called with: token ids, pixels or the features of sound, and of an encoder-decoder also what the
decoder reads. Read off the model's own class and config; no table of model names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

IDS, PIXELS, SOUND, DECODER_IDS = "input_ids", "pixel_values", "input_features", "decoder_input_ids"

# The endings of class names that say less than transformers' own tables do, and those tables in the order they count.
_IMAGES = ("ForImageClassification", "image-classification")
_GENERATES = "ForConditionalGeneration"
_TABLES = {
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
_NOTHING: Mapping[str, Tensor] = MappingProxyType({})
ENCODER_DECODERS = ("seq2seq-lm", "speech-seq2seq")


def task_beyond_text(architecture: str) -> str | None:
    """The task of a class that reads more than one text ('seq2seq-lm', 'speech-seq2seq', 'image-text-to-text',
    'image-classification'), None for all others."""
    if architecture.endswith(_IMAGES[0]):
        return _IMAGES[1]
    if not architecture.endswith(_GENERATES):
        return None
    from transformers.models.auto import modeling_auto

    tables = {task: getattr(modeling_auto, name).values() for task, name in _TABLES.items()}
    return next((task for task, table in tables.items() if architecture in table), None)


def encoder_decoder(model: Any) -> bool:
    """Whether a decoder of its own reads beside the encoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def main_input(model: Any) -> str:
    """`input_ids`, `pixel_values`, `input_features` …"""
    name: str = getattr(model, "main_input_name", IDS)
    return IDS if composite(model) else name


def composite(model: Any) -> bool:
    """Whether a language model is one part of it, beside a vision tower or the like."""
    config = getattr(model, "config", None)
    return config is not None and hasattr(config, "get_text_config") and config.get_text_config() is not config


def unknown_feed(model: Any) -> str | None:
    """Why llmcomp cannot make what this model reads, or read what it answers, as the end of a sentence; None where
    it can."""
    architecture = type(model).__name__
    main, decodes, task = main_input(model), encoder_decoder(model), task_beyond_text(architecture)
    if decodes != (task in ENCODER_DECODERS):
        kind = "an encoder-decoder, but not one" if decodes else "not an encoder-decoder, but named as one"
        return f"is {kind} that writes text with a language-modeling head; llmcomp takes those"
    if composite(model) and task != "image-text-to-text":
        return "is made of several models; of such llmcomp takes those that write text from images and text"
    if main not in (SOUND, IDS) if decodes else main not in (PIXELS, IDS):
        return f"reads {main}; llmcomp can make token ids, images for classifiers, and sound for encoder-decoders"
    if main == PIXELS and task is None and not architecture.endswith("Model"):
        return "reads images for another task than classifying them, which llmcomp cannot measure"
    return None


def vocabulary(model: Any) -> int | None:
    """How many token ids it knows; None where it reads none."""
    config: Any = model.config.get_text_config()
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) and (main_input(model) == IDS or encoder_decoder(model)) else None


def decoder_start(config: Any) -> int:
    """The token that a decoder begins with: as the config says, else (T5) the padding token."""
    names = ("decoder_start_token_id", "pad_token_id", "bos_token_id")
    return next((found for name in names if isinstance(found := getattr(config, name, None), int)), 0)


def around(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """A call of the model with these token ids [rows, tokens]; what else it reads is noise from a fixed seed.

    Pixels and features have the shape that the config names and the model's dtype; both sides of an encoder-decoder
    that reads text get the ids. On meta tensors nothing is computed.
    """
    main = main_input(model)
    if main == IDS:
        return {IDS: ids, DECODER_IDS: ids.flip(1)} if encoder_decoder(model) else {IDS: ids}
    shape = (len(ids), *sample_shape(model))
    if ids.is_meta:
        noise = torch.empty(shape, device="meta")
    else:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(ids.device)
    made = {main: noise.to(model.dtype)}
    if encoder_decoder(model):
        made[DECODER_IDS] = ids[:, : model.config.max_target_positions]
    return made


def sample_shape(model: Any) -> tuple[int, ...]:
    """Of one image, [channels, height, width]; of one stretch of sound, [mel bins, frames]."""
    config = model.config
    if main_input(model) == PIXELS:
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return (getattr(config, "num_channels", 3), height, width)
    strides = math.prod(m.stride[0] for m in model.get_encoder().modules() if isinstance(m, nn.Conv1d))
    return (config.num_mel_bins, config.max_source_positions * strides)


def in_dtype(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pixels and features in the model's dtype; ids as they are."""
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def call(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, context: Mapping[str, Tensor] = _NOTHING
) -> dict[str, Tensor]:
    """The keyword arguments of the model for a batch.

    Args:
        input_ids: [rows, tokens], of an encoder-decoder what the decoder reads; without columns where the model reads
            none.
        attention_mask: of the same shape, 1 for tokens; None where nothing is padded.
        context: what else it reads, by name: pixels, features, what the encoder reads. In the model's dtype after this.
    """
    names = (DECODER_IDS, "decoder_attention_mask") if encoder_decoder(model) else (IDS, "attention_mask")
    made = in_dtype(model, context)
    if input_ids.shape[1]:
        made[names[0]] = input_ids
    return made if attention_mask is None else made | {names[1]: attention_mask}
