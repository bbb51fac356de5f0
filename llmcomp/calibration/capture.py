"""Calibration windows that wait inside the model's own forward pass, so that each linear is computed once.

True-sequential calibration wants, stage by stage, the inputs that follow from the *compressed* earlier stages.
The usual loop calls a block again from its start for every stage, which doubles the work, and has to guess
each block's arguments (masks, rotary tables, layer types) from outside. Here every batch runs the whole
model's forward once, in a greenlet (a *lane*) that stops where something is to be done: at the entry of a
block, whose weights are then read, and before the first linear of a stage that is not yet compressed. All
lanes stop at the same place; the pipeline looks at their inputs, compresses, and lets them go on. The model's
own code decides every argument.

This is the only place of llmcomp that registers hooks for calibration.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from llmcomp.calibration.parking import Group, Made
from llmcomp.errors import RunError
from llmcomp.matmul import WideProducts


@dataclass(frozen=True)
class Stop:
    """Where a lane waits.

    Attributes:
        kind: 'block' or 'linear', before the module is computed; 'exit', where a block has been, and will be again.
        name: the module's. inputs: its (first) input.
        call: of a block, what it is called with: (positional, keywords).
        chained: of a block, whether its input is what the block before has given, as it was.
    """

    kind: str
    name: str
    inputs: Tensor | None
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    chained: bool = False


class Lane:
    """One batch on its way through the model.

    Args:
        model: called as model(**inputs).
        inputs: keyword arguments, such as input_ids and attention_mask.
        counted: whether its tokens are calibration data; a witness only goes along.
        device: where the model computes; inputs are brought there when the lane starts. None: they lie there.
    """

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Tensor], counted: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.inputs = inputs
        self.counted = counted

        def here(value: Tensor) -> Tensor:
            return value if device is None else value.to(device)

        mask = inputs.get("attention_mask")
        self.mask = None if mask is None else here(mask)
        self.output: Any = None
        self._made = Made()
        self._greenlet = greenlet.greenlet(lambda: model(**{name: here(value) for name, value in inputs.items()}))

    def advance(self) -> Stop | None:
        """Run to the next stop; None when the model's forward has returned (`output` holds what)."""
        with torch.no_grad(), WideProducts(), self._made:
            reached = self._greenlet.switch()
        if self._greenlet.dead:
            self.output = reached
            return None
        if not isinstance(reached, Stop):
            raise RunError("A calibration window stopped at no known place; please report this model.")
        return reached

    def held(self) -> list[Group]:
        """What its frames keep while it waits, the oldest first: the next module's input, what a residual
        connection will add, queries and keys."""
        return self._made.groups()

    def waiting(self) -> Iterator[Tensor]:
        """All of that, wherever it has been moved to."""
        yield from self._made.alive()

    def close(self) -> None:
        """Leave the forward pass where it is and free what it holds."""
        if not self._greenlet.dead:
            self._greenlet.throw(greenlet.GreenletExit)

    def tokens(self, inputs: Tensor) -> Tensor:
        """Rows [tokens, features] of a module's input that belong to real tokens, padding left out."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        # Some modules flatten [batch, tokens, features] first; one that drops padding itself has fewer rows.
        if self.mask is not None and len(rows) == self.mask.numel():
            return rows[self.mask.bool().flatten()]
        return rows


@contextmanager
def stopping(
    model: nn.Module, blocks: Mapping[str, nn.Module], linears: Mapping[str, nn.Module],
    wanted: Callable[[str], bool], repeated: Callable[[str], bool] = lambda name: False,
) -> Iterator[None]:
    """While it lasts, lanes stop at the entry of `blocks` and before each of `linears` that is `wanted`; and once
    more behind a block that is to be `repeated`: when they go on, it is computed anew from the same inputs, with
    the weights that it has by then.

    Forward passes outside of a lane run through. The model keeps no cache of keys and values meanwhile: a
    waiting lane would hold one for every block that it has passed.
    """
    # A decoder beside an encoder has a config of its own; models of parts ask the whole's or the part's.
    whole = [one for module in model.modules() if (one := _config(module)) is not None]
    configs = [*whole, *(one.get_text_config() for one in whole)]
    caching = {id(config): config for config in configs if getattr(config, "use_cache", None)}
    home = greenlet.getcurrent()
    given: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # lane → its latest block's output

    def stop(kind: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            here = greenlet.getcurrent()
            if here is home or (kind == "linear" and not wanted(name)):
                return
            call = (positional, keywords) if kind == "block" else None
            inputs, before = first_tensor(positional, keywords), given.get(here)
            home.switch(Stop(kind, name, inputs, call, before is not None and before() is inputs))

        return hook

    def leave(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
            here = greenlet.getcurrent()
            if here is home:
                return None
            if repeated(name):
                home.switch(Stop("exit", name, first_tensor(positional, keywords)))
                output = module.forward(*positional, **keywords)
            first = next((one for one in tree_leaves(output) if isinstance(one, Tensor)), None)
            given[here] = (lambda: None) if first is None else weakref.ref(first)
            return output

        return hook

    handles = [
        module.register_forward_pre_hook(stop(kind, name), with_kwargs=True)
        for kind, modules in (("block", blocks), ("linear", linears))
        for name, module in modules.items()
    ]
    handles += [module.register_forward_hook(leave(name), with_kwargs=True) for name, module in blocks.items()]
    for config in caching.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching.values():
            config.use_cache = True
        for handle in handles:
            handle.remove()


@contextmanager
def watching(blocks: Mapping[str, nn.Module], seen: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """While it lasts, `seen` hears what each of `blocks` has read and given: its name, both tensors. Entered before
    `stopping`, it hears that before a lane stops behind the block."""

    def hook(name: str) -> Callable[..., None]:
        def hear(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            read = first_tensor(positional, keywords)
            given = next((one for one in tree_leaves(output) if isinstance(one, Tensor)), None)
            if read is not None and given is not None:
                seen(name, read, given)

        return hear

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _config(module: nn.Module) -> Any:
    """Of a transformers model or a part of one."""
    config = getattr(module, "config", None)
    return config if hasattr(config, "get_text_config") else None


def first_tensor(positional: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor | None:
    """What a module reads: the first tensor that it is called with."""
    for value in (*positional, keywords.get("hidden_states"), keywords.get("input")):
        if isinstance(value, Tensor):
            return value
    return None


def advance_all(
    lanes: list[Lane], visit: Callable[[Lane, Stop], None], leave: Callable[[Lane], None] = lambda lane: None
) -> Stop | None:
    """Move every lane to its next stop.

    Args:
        visit: called with each as it arrives. leave: called with each before it goes on.

    Returns:
        The stop that all have reached, without its tensors (who keeps it must not keep a lane's memory); None
        when all have finished.

    Raises:
        RunError: lanes stopped at different places.
    """
    first: Stop | None = None
    for number, lane in enumerate(lanes):
        leave(lane)
        stop = lane.advance()
        place = (stop.kind, stop.name) if stop else None
        if number == 0:
            first = replace(stop, inputs=None, call=None) if stop else None
        elif place != ((first.kind, first.name) if first else None):
            raise RunError(
                f"Calibration windows take different ways through the model: one reached {place}, "
                f"another {first.name if first else 'the end'}; this architecture cannot be calibrated yet."
            )
        if stop is not None:
            visit(lane, stop)
    return first
