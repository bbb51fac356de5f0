"""What calibration windows hold in memory while they wait, found by running the model's own forward on meta.

Between two stops a lane (`llmcomp.calibration.capture`) keeps whatever its frames refer to: the residual
stream, the normed input, queries and keys … Which tensors those are is the model code's affair, so they are
not guessed here: a lane is driven through a block on meta tensors of the real shape, which computes nothing,
and the storages that live at each stop are added up.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmcomp.adapters.base import Adapter, Block
from llmcomp.calibration.capture import Lane, stopping
from llmcomp.feeds import around


@dataclass(frozen=True)
class Waiting:
    """One lane at one stop, in bytes.

    Attributes:
        place: module name of the stop.
        parked: storages that a lane holds alone and that so may go to files (`Parking`).
        held: all others.
        step: what computing from the stop before to this one took at its peak, over what was held before.
    """

    place: str
    parked: int
    held: int
    step: int


class Look:
    """What lanes hold on their way through a model. Each question is answered once: it depends on no method and no
    width, and who plans many of them asks it for each."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._known: dict[tuple[Any, ...], Any] = {}

    def waiting(self, block: Block, wanted: Sequence[str], rows: int, length: int) -> list[Waiting]:
        """As the function of that name."""
        found: list[Waiting] = self._once(waiting, block, tuple(wanted), rows, length)
        return found

    def graph(self, block: Block, rows: int, length: int) -> int:
        """As the function of that name."""
        return int(self._once(graph, block, rows, length))

    def _once(self, ask: Callable[..., Any], block: Block, *rest: Any) -> Any:
        key = (ask, block.name, *rest)
        if key not in self._known:
            self._known[key] = ask(self._adapter, block, *rest)
        return self._known[key]


def waiting(adapter: Adapter, block: Block, wanted: Sequence[str], rows: int, length: int) -> list[Waiting]:
    """A lane of `rows` windows of `length` tokens at the entry of `block`, at each of the linears `wanted`
    (in order), and where it stops after the block. Empty where the model cannot be run on meta tensors."""
    if adapter.trace_problem is not None:
        return []
    twin: Any = copy.deepcopy(adapter.model).to("meta")
    twin.config.pad_token_id = None
    pending = set(wanted)
    body = twin.base_model
    places = {one.name: twin.get_submodule(one.name) for one in adapter.blocks}
    linears = {name: twin.get_submodule(name) for name in wanted}
    found: list[Waiting] = []
    storages = _Storages()
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    mode = stopping(twin, places, linears, pending.__contains__)
    with mode, _FusedAttention(), storages:
        lane = Lane(body, around(twin, ids))
        try:
            inside, before = False, 0
            while (reached := _advance(lane, storages.parked)) is not None:
                kind, name = reached
                inside = inside or name == block.name
                files = sum(size for key, size in storages.sizes.items() if key in storages.parked)
                if inside:
                    found.append(Waiting(name, files, storages.now - files, storages.peak - before))
                if inside and kind == "block" and name != block.name:
                    break
                before = storages.peak = storages.now
            else:  # the last block: the lane has left with its output
                found.append(Waiting("the end", 0, storages.now, storages.peak - before))
        finally:
            lane.close()
    return found


def graph(adapter: Adapter, block: Block, rows: int, length: int) -> int:
    """Bytes that autograd keeps of one lane's way through `block` computed in float32, where its weights want
    gradients (weights and what the lane holds apart). 0 where the model cannot be run on meta tensors."""
    if adapter.trace_problem is not None:
        return 0
    twin: Any = copy.deepcopy(adapter.model).to("meta").float()
    twin.config.pad_token_id = None
    module = twin.get_submodule(block.name)
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    kept: dict[int, Tensor] = {}
    with stopping(twin, {block.name: module}, {}, lambda name: False), _FusedAttention(), _Storages():
        lane = Lane(twin.base_model, around(twin, ids))
        try:
            stop = lane.advance()
            if stop is None or stop.call is None:
                return 0
            own = [*module.parameters(), *module.buffers(), *tree_leaves(stop.call)]
            known = {one.untyped_storage()._cdata for one in own if isinstance(one, Tensor)}
            for ref in block.linears:
                twin.get_submodule(ref.name).weight.requires_grad_()

            def keep(tensor: Tensor) -> Tensor:
                kept[tensor.untyped_storage()._cdata] = tensor  # alive, so that no address comes twice
                return tensor

            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                result = module(*stop.call[0], **stop.call[1])
            del result
        finally:
            lane.close()
    return sum(one.untyped_storage().nbytes() for key, one in kept.items() if key not in known)


def _advance(lane: Lane, parked: set[int]) -> tuple[str, str] | None:
    """Where the lane stops next; adds to `parked` what could wait in files there, and keeps none of it."""
    stop = lane.advance()
    if stop is None:
        return None
    parked |= {group[0].untyped_storage()._cdata for group in lane.held()}
    return stop.kind, stop.name


class _Storages(TorchDispatchMode):
    """Bytes of the storages that operations have made and somebody still refers to.

    Attributes:
        sizes: storage → bytes. now: their sum. peak: the largest it has been. parked: what may go to files.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.parked: set[int] = set()
        self._references: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # "is this mask all ones?", "do positions rise?": windows are whole and unpadded
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key], self._references[key] = storage.nbytes(), 0
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        self._references[key] += 1
        weakref.finalize(tensor, self._drop, key)

    def _drop(self, key: int) -> None:
        self._references[key] -= 1
        if not self._references[key]:
            del self._references[key]
            self.parked.discard(key)  # another storage may come to lie at its address
            self.now -= self.sizes.pop(key)


class _FusedAttention(TorchFunctionMode):
    """Attention as one kernel, as the CPU has it; on meta torch would spell out the [length, length] scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, value = named["query"], named["value"]
            attended: Tensor = _Attended.apply(query, named["key"], value)
            return attended
        return func(*args, **(kwargs or {}))


class _Attended(torch.autograd.Function):
    """Attention's output without values, keeping for a backward pass what the fused kernel keeps. Nothing here is
    differentiated, so it has no `backward`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result)
        return result
