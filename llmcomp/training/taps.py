"""What a model computes inside while it runs: hidden states, attention scores, queries, keys and values of some layers.

Attention stays transformers' SDPA. A function registered with its attention interface calls that, and for the layers
that are asked for keeps queries, keys and values, of which losses compute what they compare; eager attention would give
the probabilities of all layers, and hidden states of all would be held. The mask function of SDPA
is registered under the same name: without one, transformers passes no mask at all, and says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from llmcomp.errors import BadRecipe
from llmcomp.training.dropping import drop_attention

NAME = "llmcomp_scores"
EMBEDDINGS = -1  # as a layer: what the first block reads


@dataclass
class Attended:
    """One layer's attention.

    Attributes:
        query, key, value: [B, heads, L, D], keys and values with as many heads as the model has of them.
        scaling: of q·k. seen: bool [B or 1, 1, L, L], the keys that a query attends to.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    seen: Tensor

    def products(self) -> tuple[Tensor, Tensor]:
        """q/√d and k [B, H, L, D], whose products are the scores; groups of queries share their keys."""
        groups = self.query.shape[1] // self.key.shape[1]
        key = self.key if groups == 1 else self.key.repeat_interleave(groups, dim=1)
        return self.query * self.scaling, key

    def scores(self) -> Tensor:
        """q·k/√d [B, H, L, L], before mask and softmax."""
        query, key = self.products()
        return query @ key.transpose(-1, -2)


@dataclass
class Inside:
    """What one forward computed.

    Attributes:
        hidden: {layer: output of its block [B, L, C]}, `EMBEDDINGS` for what the first one reads.
        attended: {layer: its attention}.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    attended: dict[int, Attended] = field(default_factory=dict)


_LISTENING: WeakKeyDictionary[nn.Module, tuple[Taps, int]] = WeakKeyDictionary()


class Taps:
    """Listens to a model until it is closed.

    Args:
        blocks: names of its blocks, in order.
        hidden: layers whose outputs are kept, `EMBEDDINGS` among them. attention: layers whose attention is.

    Raises:
        BadRecipe: a model that does not compute attention by transformers' interface, where attention is asked for.
    """

    def __init__(
        self, model: Any, blocks: Sequence[str], hidden: Sequence[int] = (), attention: Sequence[int] = ()
    ) -> None:
        self.model, self.attention = model, tuple(attention)
        self._kept, self._running = Inside(), False
        self._handles = [self._listen(model.get_submodule(blocks[max(0, layer)]), layer) for layer in hidden]
        # Blocks that gradient checkpointing computes again, on the way back, are no forward.
        self._handles += [model.register_forward_pre_hook(self._start), model.register_forward_hook(self._stop)]
        self._modules = [module for layer in attention for module in self._within(model, blocks[layer], layer)]
        self._before = getattr(model.config, "_attn_implementation", None)
        if attention:
            self._attend()

    def _within(self, model: Any, block: str, layer: int) -> list[nn.Module]:
        found = list(model.get_submodule(block).modules())
        for module in found:  # the one that computes attention will name itself
            _LISTENING[module] = (self, layer)
        return found

    def _attend(self) -> None:
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        if self._before != "sdpa":
            self.close()
            raise BadRecipe(
                f"{type(self.model).__name__} does not compute attention by PyTorch's SDPA, so its scores cannot be "
                "learned from; --method distilbert or logits asks for none."
            )
        self.model.set_attn_implementation(NAME)

    def _listen(self, block: nn.Module, layer: int) -> Any:
        if layer == EMBEDDINGS:
            return block.register_forward_pre_hook(self._read, with_kwargs=True)

        def keep(module: nn.Module, given: Any, output: Any) -> None:
            if self._running:
                self._kept.hidden[layer] = output[0] if isinstance(output, tuple) else output

        return block.register_forward_hook(keep)

    def _start(self, *unused: Any) -> None:
        self._running = True

    def _stop(self, *unused: Any) -> None:
        self._running = False

    def _read(self, module: nn.Module, given: Any, named: Any) -> None:
        if self._running:
            self._kept.hidden[EMBEDDINGS] = given[0] if given else named["hidden_states"]

    def heard(self, layer: int, attended: Attended) -> None:
        """Note a layer's attention, of a forward that runs."""
        if self._running:
            self._kept.attended[layer] = attended

    def take(self) -> Inside:
        """What the last forward computed; nothing of it is kept.

        Raises:
            BadRecipe: attention that was asked for and did not pass the interface.
        """
        kept, self._kept = self._kept, Inside()
        if missing := [layer for layer in self.attention if layer not in kept.attended]:
            raise BadRecipe(
                f"{type(self.model).__name__} does not compute the attention of layer {missing[0]} by transformers' "
                "interface, so its scores cannot be learned from; --method distilbert or logits asks for none."
            )
        return kept

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            _LISTENING.pop(module, None)
        if self.attention and self.model.config._attn_implementation == NAME:
            self.model.set_attn_implementation(self._before)


@contextmanager
def listening(model: Any, blocks: Sequence[str], **layers: Sequence[int]) -> Iterator[Taps]:
    """`Taps` for a while."""
    taps = Taps(model, blocks, **layers)
    try:
        yield taps
    finally:
        taps.close()


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """SDPA, and what was asked for beside it."""
    asked, slow = _LISTENING.get(module), dropout > 0 and query.device.type == "cpu"
    slow = slow and (attention_mask is None or attention_mask.dtype == torch.bool)
    if asked is not None or slow:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        seen = _seen(attention_mask, query.shape[2], key.shape[2], causal, query.device)
    if asked is not None:
        taps, layer = asked
        taps.heard(layer, Attended(query, key, value, scale, seen))
    if slow:
        return drop_attention(query, key, value, seen, scale, dropout).transpose(1, 2).contiguous(), None
    made: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **more
    )
    return made


def _seen(mask: Tensor | None, queries: int, keys: int, causal: bool, device: torch.device) -> Tensor:
    """bool [B or 1, 1, queries, keys], as SDPA understands mask and causality."""
    if mask is None:
        every = torch.ones(queries, keys, dtype=torch.bool, device=device)
        return (every.tril() if causal and queries > 1 else every)[None, None]
    if mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2  # an additive one
