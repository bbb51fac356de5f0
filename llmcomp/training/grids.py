"""The integers of a compressed checkpoint as latent weights that are trained, and as its files hold them again.

A file may hold a weight wider than it was made (`formats.compressed_tensors` does so where a reader knows one scheme):
fewer bits in larger words, one scale repeated. It is trained on the grid that it was made for, which the report names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmcomp import native, native_kinds
from llmcomp.errors import BadCheckpoint
from llmcomp.formats import FORMATS, Layout
from llmcomp.formats.opening import Opened
from llmcomp.formats.reading import config_of
from llmcomp.kinds import Kind, Sparse, integers_of
from llmcomp.patterns import Pattern
from llmcomp.report.schema import Report
from llmcomp.schemes import Scheme
from llmcomp.shards import read_shard
from llmcomp.training.qat import Latent, latent
from llmcomp.weights import QuantizedWeight


@dataclass(frozen=True)
class Grids:
    """Of one checkpoint.

    Attributes:
        kinds: {module: what its integers were made}.
        layout: how its files hold them.
    """

    opened: Opened
    kinds: Mapping[str, Kind]
    layout: Layout

    @classmethod
    def of(cls, opened: Opened, report: Report) -> Grids:
        """Of a checkpoint and what is written of it.

        Raises:
            BadCheckpoint: files that hold its integers in another way than this release writes them.
        """
        made = {layer.name: Scheme.of_label(layer.scheme) for layer in report.layers}
        kinds = {
            module: made.get(module) or kind if isinstance(kind, Scheme) else kind
            for module, kind in opened.kinds.items()
        }
        entries = [(opened.ref(module), kind) for module, kind in kinds.items()]
        form = "llmcomp" if native.is_native(config_of(opened.directory)) else "compressed-tensors"
        found = cls(opened, kinds, FORMATS[form](entries, opened.skeleton))
        found._check()
        return found

    def _check(self) -> None:
        places = self.opened.tensors
        files = {path: read_shard(path).tensors for path in {place.path for place in places.values()}}
        for module, kind in self.kinds.items():
            if integers_of(kind) is None:
                continue
            names = [f"{module}.{part}" for part in (*native.PARTS, native_kinds.INDICES)]
            held = {name: files[places[name].path][places[name].key] for name in names if name in places}
            scale = held.get(f"{module}.{native.SCALE}")
            blank = self.layout.blank(self.opened.ref(module), kind, torch.float32 if scale is None else scale.dtype)
            wanted = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in blank.items()}
            if wanted != {name: (one.dtype, one.shape) for name, one in held.items()}:
                raise BadCheckpoint(
                    f"{self.opened.directory} holds {module} in another way than llmcomp writes it; `llmcomp export "
                    "--format llmcomp` writes the checkpoint anew."
                )

    def put(self, model: Any, source: Opened | None, patterns: Mapping[str, Pattern], learn_scales: bool) -> int:
        """Put latent weights into a model, in the places of integers.

        Args:
            source: the dense model that was quantized, None where it is gone.
            patterns: {module: by what some of its weights were removed}, of those whose kind does not say so.
            learn_scales: whether scales are trained.

        Returns:
            How many of them start from the source's weights.

        Raises:
            BadCheckpoint: integers that are not on the grid that the report names.
        """
        started = 0
        for module, kind in self.kinds.items():
            scheme = integers_of(kind)
            if scheme is None:
                continue
            packed = model.get_submodule(module)
            weight = narrowed(packed.quantized(), scheme)
            if weight is None:
                raise BadCheckpoint(
                    f"{self.opened.directory} holds {module} off the grid of {scheme.label}, which its report says it "
                    "has; compress the model again."
                )
            mask = None
            if isinstance(kind, Sparse):
                mask = native_kinds.mask_of(packed.get_buffer(native_kinds.INDICES), kind.pattern, weight.shape[1])
                weight = replace(weight, pattern=kind.pattern, mask=mask.contiguous())
            elif module in patterns:
                mask = weight.dense() != 0
            dense = None if source is None else _dense(source, module, weight, packed.transposed)
            started += dense is not None
            model.set_submodule(module, latent(weight, packed, dense, mask, learn_scales))
        return started

    def settle(self, model: Any) -> None:
        """End the training of what `put` has put there."""
        for module, _ in self._latent(model):
            module.settle()

    def tensors(self, model: Any) -> dict[str, Tensor]:
        """What files hold of the integers, by full names."""
        found: dict[str, Tensor] = {}
        for module, name in self._latent(model):
            found |= self.layout.tensors(self.opened.ref(name), module.quantized())
        return found

    @staticmethod
    def _latent(model: Any) -> list[tuple[Latent, str]]:
        return [(module, name) for name, module in model.named_modules() if isinstance(module, Latent)]


def narrowed(weight: QuantizedWeight, scheme: Scheme) -> QuantizedWeight | None:
    """The same weight on the grid of a scheme of its own or fewer bits and scales, None where it is not on that."""
    groups = scheme.groups(weight.shape[1])
    repeats, left = divmod(weight.scale.shape[1], groups)
    if left or bool(((weight.values < scheme.qmin) | (weight.values > scheme.qmax)).any()):
        return None
    scale, zero = (None if one is None else one[:, ::repeats].contiguous() for one in (weight.scale, weight.zero_point))
    for short, whole in ((scale, weight.scale), (zero, weight.zero_point)):
        if short is not None and whole is not None and not torch.equal(short.repeat_interleave(repeats, 1), whole):
            return None
    if scheme.symmetric and zero is not None:  # in the file of one whose others have zero points
        if bool(zero.any()):
            return None
        zero = None
    assert scale is not None  # every weight has scales
    return QuantizedWeight(weight.values, scale, zero, scheme, weight.input_scale)


def _dense(source: Opened, module: str, weight: QuantizedWeight, transposed: bool) -> Tensor | None:
    """The module's weight [out, in] in the dense model, None where that has no such weight."""
    name = f"{module}.weight"
    ties: Mapping[str, str] = getattr(source.skeleton, "all_tied_weights_keys", {})
    found = next((one for one in (name, ties.get(name, name)) if one in source.tensors), None)
    if found is None:
        return None
    dense = source.tensor(found)
    dense = dense.t() if transposed else dense
    return dense if dense.is_floating_point() and dense.shape == weight.shape else None
