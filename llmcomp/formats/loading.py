"""What transformers does with the weights of a model as it loads a packed checkpoint of it, asked of the model itself.

Nothing here knows a format: `formats.compressed_tensors` decides by these answers how it stores what.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from llmcomp.errors import BadRecipe
from llmcomp.feeds import encoder_decoder


def check_widths(model: nn.Module | None) -> None:
    """T5's `wo` overflows in float16, so transformers keeps it in float32, but not in a compressed checkpoint.

    Raises:
        BadRecipe: the model has such weights.
    """
    names: set[str] = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if model is None or getattr(model, "dtype", None) != torch.float16 or not names:
        return
    wide = (key for key, value in model.named_parameters() if value.dtype == torch.float32)
    kept = [key for key in wide if names & {*key.split(".")}]
    if kept:
        raise BadRecipe(
            f"transformers keeps {len(kept)} weights of this float16 model in float32, such as {kept[0]}, but not "
            "those of a packed checkpoint; convert the model to bfloat16 or float32 first, or use --format dense."
        )


@lru_cache(maxsize=1)  # who compares plans of one model asks for each of them, and the copy takes its time
def initializes_weights(model: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether transformers, when it loads this model, initializes the `weight` of these linears by name."""
    initialize = getattr(model, "initialize_weights", None)
    if initialize is None or not names:
        return False
    skeleton: Any = copy.deepcopy(model).to("meta")
    for module in skeleton.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    for name in names:
        del skeleton.get_submodule(name).weight
    try:
        skeleton.initialize_weights()
    except AttributeError as error:
        return "'weight'" in str(error)
    return False


def generates(model: Any) -> bool:
    """Whether it is a language model that writes text; encoders are what sentence-transformers opens."""
    return bool(model.can_generate()) if hasattr(model, "can_generate") else True


def passes_the_hook(model: nn.Module) -> str | None:
    """What it is, if others call into it past the hook that decodes at the first call of the model."""
    if encoder_decoder(model):
        return "an encoder-decoder"
    return "a model without a head" if getattr(model, "base_model", None) is model else None
