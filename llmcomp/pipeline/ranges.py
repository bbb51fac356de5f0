"""Rounded inputs while the loop runs: each linear reads what a reader of the checkpoint will compute with.

Hooks are registered for all linears beforehand, since a forward that waits at a linear has its hooks already. Those
of static ranges do nothing until the linear's stage has been solved; from then on they know its scale.

A static range is all that calibration has shown. Clipping it by searched shares was measured and left out: of channels
that were scaled it cost more than it saved on held-out text where tails are heavy (errors of one token's clipped
entries add up, those of rounding do not), and outlier channels that could not be scaled (BERT's) want all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from llmcomp.activations import quantize_inputs, quantized, static_scale
from llmcomp.adapters.base import LinearRef
from llmcomp.calibration.stats import InputStats
from llmcomp.pipeline.assign import Task
from llmcomp.schemes import INT8_STATIC
from llmcomp.weights import INPUT_SCALE, CompressedWeight, QuantizedWeight


class Ranges:
    """The scales of one run's rounded inputs. tasks: what is done with each linear."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self._tasks = tasks
        self._scales: dict[str, Tensor] = {}

    @contextmanager
    def rounding(self, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        """While it lasts, linears round what they read as their schemes say."""
        handles = [
            quantize_inputs(module, self._static(name) if self._is_static(name) else quantized)
            for name, module in linears.items()
            if self._tasks[name].activations
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def find(self, refs: Sequence[LinearRef], stats: InputStats | None, weight: Tensor) -> None:
        """Take the range of a stage's input from its statistics; who reads it shares it, as kernels that fuse
        linears want. weight: of one of the linears, in the dtype that scales are stored in."""
        if stats is not None:
            scale = static_scale(stats.absmax, weight.dtype)
            self._scales |= {ref.name: scale for ref in refs if self._is_static(ref.name)}

    def ranged(self, ref: LinearRef, weight: CompressedWeight) -> CompressedWeight:
        """The weight with its input's scale, where it has one."""
        if not isinstance(weight, QuantizedWeight):
            return weight
        return replace(weight, input_scale=self._scales.get(ref.name))

    def restore(self, ref: LinearRef, read: Callable[[str], Tensor]) -> None:
        """Go on with the scale of an earlier run. read: a tensor of the shard by its name in the model."""
        if self._is_static(ref.name):
            self._scales[ref.name] = read(f"{ref.name}.{INPUT_SCALE}")

    def _is_static(self, name: str) -> bool:
        return self._tasks[name].activations == INT8_STATIC

    def _static(self, name: str) -> Callable[[Tensor], Tensor]:
        def rounded(inputs: Tensor) -> Tensor:
            scale = self._scales.get(name)
            return inputs if scale is None else quantized(inputs, scale)

        return rounded
