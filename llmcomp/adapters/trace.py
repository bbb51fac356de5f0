"""What a model's own forward does with its blocks and linears, seen by running it on meta tensors.

Meta tensors have shapes and identities but no values, so a model of any size is followed in milliseconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from llmcomp.feeds import around

_TRACE_TOKENS = 8


@dataclass(frozen=True)
class Trace:
    """One forward pass.

    Attributes:
        inputs: linear → the tensor it read first. They are kept, so that their ids stay their own.
        order: names of blocks and linears as they were called, each as often as it was.
        problem: why the forward could not be run, None when it could; the rest is empty then.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    problem: str | None = None


def linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, module) of every linear layer in `module`."""
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(child, (nn.Linear, Conv1D)):
            yield name, child


def trace(model: nn.Module, blocks: Iterable[str]) -> Trace:
    """Follow a copy of `model` on meta tensors.

    Args:
        blocks: names of the modules whose calls are to be noted beside those of the linears.
    """
    twin = meta_twin(model)
    found = Trace()

    def record(name: str, reads: bool) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.order.append(name)
            if reads:
                found.inputs.setdefault(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    for name in blocks:
        twin.get_submodule(name).register_forward_pre_hook(record(name, False), with_kwargs=True)
    for name, module in linears(twin):
        module.register_forward_pre_hook(record(name, True), with_kwargs=True)
    def forget() -> None:
        found.inputs.clear()
        found.order.clear()

    problem = run_twin(twin, forget)
    return found if problem is None else Trace(problem=problem)


def meta_twin(model: nn.Module) -> Any:
    """A copy of `model` on meta tensors whose forward looks at no values."""
    twin: Any = copy.deepcopy(model).to("meta")
    twin.config.pad_token_id = None  # else some models look for padding among ids that have no values
    # Without a cache transformers looks for packed sequences among positions, which have no values either.
    for config in (twin.config, twin.config.get_text_config()):  # models of parts ask one or the other
        config.use_cache = True
    return twin


def run_twin(twin: Any, forget: Callable[[], None]) -> str | None:
    """Run the body of a `meta_twin` on a few tokens; why it could not be run, None when it could.

    Args:
        forget: is called before another attempt.
    """
    ids = torch.zeros(1, _TRACE_TOKENS, dtype=torch.long, device="meta")
    inputs = around(twin, ids)
    # Most models read a mask's values and must be given none; DeBERTa makes one where there is none.
    problem = _attempt(twin, **inputs)
    if problem is None:
        return None
    forget()
    if _attempt(twin, **inputs, attention_mask=torch.ones_like(ids)) is None:
        return None
    text = twin.config.get_text_config()
    for text.use_cache in (True, False):  # an encoder made of a decoder's parts (T5's) refuses a cache
        forget()
        with _WholeMasks():
            if _attempt(twin, **inputs) is None:
                return None
    return problem


class _WholeMasks(TorchDispatchMode):
    """Answers code that asks for one truth value of a mask ("is all of it attended to?") with yes. On meta only: who
    watches the forward asks tensors that have values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool
        if asked and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


def _attempt(model: Any, **inputs: Tensor) -> str | None:
    """Run the body (heads hold no blocks, and some cannot run on meta); what went wrong, or None.

    Any exception counts, for any model code may run here; the adapter carries it on and `inspect` shows it.
    """
    try:
        with torch.no_grad():
            model.base_model(**inputs)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None
