"""Calibration windows that wait inside the model's own forward pass, so that each linear is computed once.

True-sequential calibration wants, stage by stage, the inputs that follow from the *compressed* earlier stages.
The usual loop calls a block again from its start for every stage, which doubles the work, and has to guess
each block's arguments (masks, rotary tables, layer types) from outside. Here every batch runs the whole
model's forward once, in a greenlet (a *lane*) that stops where something is to be done: at the entry of a
block, whose weights are then read, and before the first linear of a stage that is not yet compressed. All
lanes stop at the same place; the pipeline looks at their inputs, compresses, and lets them go on. The model's
own code decides every argument.

While lanes wait, what they hold may be parked in memory-mapped files (`Parking`). This is the only place of
llmcomp that registers hooks for calibration.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmcomp.errors import RunError
from llmcomp.matmul import WideProducts

_WORTH_MOVING = 1 << 16  # bytes that may wait in a file; a file for less costs more than it frees


@dataclass(frozen=True)
class Stop:
    """Where a lane waits: `kind` 'block' or 'linear', the module's name, and its (first) input."""

    kind: str
    name: str
    inputs: Tensor | None


# Tensors that share one storage, all that there are.
Group = list[Tensor]


class Parking:
    """Holds what waits in memory up to a budget, the rest in memory-mapped files without a name.

    What has waited longest goes to a file first: a tensor that was parked stages ago (the block's input, kept
    for the residual sum) is needed last, the newest at the very next step.

    Args:
        directory: where the files are made (and unlinked at once, so a kill leaves nothing).
        budget: bytes that may stay in memory at a time, of all storages that were parked and still live.
    """

    def __init__(self, directory: Path, budget: int) -> None:
        self._directory = directory
        self._budget = budget
        self._waiting: dict[int, list[weakref.ref[Tensor]]] = {}  # by address, the oldest first
        self._files: dict[int, list[Tensor]] = {}  # mapped bytes, by their number
        self.spilled = 0

    def park(self, groups: Iterable[Group]) -> None:
        """Count storages; move the oldest ones' bytes into files while the budget is exceeded.

        The tensor objects stay the same, so whoever refers to one goes on with it.
        """
        for group in groups:
            storage = group[0].untyped_storage()
            if storage.filename is None:
                self._waiting[storage.data_ptr()] = [weakref.ref(one) for one in group]
        # Lanes that have moved on have dropped what they waited with.
        alive = {at: group for at, held in self._waiting.items() if (group := _alive(held))}
        held = sum(group[0].untyped_storage().nbytes() for group in alive.values())
        for at in list(alive):
            if held <= self._budget:
                break
            oldest = alive.pop(at)
            held -= oldest[0].untyped_storage().nbytes()
            if _complete(oldest):  # a lane that has not stopped since may have made another view
                self._spill(oldest)
        self._waiting = {at: self._waiting[at] for at in alive}

    def _spill(self, group: Group) -> None:
        storage = group[0].untyped_storage()
        mapped = self._mapped(storage.nbytes())
        mapped.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
        target = mapped.untyped_storage()
        for one in group:
            # Waiting frames still refer to these very tensors; swapping their storage frees the memory.
            moved = torch.empty(0, dtype=one.dtype)
            one.data = moved.set_(target, one.storage_offset(), one.shape, one.stride())
        self.spilled += storage.nbytes()

    def _mapped(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] in a file: one whose tensors are gone, or a new one. To make and map a file takes
        longer than to write to it."""
        files = self._files.setdefault(nbytes, [])
        for file in files:
            if _users(file) == 1:
                return file
        with tempfile.NamedTemporaryFile(dir=self._directory) as made:
            # Blocks are reserved now: a full disk must be an error here, not a SIGBUS at the first write.
            _reserve(made.fileno(), nbytes)
            files.append(torch.from_file(made.name, shared=True, size=nbytes, dtype=torch.uint8))
        return files[-1]


def _alive(held: Iterable[weakref.ref[Tensor]]) -> Group:
    return [one for one in (reference() for reference in held) if one is not None]


def _complete(group: Group) -> bool:
    """Whether no other tensor shares the storage, so that all of its users can be moved together."""
    return _users(group[0]) == len(group)


def _users(tensor: Tensor) -> int:
    """How many tensors share its storage, itself included."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # `storage` itself is one


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
        self._made = _Made()
        self._greenlet = greenlet.greenlet(lambda: model(**inputs))

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

    def stop(kind: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            here = greenlet.getcurrent()
            if here is home or (kind == "linear" and not wanted(name)):
                return
            home.switch(Stop(kind, name, _first_tensor(positional, keywords)))

        return hook

    handles = [
        module.register_forward_pre_hook(stop(kind, name), with_kwargs=True)
        for kind, modules in (("block", blocks), ("linear", linears))
        for name, module in modules.items()
    ]
    if config is not None and cached:
        config.use_cache = False
    try:
        yield
    finally:
        if config is not None and cached:
            config.use_cache = cached
        for handle in handles:
            handle.remove()


class _Made(TorchFunctionMode):
    """Remembers, without keeping them alive, the tensors that operations make while it lasts, oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, Tensor) and one.is_floating_point():
                self._known.pop(id(one), None)
                self._known[id(one)] = weakref.ref(one)
        return result

    def groups(self) -> list[Group]:
        """Those that live still, by storage; a storage that somebody else shares is left out."""
        found = {key: one for key, held in self._known.items() if (one := held()) is not None}
        self._known = {key: self._known[key] for key in found}
        shared: dict[int, dict[int, Tensor]] = {}
        for one in found.values():
            # A view keeps the tensor that it was made from alive, whether anything else does or not.
            for member in (one, one._base):
                if member is not None and member.untyped_storage().nbytes() >= _WORTH_MOVING:
                    shared.setdefault(member.untyped_storage()._cdata, {})[id(member)] = member
        return [group for members in shared.values() if _complete(group := list(members.values()))]


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
            first = replace(stop, inputs=None) if stop else None
        elif place != ((first.kind, first.name) if first else None):
            raise RunError(
                f"Calibration windows take different ways through the model: one reached {place}, "
                f"another {first.name if first else 'the end'}; this architecture cannot be calibrated yet."
            )
        if stop is not None:
            visit(lane, stop)
    return first
