"""A language model writes on where a prompt ends, and its text is handed out while it comes.

Sampling is what the model's own generation_config.json says, but for what is asked for. Works for decoders and for
encoder-decoders, whose encoder reads the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation.streamers import TextStreamer

from llmcomp.errors import BadData
from llmcomp.feeds import encoder_decoder
from llmcomp.measure.inputs import max_positions
from llmcomp.measure.load import load, load_tokenizer, task_of
from llmcomp.shards import read_json_object

WRITERS = ("causal-lm", "seq2seq-lm")
NEW_TOKENS = 256  # where neither the user nor the model's generation_config says how many


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; None is what the model's generation_config.json says.

    Attributes:
        max_new_tokens: at most, fewer where the model has no positions left.
        temperature: 0 takes the most probable token each time; any other draws.
        top_p, top_k: draw among the most probable tokens only.
        greedy: take the most probable token each time, whatever the model's own config says.
        seed: of the draws.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    greedy: bool = False
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """For `generate`.

        >>> Sampling(top_k=5).arguments()
        {'do_sample': True, 'top_k': 5}
        >>> Sampling(temperature=0.0).arguments()
        {'do_sample': False, 'temperature': None, 'top_p': None, 'top_k': None}
        >>> Sampling().arguments()
        {}
        """
        if self.greedy or self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        given = {name: value for name, value in given.items() if value is not None}
        return {"do_sample": True, **given} if given else {}


class Stream(TextStreamer):  # type: ignore[misc]
    """Hands out text word by word and notes when tokens came.

    Attributes:
        text: handed out so far. tokens: written so far; moments: when each came, in seconds of `time.perf_counter`.
        began: when writing began.
    """

    def __init__(self, tokenizer: Any, sink: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.sink, self.text, self.began = sink, "", 0.0
        self.moments: list[float] = []

    @property
    def tokens(self) -> int:
        return len(self.moments)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first, for which the prompt had to be read; None where there are none."""
        if self.tokens < 2:
            return None
        return (self.tokens - 1) / (self.moments[-1] - self.moments[0])

    def put(self, value: Tensor) -> None:
        """As `generate` calls it: the prompt first, then each token."""
        if self.next_tokens_are_prompt:
            self.began = time.perf_counter()
        else:
            self.moments.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if text:
            self.sink(text)


def check_prompt(prompt: str) -> None:
    """Before anything is loaded for it.

    Raises:
        BadData: nothing in it but white space.
    """
    if not prompt.strip():
        raise BadData("The prompt is empty; give some text that the model is to go on from.")


def open_writer(directory: Path, load_model: Callable[[Path], Any] = load) -> tuple[Any, Any]:
    """A model that writes text, with its tokenizer.

    Args:
        load_model: opens the weights, once it is clear that they can be used.

    Raises:
        BadData: a model without a head for that.
        BadCheckpoint: no tokenizer, or weights that cannot be loaded.
    """
    task = task_of(directory)
    if task not in WRITERS:
        architecture = (read_json_object(directory / "config.json").get("architectures") or ["a bare model"])[0]
        raise BadData(
            f"{directory} has no head that writes text: it is {architecture} ({task}); give a language model."
        )
    tokenizer = load_tokenizer(directory)
    return load_model(directory), tokenizer


def encode(model: Any, tokenizer: Any, prompt: str, chat: bool | None = None) -> Tensor:
    """Token ids [1, tokens] of a prompt.

    Args:
        chat: as a user's turn in the tokenizer's chat template; None where it has one.

    Raises:
        BadData: an empty prompt, one that leaves no position for a new token, or no chat template.
    """
    check_prompt(prompt)
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise BadData("The tokenizer has no chat template, which --chat asks for; leave it out.")
    if template and chat is not False:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
        if not encoder_decoder(model) and ids[-1:] == [tokenizer.eos_token_id] and len(ids) > 1:
            ids = ids[:-1]  # behind an end of text nothing is to be written
    positions = max_positions(model, tokenizer)
    taken = len(ids) + (0 if encoder_decoder(model) else 1)
    if positions is not None and taken > positions:
        raise BadData(
            f"The prompt has {len(ids)} tokens and the model {positions} positions, of which new tokens need one at "
            "least; give a shorter prompt."
        )
    return torch.tensor([ids])


def new_tokens(model: Any, tokenizer: Any, ids: Tensor, sampling: Sampling) -> int:
    """How many may be written: as asked for, else as the model says, else NEW_TOKENS, as far as there is room."""
    wanted = sampling.max_new_tokens or model.generation_config.max_new_tokens or NEW_TOKENS
    positions = max_positions(model, tokenizer)
    if positions is None:
        return int(wanted)
    # An encoder-decoder writes into positions of its own, the first of which holds the token it starts with.
    return int(min(wanted, positions - (1 if encoder_decoder(model) else ids.shape[1])))


def write(model: Any, tokenizer: Any, ids: Tensor, sampling: Sampling, stream: Stream) -> None:
    """Write on from `ids` [1, tokens] until an end of text or until there are enough.

    What has been written is in `stream`, also where this is interrupted.
    """
    torch.manual_seed(sampling.seed)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), streamer=stream, pad_token_id=padding,
            num_beams=1,  # beams are known only at the end, and this streams
            max_new_tokens=new_tokens(model, tokenizer, ids, sampling), **sampling.arguments(),
        )  # fmt: skip
    except BaseException:
        stream.end()  # half a word may still wait for its other half
        raise
    finally:
        transformers.utils.logging.set_verbosity(level)
