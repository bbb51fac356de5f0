"""From a transformer's hidden states to sentence embeddings, as sentence-transformers' modules.json says.

    head = read_head("all-MiniLM-L6-v2")
    head.embed(model(**tokens).last_hidden_state, tokens["attention_mask"])   # [rows, width]

An own reading, so that measuring needs no other package: a transformer at the top of the directory, Pooling,
then any number of Dense and Normalize. What else there may be (LSTM, word weights, residual Dense, routers)
is refused. Source: sentence_transformers/sentence_transformer/modules/pooling.py and base/modules/dense.py,
version 6.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmcomp.errors import BadCheckpoint
from llmcomp.sentences import SETTINGS, sentence_modules
from llmcomp.shards import AGAIN, SINGLE, read_json_object

Step = Callable[[Tensor], Tensor]
_ACTIVATIONS: dict[str, Step] = {
    "Tanh": torch.tanh, "Identity": lambda x: x, "ReLU": F.relu, "GELU": F.gelu, "Sigmoid": torch.sigmoid,
}  # fmt: skip
# Flags of a pooling config written before version 6, in the order in which their results are joined.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class SentenceHead:
    """What follows the transformer, and how texts are made ready for it.

    Attributes:
        modes: of pooling; the results of several are joined, [rows, modes × hidden].
        steps: Dense and Normalize in their order, each [rows, in] → [rows, out].
        max_length: tokens that a text is cut at, None for the model's own limit.
        prompt: what every text begins with by default.
        lower: texts are put in lower case.
    """

    modes: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    max_length: int | None = None
    prompt: str = ""
    lower: bool = False

    def prepared(self, text: str) -> str:
        """The text as the tokenizer gets it."""
        text = self.prompt + text
        return text.lower() if self.lower else text

    def embed(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Embeddings float32 [rows, width].

        Args:
            hidden: last hidden states [rows, length, hidden].
            mask: [rows, length], 1 for tokens, padding on the right; None where nothing is padded.
        """
        real = torch.ones(hidden.shape[:2]) if mask is None else mask.to(torch.float32)
        found = torch.cat([_POOLINGS[mode](hidden.float(), real[..., None]) for mode in self.modes], dim=-1)
        for step in self.steps:
            found = step(found)
        return found


@dataclass(frozen=True)
class Sentences:
    """Texts that are embedded, and which of them are compared.

    Attributes:
        heads: one for each model.
        order: [texts], number of the text that each row of the batches holds.
        pairs: [pairs, 2], numbers of texts.
        scores: [pairs], how alike they are by other judgement; None where nobody judged.
    """

    heads: tuple[SentenceHead, ...]
    order: np.ndarray
    pairs: np.ndarray
    scores: np.ndarray | None = None


def read_head(directory: str | Path) -> SentenceHead:
    """Read modules.json and what it names.

    Raises:
        BadCheckpoint: no modules.json, a module that is not known here, or files that cannot be read.
    """
    path = Path(directory)
    modules = sentence_modules(path)
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or modules[0][1] or set(kinds[2:]) - set(_STEPS):
        raise BadCheckpoint(
            f"{path} has the sentence-transformers modules {', '.join(kinds) or 'none'}; sentence embeddings are "
            "measured for a Transformer at the top of the directory, Pooling, then Dense or Normalize."
        )
    pooling = read_json_object(path / modules[1][1] / "config.json")
    steps = [_STEPS[kind](path / folder) for kind, folder in modules[2:]]
    settings = _optional(path / SETTINGS)
    return SentenceHead(
        modes=_modes(pooling, path / modules[1][1]),
        steps=tuple(steps),
        max_length=settings.get("max_seq_length"),
        prompt=_prompt(path, bool(pooling.get("include_prompt", True))),
        lower=bool(settings.get("do_lower_case")),
    )


def _modes(config: dict[str, Any], folder: Path) -> tuple[str, ...]:
    said = config.get("pooling_mode")
    if said is None:
        said = [mode for flag, mode in _FLAGS.items() if config.get(flag)] or ["mean"]
    modes = (said,) if isinstance(said, str) else tuple(said)
    if unknown := [mode for mode in modes if mode not in _POOLINGS]:
        raise BadCheckpoint(f"{folder} pools by {unknown[0]!r}; known are {', '.join(_POOLINGS)}.")
    return modes


def _prompt(path: Path, included: bool) -> str:
    settings = _optional(path / "config_sentence_transformers.json")
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts") or {}
    prompt = str(prompts.get(name) or "")
    if prompt and not included:
        raise BadCheckpoint(
            f"{path} leaves its default prompt {name!r} out of the pooling, which is not measured; use --no-evaluate."
        )
    return prompt


def _dense(folder: Path) -> Step:
    config = read_json_object(folder / "config.json")
    _refuse_other_input(config, folder)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    package, _, name = activation.rpartition(".")
    if not package.startswith("torch.nn") or name not in _ACTIVATIONS:
        raise BadCheckpoint(f"{folder} activates by {activation}; known are torch's {', '.join(_ACTIVATIONS)}.")
    if config.get("use_residual"):
        raise BadCheckpoint(f"{folder} is a Dense module with a residual, which is not measured; use --no-evaluate.")
    try:
        tensors = load_file(folder / SINGLE)
        weight, bias = tensors["linear.weight"].float(), tensors.get("linear.bias")
    except (OSError, SafetensorError, KeyError) as error:
        raise BadCheckpoint(f"{folder / SINGLE} holds no linear.weight ({error}); {AGAIN}.") from error
    activate, bias = _ACTIVATIONS[name], None if bias is None else bias.float()
    return lambda x: activate(F.linear(x, weight, bias))


def _normalize(folder: Path) -> Step:
    _refuse_other_input(_optional(folder / "config.json"), folder)
    return lambda x: F.normalize(x, dim=-1)


_STEPS = {"Dense": _dense, "Normalize": _normalize}


def _refuse_other_input(config: dict[str, Any], folder: Path) -> None:
    """Modules of models that compare texts token by token work on token embeddings."""
    for key in ("module_input_name", "module_output_name"):
        if (name := config.get(key) or "sentence_embedding") != "sentence_embedding":
            raise BadCheckpoint(f"{folder} works on {name!r}; measured are modules that work on sentence embeddings.")


def _optional(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.is_file() else {}


# --- pooling: hidden [rows, length, hidden], real [rows, length, 1] of zeros and ones → [rows, hidden] ---


def _cls(hidden: Tensor, real: Tensor) -> Tensor:
    return hidden[:, 0]


def _max(hidden: Tensor, real: Tensor) -> Tensor:
    return hidden.masked_fill(real == 0, -torch.inf).amax(1)


def _mean(hidden: Tensor, real: Tensor) -> Tensor:
    return (hidden * real).sum(1) / real.sum(1)


def _mean_sqrt(hidden: Tensor, real: Tensor) -> Tensor:
    return (hidden * real).sum(1) / real.sum(1).sqrt()


def _weighted_mean(hidden: Tensor, real: Tensor) -> Tensor:
    weights = real * torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype)[:, None]
    return _mean(hidden, weights)


def _last(hidden: Tensor, real: Tensor) -> Tensor:
    last = real[..., 0].sum(1).long() - 1
    return hidden[torch.arange(len(hidden)), last]


_POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
