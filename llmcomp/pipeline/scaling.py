"""Scales of linears' inputs while the loop runs, and what takes them over in the checkpoint.

In the run the producer of a scaled input (a norm, or a linear compressed some stages ago) stays as it is, because
lanes wait with what it has made; each scaled linear divides what it reads. In the files the producer is divided
instead. Both compute the same: scales are powers of two, and where a norm adds one to its weight before it
multiplies, the scale is what its rounded weight makes of it.

    a stage is solved → its linears divide what they read │ norm, v or up is written divided
    a run is resumed  → the same: factors lie beside the block's shard, and what it holds divided is multiplied back
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from llmcomp.adapters.base import Adapter, Block, LinearRef
from llmcomp.adapters.folds import SHIFTS, Fold, folds
from llmcomp.calibration.stats import InputStats
from llmcomp.formats.base import divide_rows
from llmcomp.methods.smoothquant import search_migration
from llmcomp.pipeline.assign import Task
from llmcomp.pipeline.residency import Residency
from llmcomp.pipeline.solved import method_config, method_has
from llmcomp.ranks import ALONE, World
from llmcomp.schemes import INT8_STATIC


@dataclass(frozen=True)
class Stage:
    """All linears of a stage of which some are to be scaled, and what can take the scale over, or why nothing can."""

    refs: tuple[LinearRef, ...]
    verdict: Fold | str


@dataclass(frozen=True)
class Scaled:
    """What was chosen for one stage.

    Attributes:
        factor: float32 [in], by which inputs are divided and columns of the weights multiplied.
        producer: name of a compressed linear whose `tensors` in the file change, else None.
        about: one sentence for the report.
    """

    factor: Tensor
    producer: str | None
    tensors: dict[str, Tensor]
    about: str


class Scaling:
    """The scales of one run.

    Args:
        adapter: the model's structure. tasks: what is done with each linear. params: the model's values.
        options: settings of the recipe's method. partial: directory of unfinished work, which rank 0 of `world` keeps.
    """

    def __init__(
        self, adapter: Adapter, tasks: Mapping[str, Task], params: Residency, options: dict[str, Any], partial: Path,
        world: World = ALONE,
    ) -> None:
        self._adapter, self._tasks, self._params, self._options = adapter, tasks, params, options
        self._directory, self._world = partial / "scales", world
        self._written: dict[str, Tensor] = {}  # of the present block: what the file holds, not the memory
        self._refs = {ref.name: ref for ref in adapter.refs}
        self._factors: dict[str, Tensor] = {}
        self._stages: dict[str, Stage] = {}
        wanted = {name for name, task in tasks.items() if self._search(task) is not None}
        verdicts = folds(adapter) if wanted else {}
        for refs in (refs for block in adapter.blocks for refs in block.stages):
            if any(ref.name in wanted for ref in refs):
                self._stages |= {ref.name: Stage(refs, verdicts[refs[0].name]) for ref in refs}

    @contextmanager
    def dividing(self, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        """While it lasts, scaled linears divide what they read. Registered for all of them beforehand: a forward
        that waits at a linear has its hooks already."""

        def hook(name: str) -> Any:
            def divide(_: nn.Module, positional: tuple[Any, ...]) -> tuple[Any, ...] | None:
                factor = self._factors.get(name)
                if factor is None:
                    return None
                return ((positional[0] / factor).to(positional[0].dtype), *positional[1:])

            return divide

        handles = [
            module.register_forward_pre_hook(hook(name)) for name, module in linears.items() if name in self._stages
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def choose(
        self, refs: Sequence[LinearRef], weights: Sequence[Tensor], stats: InputStats | None,
        done: Mapping[str, Mapping[str, Tensor]],
    ) -> Scaled | str | None:
        """The scale of a stage's input, or why there is none; None where none was asked for.

        Args:
            refs: the linears of the stage that are compressed. weights: theirs, [out, in].
            done: {linear: its tensors in the file} of those of the block that are compressed already.
        """
        stage = self._stages.get(refs[0].name)
        if stage is None or stats is None:
            return None
        if isinstance(stage.verdict, str):
            return f"inputs not scaled: {stage.verdict}"
        tasks = [self._tasks[ref.name] for ref in refs]
        search = next(found for task in tasks if (found := self._search(task)) is not None)
        wanted = search(weights, [task.scheme for task in tasks], stats, stage.verdict.channels)
        wanted = self._world.from_first(wanted)  # a host that rounds otherwise may have found another
        if bool((wanted == 1).all()):
            return "inputs not scaled: no scale lowers the error"
        return self._scaled(stage, stage.verdict, wanted, done)

    def _search(self, task: Task) -> Callable[..., Tensor] | None:
        """How scales are chosen for what this linear reads: (weights, schemes, stats, channels) → [in]."""
        if task.activations == INT8_STATIC:
            return search_migration
        scale = task.scale
        if scale is None:
            return None
        options = self._options if method_has(task.method, self._options) else {}
        return partial(scale, config=method_config(task.method, options))

    def use(self, refs: Sequence[LinearRef], scaled: Scaled) -> None:
        """From now on these linears divide what they read."""
        self._factors |= {ref.name: scaled.factor for ref in refs}

    def finish(self, key: str, block: Block) -> dict[str, Tensor]:
        """{parameter: its value in the checkpoint} of all dense ones of the block that differ there; what a
        resumed run needs to know is kept under `key`."""
        written, self._written = self._written, {}
        known = {stage[0].name: self._factors[stage[0].name] for stage in self._own(block)}
        if known and self._world.first:
            self._directory.mkdir(exist_ok=True)
            place = self._directory / f"{key}.safetensors"
            save_file({name: factor.cpu() for name, factor in known.items()}, place.with_suffix(".tmp"))
            place.with_suffix(".tmp").replace(place)
        return written

    def restore(self, key: str, block: Block) -> None:
        """Go on from where the run was that wrote this block, whose compressed weights are in place."""
        place = self._directory / f"{key}.safetensors"
        kept = place.read_bytes() if self._world.first and place.is_file() else b""
        known = load(kept) if (kept := self._world.message(kept)) else {}
        for name, kept_factor in known.items():
            factor = kept_factor.to(self._params.device)
            stage = self._stages[name]
            self._factors |= {ref.name: factor for ref in stage.refs if ref.name in self._tasks}
            fold = stage.verdict
            if isinstance(fold, Fold) and fold.producer in self._tasks:
                ref = self._refs[fold.producer]
                multiplier = _by_channel(ref.out_features, fold.channels, factor)
                self._params.install(ref, _along(self._params.weight(ref), multiplier, 0))

    def _own(self, block: Block) -> list[list[LinearRef]]:
        """Of each scaled stage of a block, the linears that are compressed."""
        return [
            own for stage in block.stages if (own := [ref for ref in stage if ref.name in self._factors])
        ]

    def _scaled(
        self, stage: Stage, fold: Fold, wanted: Tensor, done: Mapping[str, Mapping[str, Tensor]]
    ) -> Scaled | str:
        producer = fold.producer
        weight = f"{producer}.weight"
        factor = wanted
        tensors: dict[str, Tensor] = {}
        written: dict[str, Tensor] = {}
        if fold.kind == "linear":
            width = self._refs[producer].out_features
            divisor = _by_channel(width, fold.channels, wanted)
            before = dict(done[producer]) if producer in self._tasks else {weight: self._value(weight)}
            after = divide_rows(self._refs[producer], before, divisor)
            back = divide_rows(self._refs[producer], after, 1 / divisor)
            if any(not torch.equal(back[name], before[name]) for name in before):
                return f"inputs not scaled: {producer} would leave the range of its dtype"
            tensors = after if producer in self._tasks else {}
            written |= {} if tensors else after
        else:
            divisor, shift = wanted, SHIFTS[fold.kind]
            value = self._value(weight)
            written[weight] = ((value.float() + shift) / divisor - shift).to(value.dtype)
            factor = _norm_factor(value, written[weight], shift)
        for name in self._dense_producer(producer):
            if name.endswith(".bias"):
                written[name] = _along(self._value(name), 1 / divisor, 0)
        for name in self._dense_consumers(stage, fold):
            ref = self._refs.get(name.removesuffix(".weight"))
            written[name] = _along(self._value(name), factor, 0 if ref is not None and ref.transposed else 1)
        block = self._adapter.blocks[stage.refs[0].block or 0].name
        about = f"inputs scaled by {wanted.min():g} to {wanted.max():g} by {producer.removeprefix(block + '.')}"
        self._written |= written
        return Scaled(factor, producer if tensors else None, tensors, about)

    def _value(self, name: str) -> Tensor:
        """Of a dense parameter, as the file will hold it; a linear may read one scale and take over another."""
        return self._written[name] if name in self._written else self._params.value(name)

    def _dense_producer(self, producer: str) -> list[str]:
        """Parameters of a linear that takes over a scale, or the bias of a norm, as far as they are stored dense."""
        names = [] if producer in self._tasks or producer not in self._refs else [f"{producer}.weight"]
        bias = getattr(self._adapter.model.get_submodule(producer), "bias", None)
        return [*names, *([f"{producer}.bias"] if isinstance(bias, Tensor) else [])]

    def _dense_consumers(self, stage: Stage, fold: Fold) -> list[str]:
        """Weights that read a scaled input and are not compressed."""
        return [*(f"{ref.name}.weight" for ref in stage.refs if ref.name not in self._tasks), *fold.others]


def _norm_factor(before: Tensor, after: Tensor, shift: float) -> Tensor:
    """float32 [in]: how many times smaller a norm's outputs have become with the weight `after`; 1 where they
    are zero."""
    factor = (before.float() + shift) / (after.float() + shift)
    return torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0)


def _by_channel(width: int, channels: Tensor, factor: Tensor) -> Tensor:
    """float32 [width]: each input's factor at the output channel that makes it, 1 where none does."""
    return factor.new_ones(width).index_put((channels.to(factor.device),), factor)


def _along(value: Tensor, factor: Tensor, dimension: int) -> Tensor:
    """`value` times a factor for each index of one dimension, in its own dtype."""
    shape = [1] * value.dim()
    shape[dimension] = -1
    return (value * factor.view(shape)).to(value.dtype)
