"""Calibration windows that wait inside the model's own forward pass, so that each linear is computed once.

True-sequential calibration wants, stage by stage, the inputs that follow from the *compressed* earlier stages.
The usual loop calls a block again from its start for every stage, which doubles the work, and has to guess
each block's arguments (masks, rotary tables, layer types) from outside. Here every batch runs the whole
model's forward once, in a greenlet (a *lane*) that stops where something is to be done: at the entry of a
block, whose weights are then read, and before the first linear of a stage that is not yet compressed. All
lanes stop at the same place; the pipeline looks at their inputs, compresses, and lets them go on. The model's
own code decides every argument.

While lanes wait, their inputs may be parked in memory-mapped files (`Parking`). This is the only place of
llmcomp that registers hooks for calibration.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from llmcomp.errors import RunError
from llmcomp.matmul import WideProducts


@dataclass(frozen=True)
class Stop:
    """Where a lane waits: `kind` 'block' or 'linear', the module's name, and its (first) input.

    `held`: what else its frames keep for later and no view shares, such as the sum that a residual connection
    adds to; as far as some module of the block has been given it.
    """

    kind: str
    name: str
    inputs: Tensor | None
    held: tuple[Tensor, ...] = ()


class Parking:
    """Holds waiting tensors in memory up to a budget, the rest in memory-mapped files without a name.

    What has waited longest goes to a file first: a tensor that was parked stages ago (the block's input, kept
    for the residual sum) is needed last, the newest at the very next step.

    Args:
        directory: where the files are made (and unlinked at once, so a kill leaves nothing).
        budget: bytes that may stay in memory at a time, of all tensors that were parked and still live.
    """

    def __init__(self, directory: Path, budget: int) -> None:
        self._directory = directory
        self._budget = budget
        self._waiting: list[weakref.ref[Tensor]] = []
        self.spilled = 0

    def park(self, tensor: Tensor) -> None:
        """Count a tensor; move the oldest ones' storage into files while the budget is exceeded.

        The tensor objects stay the same, so whoever refers to one goes on with it.
        """
        # Lanes that have moved on have dropped what they waited with.
        alive = [one for one in (held() for held in self._waiting) if one is not None]
        known = {one.data_ptr() for one in alive}
        if tensor.data_ptr() not in known and tensor.untyped_storage().filename is None:
            alive.append(tensor)
        held = sum(_nbytes(one) for one in alive)
        while held > self._budget:
            oldest = alive.pop(0)
            held -= _nbytes(oldest)
            self._spill(oldest)
        self._waiting = [weakref.ref(one) for one in alive]

    def _spill(self, tensor: Tensor) -> None:
        mapped = self._mapped(tensor.numel(), tensor.dtype).view(tensor.shape)
        mapped.copy_(tensor)
        # The waiting frame still refers to this very tensor; swapping its storage frees the memory.
        tensor.data = mapped
        self.spilled += _nbytes(tensor)

    def _mapped(self, count: int, dtype: torch.dtype) -> Tensor:
        with tempfile.NamedTemporaryFile(dir=self._directory) as file:
            nbytes = count * dtype.itemsize
            # Blocks are reserved now: a full disk must be an error here, not a SIGBUS at the first write.
            _reserve(file.fileno(), nbytes)
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _reserve(descriptor: int, nbytes: int) -> None:
    """Give a file `nbytes` of real disk blocks."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
    else:  # macOS and Windows have no such call; there writing zeros does the same
        os.write(descriptor, bytes(nbytes))


class Lane:
    """One batch on its way through the model.

    Args:
        model: called as model(**inputs).
        inputs: keyword arguments, such as input_ids and attention_mask.
        counted: whether its tokens are calibration data; a witness only goes along.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], counted: bool = True) -> None:
        self.inputs = inputs
        self.counted = counted
        self.mask = inputs.get("attention_mask")
        self.output: Any = None
        self._greenlet = greenlet.greenlet(lambda: model(**inputs))

    def advance(self) -> Stop | None:
        """Run to the next stop; None when the model's forward has returned (`output` holds what)."""
        with torch.no_grad(), WideProducts():
            reached = self._greenlet.switch()
        if self._greenlet.dead:
            self.output = reached
            return None
        if not isinstance(reached, Stop):
            raise RunError("A calibration window stopped at no known place; please report this model.")
        return reached

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
    wanted: Callable[[str], bool],
) -> Iterator[None]:
    """While it lasts, lanes stop at the entry of `blocks` and before each of `linears` that is `wanted`.

    Forward passes outside of a lane run through. The model keeps no cache of keys and values meanwhile: a
    waiting lane would hold one for every block that it has passed.
    """
    whole: Any = getattr(model, "config", None)
    config = None if whole is None else whole.get_text_config()
    cached = getattr(config, "use_cache", None)
    home = greenlet.getcurrent()
    given: weakref.WeakKeyDictionary[Any, _Given] = weakref.WeakKeyDictionary()

    def note(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        here, tensor = greenlet.getcurrent(), _first_tensor(positional, keywords)
        if here is not home and tensor is not None:
            given.setdefault(here, _Given()).add(tensor)

    def stop(kind: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            here = greenlet.getcurrent()
            if here is home or (kind == "linear" and not wanted(name)):
                return
            inputs = _first_tensor(positional, keywords)
            held = tuple(one for one in given.setdefault(here, _Given()).alive() if one is not inputs)
            home.switch(Stop(kind, name, inputs, held))

        return hook

    stops = {module: (kind, name) for kind, of in (("block", blocks), ("linear", linears)) for name, module in of.items()}
    inside = [module for block in blocks.values() for module in block.modules() if module not in stops]
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in dict.fromkeys(inside)]
    handles += [module.register_forward_pre_hook(stop(*place), with_kwargs=True) for module, place in stops.items()]
    if config is not None and cached:
        config.use_cache = False
    try:
        yield
    finally:
        if config is not None and cached:
            config.use_cache = cached
        for handle in handles:
            handle.remove()


class _Given:
    """Tensors that modules were given and that live still, oldest first."""

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref[Tensor]] = {}

    def add(self, tensor: Tensor) -> None:
        if tensor.is_floating_point() and not isinstance(tensor, nn.Parameter):
            self._known[id(tensor)] = weakref.ref(tensor)

    def alive(self) -> list[Tensor]:
        """Those that own their storage alone: to move one that has views would free nothing."""
        found = {key: one for key, held in self._known.items() if (one := held()) is not None}
        self._known = {key: self._known[key] for key in found}
        return [one for one in found.values() if _users(one) == 1]


def _users(tensor: Tensor) -> int:
    """Tensors that share its storage, itself included."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # `storage` itself is one


def _first_tensor(positional: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor | None:
    for value in (*positional, keywords.get("hidden_states"), keywords.get("input")):
        if isinstance(value, Tensor):
            return value
    return None


def advance_all(lanes: list[Lane], visit: Callable[[Lane, Stop], None]) -> Stop | None:
    """Move every lane to its next stop, visiting each as it arrives.

    Returns:
        The stop that all have reached, without its tensors (who keeps it must not keep a lane's memory); None
        when all have finished.

    Raises:
        RunError: lanes stopped at different places.
    """
    first: Stop | None = None
    for number, lane in enumerate(lanes):
        stop = lane.advance()
        place = (stop.kind, stop.name) if stop else None
        if number == 0:
            first = replace(stop, inputs=None, held=()) if stop else None
        elif place != ((first.kind, first.name) if first else None):
            raise RunError(
                f"Calibration windows take different ways through the model: one reached {place}, "
                f"another {first.name if first else 'the end'}; this architecture cannot be calibrated yet."
            )
        if stop is not None:
            visit(lane, stop)
    return first
