"""A model's forward in two parts: hidden states of a whole batch, then logits of a few positions at a time.

Logits are [positions, vocabulary]: for 2,048 tokens and a vocabulary of 256,000 that is 2 GB in fp32, more
than many models. The head is applied to chunks instead. Heads differ (BERT's transform, Cohere's logit scale,
Gemma's soft cap), so none is written again here: the model's own forward runs with its base model replaced,
for the time of a call, by one that returns the chunk. What cannot be split this way (a head that does not
follow the hidden states position by position) is run whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from llmcomp.feeds import call
from llmcomp.measure.load import first_forward

POSITIONS_AT_ONCE = 512
BYTES_AT_ONCE = 64 * 2**20  # fp32 logits of one chunk of one model


class SplitModel:
    """One language model, split between base model and head.

    Attributes:
        model: the model, in eval mode.
        splits: whether the head runs on chunks; known after the first `hidden`.
    """

    def __init__(self, model: nn.Module, positions_at_once: int | None = None) -> None:
        self.model = model.eval()
        self.splits = True
        self._positions = positions_at_once
        self._base: nn.Module | None = None
        self._outputs: Any = None
        parameters = inspect.signature(model.forward).parameters
        self._settings: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}

    @torch.inference_mode()
    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None, context: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Tensor:
        """Last hidden states [batch, length, hidden] of input_ids [batch, length]; logits if not split.

        Args:
            context: what the model reads besides (`feeds.call`); input_ids are then what its decoder reads.
        """
        seen: list[tuple[nn.Module, Any]] = []

        def record(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            outputs = forward(*args, **kwargs)
            if _last_hidden(outputs) is None:
                return outputs
            seen.append((module, outputs))
            return _with_hidden(outputs, _last_hidden(outputs)[:, :1])

        if self._base is None:
            first_forward(self.model)  # it may re-wrap forwards, so it must not find them replaced
        candidates = _candidates(self.model) if self.splits else []
        with _replaced(candidates, record):
            logits = self._forward(input_ids, attention_mask, context)
        if self.splits and len(seen) == 1 and logits.shape[1] == 1:
            self._base, self._outputs = seen[0]
            self._positions = self._positions or _positions_at_once(logits.shape[-1])
            return _last_hidden(self._outputs)
        if self.splits:
            self.splits = False
            return self.hidden(input_ids, attention_mask, context)
        self._positions = self._positions or _positions_at_once(logits.shape[-1])
        return logits

    @property
    def positions_at_once(self) -> int:
        """Positions whose fp32 logits stay within `BYTES_AT_ONCE`, at most `POSITIONS_AT_ONCE`; known after
        `hidden`."""
        return self._positions or 1

    @torch.inference_mode()
    def logits(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """fp32 logits [positions, vocabulary] of rows [positions, hidden] of what `hidden` returned.

        Args:
            input_ids: [positions], the tokens at those positions.
        """
        if not self.splits or self._base is None:
            return hidden.float()

        def answer(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return _with_hidden(self._outputs, hidden[None])

        with _replaced([self._base], answer):
            return self._forward(input_ids[None], None, {})[0].float()

    def _forward(self, input_ids: Tensor, attention_mask: Tensor | None, context: Mapping[str, Tensor]) -> Tensor:
        return self.model(**call(self.model, input_ids, attention_mask, context), **self._settings).logits


def _positions_at_once(vocabulary: int) -> int:
    return max(1, min(POSITIONS_AT_ONCE, BYTES_AT_ONCE // (4 * vocabulary)))


def _candidates(model: nn.Module) -> list[nn.Module]:
    """Whose output the head may read: the base model, or what is in it (OPT calls `model.decoder`)."""
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    return [base, *base.children()] if isinstance(base, nn.Module) and base is not model else []


@contextmanager
def _replaced(modules: list[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Route each module's forward through `forward(module, original forward, ...)`, inside of which modules
    are as ever."""
    inside = False

    def routed(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return original(*args, **kwargs)
            inside = True
            try:
                return forward(module, original, *args, **kwargs)
            finally:
                inside = False

        return call

    with ExitStack() as stack:
        for module in modules:
            stack.callback(_restore, module, module.__dict__.get("forward"))
            module.__dict__["forward"] = routed(module, module.forward)
        yield


def _restore(module: nn.Module, own: Any) -> None:
    if own is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = own


def _last_hidden(outputs: Any) -> Any:
    """The [batch, length, hidden] tensor of a base model's outputs, None where there is none."""
    first = outputs[0] if isinstance(outputs, tuple) and outputs else None
    named = getattr(outputs, "last_hidden_state", first)
    return (
        named if isinstance(named, Tensor) and named.ndim == 3 and not isinstance(outputs, Tensor) else None
    )


def _with_hidden(outputs: Any, hidden: Tensor) -> Any:
    if isinstance(outputs, dict):
        return type(outputs)(**{**outputs, "last_hidden_state": hidden})
    return (hidden, *outputs[1:])
