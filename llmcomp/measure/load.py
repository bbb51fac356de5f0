"""Load a checkpoint the way a user would: the Auto class of its task, plain `from_pretrained`."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from llmcomp import bnb, lora, native
from llmcomp.errors import BadCheckpoint, BadData, LlmcompError
from llmcomp.feeds import around, task_beyond_text
from llmcomp.sentences import is_sentence_encoder
from llmcomp.shards import read_json_object
from llmcomp.tokenizing import forgetful

AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
    "image-text-to-text": "AutoModelForImageTextToText",
    "image-classification": "AutoModelForImageClassification",
    "encoder": "AutoModel",
}
# Class name endings and what they mean; the first that fits counts, none means a bare encoder.
_ENDINGS = {
    "LMHeadModel": "causal-lm",
    "ForCausalLM": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}


def task_of(directory: str | Path) -> str:
    """The task that config.json's architecture is for, one of `AUTO`; of a sentence encoder always 'encoder'.

    Raises:
        BadCheckpoint: no readable config.json.
        BadData: an architecture whose task cannot be evaluated.
    """
    if is_sentence_encoder(directory):
        return "encoder"
    architectures = read_json_object(Path(directory) / "config.json").get("architectures")
    name = str((architectures or ["Model"])[0])
    if (beyond := task_beyond_text(name)) is not None:
        return beyond
    for ending, task in _ENDINGS.items():
        if name.endswith(ending):
            return task
    if name.endswith("Model"):
        return "encoder"
    raise BadData(
        f"{name} has a head that cannot be evaluated; expected one of {', '.join(sorted(set(AUTO)))}."
    )


def load(
    directory: str | Path, task: str | None = None, config: Any = None, auto: Any = None, adapter: bool = True
) -> nn.Module:
    """The model in eval mode, in the dtype it is stored in, on the CPU, after its `first_forward`, with the adapter
    that lies beside its weights.

    Args:
        auto: the class to load it by, None for that of its task; with one, which may be for a head that wants other
            inputs than text, there is no first forward.
        config: a transformers config to load it by, None for its own.
        adapter: whether to put an adapter on, if there is one (`llmcomp.lora`).

    Raises:
        BadCheckpoint: transformers cannot load it, or had to make up weights that the files lack.
    """
    forward = auto is None
    auto = auto or getattr(transformers, AUTO[task or task_of(directory)])
    stored = read_json_object(Path(directory) / "config.json")
    if bnb.is_bnb(stored):
        bnb.silence()
    native.register(stored)
    given = {} if config is None else {"config": config}
    try:
        with quiet():
            model, info = auto.from_pretrained(
                str(directory), output_loading_info=True, local_files_only=True, **bnb.placement(stored), **given
            )
            model.eval()
            if forward:
                first_forward(model)
    except LlmcompError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise BadCheckpoint(f"transformers cannot load {directory}: {reason[:300]}") from error
    missing = [*sorted(info["missing_keys"]), *sorted(str(key) for key in info["mismatched_keys"])]
    if auto is transformers.AutoModel:  # hidden states, which are what is compared, come before the pooler
        missing = [key for key in missing if not key.startswith("pooler.")]
    if missing:
        raise BadCheckpoint(
            f"{directory} lacks {len(missing)} weights that its architecture has, such as {missing[0]}; "
            "what would be measured is a partly random model."
        )
    if adapter and (beside := lora.beside(directory)) is not None:
        lora.attach(model, beside)
    return model


@torch.no_grad()
def first_forward(model: Any) -> None:
    """Run one token, which is when compressed-tensors decompresses and re-wraps every module's forward.

    Not in inference mode: the weights that it makes would serve nobody who computes gradients later.
    """
    model(**around(model, torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device)))


def load_tokenizer(directory: str | Path, config: Any = None) -> Any:
    """Its tokenizer; `config` is the model's, where config.json does not hold it as transformers has it.

    Raises:
        BadCheckpoint: there is none that transformers can load.
    """
    native.register(read_json_object(Path(directory) / "config.json"))
    try:
        found = transformers.AutoTokenizer.from_pretrained(str(directory), config=config, local_files_only=True)
        return forgetful(found)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise BadCheckpoint(
            f"{directory} has no tokenizer that transformers can load: {reason[:200]}"
        ) from error


def prepare(directory: str | Path, task: str | None = None) -> None:
    """Import what loading will need, the model's own module included, and nothing of its weights."""
    native.register(read_json_object(Path(directory) / "config.json"))
    config = transformers.AutoConfig.from_pretrained(str(directory), local_files_only=True)
    auto = getattr(transformers, AUTO[task or task_of(directory)])
    with contextlib.suppress(KeyError):  # remote code has no class here; its import then counts as memory
        auto._model_mapping[type(config)]
    if getattr(config, "quantization_config", None) is not None:
        importlib.import_module("transformers.quantizers.auto")
    if bnb.is_bnb(read_json_object(Path(directory) / "config.json")):
        importlib.import_module("bitsandbytes")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no load report: what matters of them is in the loading info, which is checked."""
    bar = transformers.utils.logging.is_progress_bar_enabled()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.ERROR)
    try:
        # torchao prints when it is imported, compressed-tensors draws bars
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bar:
            transformers.utils.logging.enable_progress_bar()
