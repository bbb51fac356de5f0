"""Which operation before a stage can take over a scale of the stage's input channels, found by following channels.

A linear computes the same with W diag(s) on x / s. The division costs nothing where the operation that makes x can
be scaled instead: a norm's weight, or the rows of a linear whose output reaches x unmixed (values through attention,
the other half of a gated MLP). Which those are is read off the model's own forward, run on meta tensors: every
output channel of a norm or linear carries a number, and operations that only move or weigh values pass the numbers
on. Whoever reads a channel in any other way (a residual sum, an activation function) forbids its scaling.

No table of module names: a new architecture needs no line here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers.pytorch_utils import Conv1D

from llmcomp.adapters.base import Adapter, Block
from llmcomp.adapters.trace import linears, meta_twin, run_twin

aten = torch.ops.aten

# Operations that put values elsewhere and change none.
_MOVES = {
    aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.transpose, aten.permute, aten.t, aten.expand,
    aten.unsqueeze, aten.squeeze, aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.clone,
    aten.contiguous, aten.alias, aten.detach, aten.repeat, aten._to_copy, aten.lift_fresh,
}  # fmt: skip
_RESHAPES = {aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias}
_COPIES = {aten.clone, aten.contiguous, aten.alias, aten.detach, aten._to_copy, aten.lift_fresh}
_SHAPES_ONLY = {aten.empty_like, aten.zeros_like, aten.ones_like, aten.new_zeros, aten.new_empty, aten.new_ones}
_PRODUCTS = {aten.mm, aten.bmm, aten.matmul, aten.addmm, aten.baddbmm, aten.linear}


# What a norm adds to its weight before it multiplies.
SHIFTS = {"norm": 0.0, "norm+1": 1.0}


@dataclass(frozen=True, eq=False)
class Fold:
    """What takes over the scale of a stage's input.

    Attributes:
        producer: name of the norm or linear.
        kind: 'norm' (multiplies by its weight), 'norm+1' (by 1 + weight, as Gemma's) or 'linear'.
        channels: int64 [in], which output channel of the producer each input channel of the stage is; channels
            that share one (query heads of a group) share a scale.
        others: names of parameters [out, in] outside of the stage that read the same input.
    """

    producer: str
    kind: str
    channels: Tensor
    others: tuple[str, ...] = ()


def folds(adapter: Adapter) -> dict[str, Fold | str]:
    """For the first linear of each stage: what can take over the scale of its input, or why nothing can."""
    twin = meta_twin(adapter.model)
    flow = _Flow(adapter, twin)
    with flow:
        problem = run_twin(twin, flow.forget)
    if problem is not None:
        why = f"its forward could not be followed ({problem})"
        return {stage[0].name: why for block in adapter.blocks for stage in block.stages}
    return {
        stage[0].name: flow.verdict(block, [ref.name for ref in stage])
        for block in adapter.blocks
        for stage in block.stages
    }


@dataclass(eq=False)
class _Source:
    """A norm or linear whose output channels are followed.

    Attributes:
        kind: as of `Fold`; None for a norm of unknown form.
        spoiled: channel → what reads it in a way that forbids scaling.
        readers: parameter → the channel that each of its input columns reads.
    """

    name: str
    kind: str | None
    spoiled: dict[int, str] = field(default_factory=dict)
    readers: dict[str, Tensor] = field(default_factory=dict)

    def spoil(self, channels: Tensor, reader: str) -> None:
        for channel in channels.unique().tolist():
            self.spoiled.setdefault(channel, reader)


@dataclass(frozen=True, eq=False)
class _Labels:
    """Of one tensor: whose channels its entries are multiples of. channels: int32, of the tensor's shape."""

    source: _Source
    channels: Tensor

    def column(self) -> Tensor | None:
        """The channels of one token, where those of all are the same."""
        rows = self.channels.reshape(-1, self.channels.shape[-1])
        return rows[0].long() if bool((rows == rows[0]).all()) else None


class _Flow(TorchDispatchMode):
    """Follows the channels of all norms and linears of the blocks through one forward."""

    def __init__(self, adapter: Adapter, twin: nn.Module) -> None:
        super().__init__()
        self._blocks = adapter.blocks
        self._opaque = 0  # depth of norms and linears that are being computed
        self._labels: dict[int, tuple[Tensor, _Labels]] = {}  # by id; who is kept keeps its id
        self._weights: dict[int, tuple[Tensor, str]] = {id(p): (p, name) for name, p in twin.named_parameters()}
        self._sources: dict[str, _Source] = {}
        forms: dict[tuple[type, int], str | None] = {}
        inside = tuple(f"{block.name}." for block in adapter.blocks)
        taken = set()
        for name, module in linears(twin):
            taken.add(name)
            self._watch(name, module, "linear" if name.startswith(inside) else None)
        for name, module in twin.named_modules():
            weight = getattr(module, "weight", None)
            if name in taken or not isinstance(weight, nn.Parameter) or weight.dim() != 1 or any(module.children()):
                continue
            key = (type(module), len(weight))
            if key not in forms:
                forms[key] = norm_form(module)
            self._watch(name, module, forms[key] if name.startswith(inside) else None)
        for block in adapter.blocks:
            twin.get_submodule(block.name).register_forward_hook(self._leave)

    def forget(self) -> None:
        """Start anew."""
        self._opaque = 0
        self._labels.clear()
        self._sources.clear()

    # --- what modules do ---

    def _watch(self, name: str, module: nn.Module, kind: str | None) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read = self._of(args[0] if args else next(iter(kwargs.values())))
            if read is not None and not self._opaque:
                if isinstance(module, (nn.Linear, Conv1D)):
                    self._read(read, f"{name}.weight")
                else:
                    read.source.spoil(read.channels, name)
            self._opaque += 1

        def after(_: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            self._opaque -= 1
            if self._opaque or kind is None or not isinstance(result, Tensor) or name in self._sources:
                return
            source = self._sources[name] = _Source(name, kind)
            channels = torch.arange(result.shape[-1], dtype=torch.int32).expand(result.shape).contiguous()
            self._attach(result, _Labels(source, channels))

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """What a block gives away is read by whoever comes after it."""
        for one in tree_flatten(result)[0]:
            labels = self._of(one)
            if labels is not None:
                labels.source.spoil(labels.channels, "what follows the block")
        self._labels.clear()

    # --- what operations do ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._opaque:
            self._pass_on(func.overloadpacket, func, args, kwargs, result)
        return result

    def _pass_on(self, packet: Any, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        labelled = [labels for one in given if (labels := self._of(one)) is not None]
        if not labelled:
            held = self._weights.get(id(given[0])) if given and packet in _MOVES else None
            if held is not None and isinstance(result, Tensor):
                self._weights[id(result)] = (result, held[1])
            return
        if packet in _SHAPES_ONLY:
            return
        if packet in _PRODUCTS and self._read_by_weight(given):
            return
        channels = self._channels(packet, func, args, kwargs, result, given)
        results = result if isinstance(result, (list, tuple)) else [result]
        found = channels if isinstance(channels, (list, tuple)) else [channels]
        if channels is None or len({labels.source.name for labels in labelled}) > 1:
            for labels in labelled:
                labels.source.spoil(labels.channels, packet.__name__)
            for one in results:
                self._labels.pop(id(one), None)
            return
        for one, numbers in zip(results, found, strict=True):
            self._attach(one, _Labels(labelled[0].source, numbers))

    def _channels(self, packet: Any, func: Any, args: Any, kwargs: Any, result: Any, given: list[Tensor]) -> Any:
        """Of the result (or of each of its parts): the channels its entries are multiples of; None where they
        are not."""
        first, *more = [self._of(one) for one in given]
        if packet in _RESHAPES and first is not None:
            return first.channels.reshape(result.shape)
        if packet in _COPIES and first is not None:
            return first.channels
        if packet in _MOVES and first is not None and not more:
            moved = tree_map(lambda one: first.channels if one is given[0] else one, (args, kwargs))
            return func(*moved[0], **moved[1])
        if packet is aten.cat:
            full = [one for one in given if one.numel()]  # a cache begins empty
            return first_of.channels if len(full) == 1 and (first_of := self._of(full[0])) is not None else None
        if packet in (aten.mul, aten.div):
            scaled = [labels for labels in (first, *more) if labels is not None]
            if len(scaled) > 1 or (packet is aten.div and first is None) or scaled[0].channels.shape != result.shape:
                return None
            return scaled[0].channels
        if packet in _PRODUCTS and first is None and len(given) == 2 and more[0] is not None:
            return _mixed(more[0].channels, result.shape)
        return None

    def _read_by_weight(self, given: list[Tensor]) -> bool:
        """Whether this is a product of followed channels and a parameter (a router); it is noted then."""
        *_, left, right = given
        read, weight = self._of(left), self._weights.get(id(right))
        # The transposed view of a parameter [out, in], as F.linear takes it; any other product is none of ours.
        if read is None or weight is None or right._base is None or right.shape != right._base.shape[::-1]:
            return False
        self._read(read, weight[1])
        return True

    def _read(self, labels: _Labels, weight: str) -> None:
        column = labels.column()
        if column is None:
            labels.source.spoil(labels.channels, weight)
        else:
            labels.source.readers.setdefault(weight, column)

    def _of(self, one: Any) -> _Labels | None:
        held = self._labels.get(id(one))
        return None if held is None else held[1]

    def _attach(self, one: Any, labels: _Labels) -> None:
        if isinstance(one, Tensor):
            self._labels[id(one)] = (one, labels)

    # --- what came of it ---

    def verdict(self, block: Block, stage: Sequence[str]) -> Fold | str:
        """What can take over the scale of this stage's input, or why nothing can (names within the block)."""
        def short(name: str) -> str:
            return name.removeprefix(f"{block.name}.")

        weights = [f"{name}.weight" for name in stage]
        source = next((one for one in self._sources.values() if weights[0] in one.readers), None)
        if source is None or any(weight not in source.readers for weight in weights):
            return "its input is not the output of one norm or linear of its block"
        channels = source.readers[weights[0]]
        if any(not torch.equal(source.readers[weight], channels) for weight in weights):
            return f"its linears read different channels of {short(source.name)}"
        used = set(channels.tolist())
        if spoilt := next((source.spoiled[channel] for channel in used if channel in source.spoiled), None):
            return f"the output of {short(source.name)} is also read by {short(spoilt)}"
        others = [name for name, read in source.readers.items() if name not in weights and used & set(read.tolist())]
        for name in others:
            if not name.startswith(f"{block.name}.") or not torch.equal(source.readers[name], channels):
                return f"the output of {short(source.name)} is also read by {short(name)}"
        assert source.kind is not None
        return Fold(source.name, source.kind, channels, tuple(others))


def _mixed(channels: Tensor, shape: torch.Size) -> Tensor | None:
    """Of P V, where V [..., tokens, features] carries channels that are the same for all tokens."""
    one = channels[..., :1, :]
    return one.expand(shape) if bool((channels == one).all()) else None


def norm_form(module: nn.Module) -> str | None:
    """'norm' where a module multiplies by its weight, 'norm+1' where by one more, None where by neither.

    Found by trying: with the weight (and the bias) divided, the output must be divided.
    """
    twin = copy.deepcopy(module).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    parameters = dict(twin.named_parameters(recurse=False))
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        width = len(parameters["weight"])
        inputs = torch.randn(1, 3, width, generator=generator)
        divisor = torch.exp2(torch.randint(-3, 4, (width,), generator=generator).float())
        before, weight = twin(inputs), parameters["weight"].clone()
        if not isinstance(before, Tensor) or before.shape != inputs.shape:
            return None
        if "bias" in parameters:
            parameters["bias"].div_(divisor)
        for form, shift in SHIFTS.items():
            parameters["weight"].copy_((weight + shift) / divisor - shift)
            if torch.allclose(twin(inputs) * divisor, before, rtol=1e-4, atol=1e-5):
                return form
    return None
