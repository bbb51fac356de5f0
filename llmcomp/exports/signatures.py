"""What an exported model is called with and what it answers: names, shapes, and batches to try it on.

Names are those of optimum's exports, which onnxruntime-genai and transformers.js read, too. Encoders:

    input_ids, attention_mask [batch_size, sequence_length], token_type_ids where the model tells segments apart
    → logits, or start_logits and end_logits, or last_hidden_state

Decoders, one graph for prompts (an empty past, of length 0) and for the tokens after them:

    input_ids, position_ids [batch_size, sequence_length]
    attention_mask [batch_size, past_sequence_length + sequence_length]
    past_key_values.N.key, .value [batch_size, heads, past_sequence_length, head_dim]
    → logits, present.N.key, present.N.value [batch_size, heads, past_sequence_length + sequence_length, head_dim]
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcomp.errors import UnknownArchitecture
from llmcomp.feeds import vocabulary
from llmcomp.formats.opening import Opened

BATCH, TOKENS, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
OUTPUTS = {"encoder": ["last_hidden_state"], "question-answering": ["start_logits", "end_logits"]}
Past = list[tuple[Tensor, Tensor]]


class Encoder(nn.Module):
    """A model without a cache, called by names, that answers with a tuple."""

    def __init__(self, model: Any, outputs: list[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs
        self.more = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        more = self.more if token_type_ids is None else {**self.more, "token_type_ids": token_type_ids}
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **more)
        return tuple(getattr(found, name) for name in self.outputs)


class Decoder(nn.Module):
    """A language model whose cache goes in and comes out as plain tensors, which is what torch can trace."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Past
    ) -> tuple[Tensor, Past]:
        from transformers import DynamicCache

        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            # Without the config, layers of a sliding window keep all, too; the mask then leaves out what is behind it.
            past_key_values=DynamicCache(past_key_values),
            use_cache=True,
        )
        return found.logits, [(layer.keys, layer.values) for layer in found.past_key_values.layers]


@dataclass(frozen=True)
class Signature:
    """How an exported model is called.

    Attributes:
        inputs: the names of its inputs, of a decoder without the past.
        outputs: the names of what it answers, of a decoder without the present.
        cache: (heads, head_dim of keys, of values) of each layer of a decoder.
        vocabulary: how many token ids there are.
        longest: tokens that it has positions for.
    """

    inputs: list[str]
    outputs: list[str]
    cache: list[tuple[int, int, int]]
    vocabulary: int
    longest: int

    @property
    def past(self) -> list[str]:
        return [f"past_key_values.{n}.{kind}" for n in range(len(self.cache)) for kind in ("key", "value")]

    @property
    def present(self) -> list[str]:
        return [f"present.{n}.{kind}" for n in range(len(self.cache)) for kind in ("key", "value")]

    def example(self) -> dict[str, Any]:
        """A call to trace. No size is 0 or 1 and no tensor stands for two, which the trace would take for a rule."""
        found: dict[str, Any] = {name: torch.ones(2, 3, dtype=torch.long) for name in self.inputs}
        if self.cache:
            found["attention_mask"] = torch.ones(2, 8, dtype=torch.long)
            found["position_ids"] = torch.arange(5, 8).expand(2, 3).contiguous()
            found["past_key_values"] = [(torch.zeros(2, h, 5, k), torch.zeros(2, h, 5, v)) for h, k, v in self.cache]
        return found

    def dynamic_shapes(self) -> dict[str, Any]:
        """Of the same structure, what may be of any size."""
        found: dict[str, Any] = {name: {0: BATCH, 1: TOKENS} for name in self.inputs}
        if self.cache:
            found["attention_mask"] = {0: BATCH, 1: TOTAL}
            found["past_key_values"] = [({0: BATCH, 2: PAST}, {0: BATCH, 2: PAST}) for _ in self.cache]
        return found

    def batches(self) -> list[dict[str, Tensor]]:
        """Batches to compare on: one padded, of a decoder on the left; one long row; others of random tokens."""
        generator = torch.Generator().manual_seed(0)
        made = []
        for rows, tokens in ((2, 11), (1, min(40, self.longest)), (3, 5)):
            ids = torch.randint(min(5, self.vocabulary - 1), self.vocabulary, (rows, tokens), generator=generator)
            mask = torch.ones_like(ids)
            if rows == 2:
                mask[1, slice(3) if self.cache else slice(7, None)] = 0
            made.append(self.call(ids, mask))
        return made

    def call(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The inputs, without a past, for token ids and a mask of one shape [rows, tokens]."""
        found = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self.inputs:
            second = torch.arange(ids.shape[1]) > ids.shape[1] // 2
            found["token_type_ids"] = second.long().expand_as(ids).contiguous()
        if "position_ids" in self.inputs:
            found["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        return found


def signature_of(opened: Opened, task: str) -> Signature:
    """How a model for `task` is called.

    Raises:
        UnknownArchitecture: a decoder that takes no positions, or keeps no keys and values of all tokens.
    """
    model: Any = opened.skeleton
    outputs = OUTPUTS.get(task, ["logits"])
    inputs, cache = ["input_ids", "attention_mask"], []
    if task == "causal-lm":
        inputs.append("position_ids")
        cache = _cache(model)
    elif getattr(model.config, "type_vocab_size", 0) > 1 and "token_type_ids" in _parameters(model):
        inputs.append("token_type_ids")
    limits = [getattr(model.config, name, None) for name in ("max_position_embeddings", "n_positions")]
    longest = min((size - 2 for size in limits if isinstance(size, int) and size > 2), default=512)
    return Signature(inputs, outputs, cache, vocabulary(model) or 0, longest)


def wrapped(model: Any, signature: Signature, task: str) -> nn.Module:
    """The model, called as its signature says."""
    if signature.cache:
        return Decoder(model).eval()
    return Encoder(model.base_model if task == "encoder" else model, signature.outputs).eval()


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


@torch.no_grad()
def _cache(model: Any) -> list[tuple[int, int, int]]:
    """What a forward of the model without weights leaves in its cache."""
    from transformers.cache_utils import DynamicLayer

    kind = type(model).__name__
    if not {"position_ids", "past_key_values"} <= set(_parameters(model)):
        raise UnknownArchitecture(
            f"{kind} takes no position_ids beside its cache, which an export for generation needs; llmcomp writes "
            "decoders such as Llama."
        )
    found = model(input_ids=torch.ones(1, 2, dtype=torch.long, device="meta"), use_cache=True)
    layers = getattr(found.past_key_values, "layers", [])
    if not layers or not all(isinstance(layer, DynamicLayer) for layer in layers):
        raise UnknownArchitecture(
            f"{kind} keeps something else than keys and values of all tokens from one step to the next; llmcomp writes "
            "decoders such as Llama."
        )
    return [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]
