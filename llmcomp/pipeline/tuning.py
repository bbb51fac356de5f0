"""Blocks that learn: once its linears have a start, a block is tuned as a whole against what it gave before.

    lanes reach the block        → its calls are kept, its outputs with the source's weights computed (`remember`)
    stages are solved as ever    → each solution of a method that tunes is a start (`start`)
    lanes come out of the block  → mini-batches of calls, gradients of the block's weights (`finish`)
    lanes go on                  → they compute the block anew, with the tuned weights (`capture.stopping`)

A call is one batch of calibration windows with the masks and tables that the model's own code made for it; what is
large in it waits where lanes wait, in files beyond `--activation-memory`. The target is what the block gives in the
source model: a second stream of activations goes through the blocks as they were, so each block makes up for errors
of those before it. Where something stands between two blocks, the stream cannot be carried on without the model's
own code; it then starts anew from what the compressed blocks give.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from llmcomp.adapters.base import Adapter, Block, LinearRef
from llmcomp.calibration.capture import Lane, Stop, first_tensor
from llmcomp.calibration.parking import Parking
from llmcomp.devices import repeatable_attention
from llmcomp.errors import RunError
from llmcomp.matmul import fast_matmul, narrow_products
from llmcomp.methods import METHODS
from llmcomp.methods.solution import quadratics
from llmcomp.pipeline.assign import Task
from llmcomp.pipeline.memory import reusing_large_blocks
from llmcomp.pipeline.residency import Residency
from llmcomp.pipeline.solved import Solved, method_config, method_has
from llmcomp.ranks import ALONE, World

_MEASURED_TOKENS = 2048  # over which the error of each linear is measured

# Iterates are compared over every so many calls, at least so many windows of them: with all 128, four
# comparisons compute as much as a fifth of 200 steps over 4 windows (a step is three forwards).
_COMPARED_CALLS, _COMPARED_WINDOWS = 4, 16


@dataclass
class Call:
    """How one batch of windows calls the block.

    Attributes:
        source: the block's input in the source model, float32; None for that of the call.
        target: what it shall give: its output in the source model, float32.
    """

    lane: Lane
    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    source: Tensor | None = None
    target: Tensor | None = None


class Tuning:
    """The learning of one run's blocks.

    Args:
        adapter: the model's structure. tasks: what is done with each linear. params: the model's values.
        options: settings of the recipe's method. seed: the recipe's. parking: where targets wait.
        world: the ranks, each with its own windows: a step's gradients and all losses are summed over them.
    """

    def __init__(
        self, adapter: Adapter, tasks: Mapping[str, Task], params: Residency, options: dict[str, Any], seed: int,
        parking: Parking, world: World = ALONE,
    ) -> None:
        self._adapter, self._params, self._options, self._seed = adapter, params, options, seed
        self._parking, self._world = parking, world
        learning = {task.ref.block for task in tasks.values() if task.tune is not None}
        self._waiting = {block.name for block in adapter.blocks if block.index in learning}
        self._order = {block.name: block.index for block in adapter.blocks}
        self._calls: list[Call] = []
        self._streams: dict[Lane, Tensor] = {}  # what the latest block gives in the source model
        self._starts: dict[str, tuple[Solved, Tensor]] = {}

    def leave_out(self, blocks: Iterable[str]) -> None:
        """Blocks that an earlier run has finished."""
        self._waiting -= set(blocks)

    def awaits(self, block: str) -> bool:
        """Whether a block will be tuned, and has not been."""
        return block in self._waiting

    def follows(self, block: str) -> bool:
        """Whether the source's activations are to go through a block: it, or a later one, will be tuned."""
        return any(self._order[block] <= self._order[one] for one in self._waiting)

    def note(self, lane: Lane, stop: Stop) -> None:
        """Keep a lane's call of a block that the source's activations go through."""
        if stop.call is not None and lane.counted and self.follows(stop.name):
            stream = self._streams.pop(lane, None)
            self._calls.append(Call(lane, *stop.call, stream if stop.chained else None))

    def remember(self, block: Block) -> None:
        """Compute what the block gives in the source model, for all calls.

        Raises:
            RunError: the block changes its inputs, so that it cannot be computed twice, or has shown none.
        """
        if not self._calls:
            raise RunError(f"{block.name} shows no tensor that it reads, so it cannot be tuned; take gptq or rtn-clip.")
        values = self._floats(block)
        for call in self._calls:
            versions = [one._version for one in _tensors(call)]
            with torch.no_grad():
                call.target = self._output(block, call, values, call.source)
            if [one._version for one in _tensors(call)] != versions:
                raise RunError(
                    f"{block.name} changes its own inputs in place, so it cannot be tuned by computing it again and "
                    "again; take gptq or rtn-clip for this model."
                )
            call.source, self._streams[call.lane] = None, call.target
            self._parking.park([[call.target]])
        if not self.awaits(block.name):
            self._calls = []

    def start(self, solved: Solved, weight: Tensor) -> bool:
        """Take a solution as a start, if its method goes on from there.

        Args:
            weight: the source's, [out, in].
        """
        learns = solved.task.tune is not None and solved.task.ref.block is not None
        if learns:
            self._starts[solved.task.ref.name] = (solved, weight)
        return learns

    def finish(self, block: Block) -> list[Solved]:
        """Tune the block's linears together; their solutions, with the errors of the tuned weights."""
        began = time.perf_counter()
        calls, self._calls = self._calls, []
        starts, self._starts = self._starts, {}
        self._waiting.discard(block.name)
        if not self._waiting:
            self._streams = {}
        if not starts:  # experts that too few tokens have reached, all of them
            return []
        method = next(iter(starts.values()))[0].task.method
        tune = METHODS[method].tune
        assert tune is not None  # `start` has looked
        config = method_config(method, self._options if method_has(method, self._options) else {})
        values = self._floats(block, _parameters(block, starts))
        compared = _compared(calls)
        energy = self._total(float(self._target(call).square().sum(dtype=torch.float64)) for call in compared) or 1.0
        refs = {name: solved.task.ref for name, (solved, _) in starts.items()}
        device = self._params.device

        def errors(call: Call, dense: Mapping[str, Tensor]) -> Tensor:
            """(output - target)² of one call, [real tokens, features]."""
            output = self._output(block, call, values | _named(block, refs, dense))
            return (call.lane.tokens(output) - self._target(call)).square()

        def loss(dense: Mapping[str, Tensor]) -> float:
            with torch.no_grad():
                return self._total(float(errors(call, dense).sum(dtype=torch.float64)) for call in compared) / energy

        def descend(dense: Mapping[str, Tensor], batch: Sequence[int]) -> dict[str, Tensor]:
            leaves = {name: one.requires_grad_() for name, one in dense.items()}
            with torch.enable_grad(), narrow_products(device), repeatable_attention(device):
                for number in batch:
                    (errors(calls[number], leaves).sum() / energy).backward()  # type: ignore[no-untyped-call]
            # Experts that no token of the batch has reached have no gradient.
            found = {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in leaves.items()}
            return {name: self._world.sum_(one) for name, one in found.items()}

        with reusing_large_blocks():
            tuned = tune(
                {name: (weight, solved.solution.weight) for name, (solved, weight) in starts.items()}, descend, loss,
                _batches(calls, -(-config.batch_size // self._world.size)), config, self._seed + block.index,
            )
        measured = self._errors(block, calls, values, refs, starts, tuned.weights)
        share = (time.perf_counter() - began) / len(starts)
        found = []
        for name, (solved, _) in starts.items():
            solution = replace(solved.solution, weight=tuned.weights[name], row_error=None, row_norm=None)
            if name in measured:
                solution = replace(solution, row_error=measured[name][0], row_norm=measured[name][1])
            found.append(
                Solved(solved.task, solution, solved.seconds + share, (tuned.before, tuned.after))
            )
        return found

    def _total(self, numbers: Iterable[float]) -> float:
        """The sum of all ranks' numbers."""
        return float(self._world.sum_(torch.tensor([sum(numbers)], dtype=torch.float64)))

    # --- one block ---

    def _floats(self, block: Block, without: Collection[str] = ()) -> dict[str, Tensor]:
        """The present values of the block's parameters and stored buffers, float32, by their names within it."""
        names = {name.removeprefix(f"{block.name}."): name for name in self._params.inside(block.name)}
        return {own: self._widened(self._params.value(name)) for own, name in names.items() if own not in without}

    def _output(
        self, block: Block, call: Call, values: Mapping[str, Tensor], source: Tensor | None = None
    ) -> Tensor:
        """What the block gives with these values, float32, as its module shapes it; hooks of lanes stay out of it.

        Args:
            source: read instead of the call's own input.
        """
        module = self._adapter.model.get_submodule(block.name)
        own = first_tensor(call.positional, call.keywords)

        def given(value: Any) -> Any:
            return self._widened(source if source is not None and value is own else value)

        positional, keywords = tree_map(given, (call.positional, call.keywords))
        with fast_matmul():
            output = functional_call(module, dict(values), positional, keywords)
        return next(one for one in tree_leaves(output) if isinstance(one, Tensor) and one.is_floating_point())

    def _target(self, call: Call) -> Tensor:
        """float32 [real tokens, features]."""
        assert call.target is not None  # `remember` was called
        return call.lane.tokens(call.target.to(self._params.device))

    def _widened(self, value: Any) -> Any:
        """float32 on the device, where it is floating; it may have waited in a file, which the CPU reads."""
        is_floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._params.device, torch.float32) if is_floating else value

    def _errors(
        self, block: Block, calls: Sequence[Call], values: Mapping[str, Tensor], refs: Mapping[str, LinearRef],
        starts: Mapping[str, tuple[Solved, Tensor]], tuned: Mapping[str, Any],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """(e'He, w'Hw), float64 [out], of each tuned weight on what it reads in the first windows."""
        dense = {name: weight.dense().float() for name, weight in tuned.items()}
        found: dict[str, tuple[Tensor, Tensor]] = {}

        def look(call: Call, name: str, inputs: Tensor) -> None:
            inputs = call.lane.tokens(inputs)
            gram = inputs.t() @ inputs
            weight = starts[name][1].float()
            error, norm = quadratics(weight - dense[name], gram), quadratics(weight, gram)
            before = found.get(name)
            found[name] = (error, norm) if before is None else (before[0] + error, before[1] + norm)

        tokens = 0
        for call in calls:
            with self._looking(refs, partial(look, call)):
                tokens += len(call.lane.tokens(self._output(block, call, dict(values) | _named(block, refs, dense))))
            if tokens >= _MEASURED_TOKENS:
                break
        return found

    @contextmanager
    def _looking(self, refs: Mapping[str, LinearRef], look: Callable[[str, Tensor], None]) -> Iterator[None]:
        """While it lasts, `look` sees what each of the linears reads."""

        def hook(name: str) -> Any:
            return lambda module, positional: look(name, positional[0])

        handles = [
            self._adapter.model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in refs
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _compared(calls: Sequence[Call]) -> list[Call]:
    """Calls over which iterates are compared, evenly spaced."""
    held = sum(_windows(call) for call in calls)
    return list(calls[:: max(1, min(_COMPARED_CALLS, held // _COMPARED_WINDOWS))])


def _batches(calls: Sequence[Call], windows: int) -> list[list[int]]:
    """Numbers of calls, enough of them to hold so many windows; what is left over joins the last."""
    batches: list[list[int]] = []
    held = windows
    for number, call in enumerate(calls):
        if held >= windows:
            batches.append([])
            held = 0
        batches[-1].append(number)
        held += _windows(call)
    if held < windows and len(batches) > 1:
        left = batches.pop()
        batches[-1] += left
    return batches


def _windows(call: Call) -> int:
    return min(map(len, call.lane.inputs.values()))  # pixels may be counted in patches


def _named(block: Block, refs: Mapping[str, LinearRef], dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights [out, in] by their parameters' names within the block, in the module's own layout."""
    return {
        parameter: weight.t() if refs[name].transposed else weight
        for (name, weight), parameter in zip(dense.items(), _parameters(block, dense), strict=True)
    }


def _parameters(block: Block, names: Collection[str]) -> list[str]:
    return [f"{name.removeprefix(f'{block.name}.')}.weight" for name in names]


def _tensors(call: Call) -> list[Tensor]:
    return [one for one in tree_leaves((call.positional, call.keywords, call.source)) if isinstance(one, Tensor)]

