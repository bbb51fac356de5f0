"""What waits while calibration windows wait: found among the tensors a forward made, and moved to files.

`Made` watches a lane's forward and tells what its frames hold; `Parking` keeps that in memory up to a budget
and the rest in memory-mapped files. Both on any device: a file's pages are the CPU's, so what waited there is copied
back before its lane goes on, except where lanes compute on the CPU and read the pages themselves.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmcomp.devices import CPU

_WORTH_MOVING = 1 << 16  # bytes that may wait in a file; a file for less costs more than it frees
HEAPED = 1 << 18  # bytes of a block from which on it is mapped by itself and goes back to the system when it is freed

# Tensors that share one storage, all that there are.
Group = list[Tensor]


class Made(TorchFunctionMode):
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
        return [group for group in by_storage(self.alive()) if _complete(group)]

    def alive(self) -> list[Tensor]:
        """Those that live still, the oldest first."""
        found = {key: one for key, held in self._known.items() if (one := held()) is not None}
        self._known = {key: self._known[key] for key in found}
        return list(found.values())


class Parking:
    """Holds what waits in memory up to a budget, the rest in memory-mapped files without a name.

    What has waited longest goes to a file first: a tensor that was parked stages ago (the block's input, kept
    for the residual sum) is needed last, the newest at the very next step.

    Args:
        directory: where the files are made (and unlinked at once, so a kill leaves nothing).
        budget: bytes that may stay in memory at a time, of all storages that were parked and still live.
        device: where lanes compute, and where all that stays in memory lies.

    Attributes:
        spilled: bytes that went to files so far.
        holed: those of them that have left holes in the heap.
    """

    def __init__(self, directory: Path, budget: int, device: torch.device = CPU) -> None:
        self._directory = directory
        self._budget = budget
        self._device = device
        self._waiting: dict[int, list[weakref.ref[Tensor]]] = {}  # by address, the oldest first
        self._files: dict[int, list[Tensor]] = {}  # mapped bytes, by their number
        self.spilled = self.holed = 0

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

    def fetch(self, waiting: Iterable[Tensor]) -> None:
        """Bring to the device what of these was moved to files; on the CPU they are read where they are."""
        if self._device.type == "cpu":
            return
        for group in by_storage(waiting):
            storage = group[0].untyped_storage()
            if storage.filename is not None:
                _swap(group, _whole(storage, CPU).to(self._device))

    def _spill(self, group: Group) -> None:
        storage = group[0].untyped_storage()
        mapped = self._mapped(storage.nbytes())
        mapped.copy_(_whole(storage, self._device))
        _swap(group, mapped)
        self.spilled += storage.nbytes()
        self.holed += storage.nbytes() if storage.nbytes() < HEAPED else 0

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


def by_storage(tensors: Iterable[Tensor]) -> list[Group]:
    """Tensors, and what they are views of, as far as they are worth moving; those of one storage together."""
    shared: dict[int, dict[int, Tensor]] = {}
    for one in tensors:
        # A view keeps the tensor that it was made from alive, whether anything else does or not.
        for member in (one, one._base):
            if member is not None and member.untyped_storage().nbytes() >= _WORTH_MOVING:
                shared.setdefault(member.untyped_storage()._cdata, {})[id(member)] = member
    return [list(members.values()) for members in shared.values()]


def _whole(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    """uint8, all bytes of a storage on that device."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _swap(group: Group, content: Tensor) -> None:
    """Let tensors of one storage read the same bytes elsewhere: `content`, uint8.

    Waiting frames still refer to these very tensors; swapping their storage frees the memory.
    """
    target = content.untyped_storage()
    for one in group:
        moved = torch.empty(0, dtype=one.dtype, device=content.device)
        one.data = moved.set_(target, one.storage_offset(), one.shape, one.stride())


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
