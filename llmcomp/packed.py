"""Modules that keep their weight packed: what `llmcomp.hf` puts where a linear or an embedding was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcomp import native, packing
from llmcomp.errors import BadCheckpoint
from llmcomp.kernels import KERNELS, kernel_for
from llmcomp.kernels.tiles import Grid
from llmcomp.schemes import Scheme
from llmcomp.weights import QuantizedWeight, dequantize

_HELD = "held_"  # what a kernel keeps, as buffers that no checkpoint has


class Packed(nn.Module):
    """A module [out_features, in_features] whose weight lies packed.

    It is made with buffers that a checkpoint's tensors are loaded into, whatever their layout (`native.read`);
    `settle` makes of them what the kernel wants. `state_dict` gives llmcomp's own layout again, to the bit.

    Args:
        replaced: what stood in its place; its bias stays.
        scheme: of the weight.
        expected: {tensor within the module: its dtype and shape in the file}.
    """

    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, replaced: nn.Module, scheme: Scheme, expected: Mapping[str, Tensor]) -> None:
        super().__init__()
        held: Any = replaced.weight
        self.transposed = type(replaced).__name__ == "Conv1D"
        self.out_features, self.in_features = held.shape[::-1] if self.transposed else held.shape
        self.scheme = scheme
        self.kernel = ""
        for name, tensor in expected.items():
            self.register_buffer(name, tensor)

    def settle(self) -> None:
        """Take over what was loaded.

        Raises:
            BadCheckpoint: a tensor of another shape than the module's.
        """
        state = {name: self._buffers.pop(name) for name in native.PARTS if name in self._buffers}
        loaded = {name: one for name, one in state.items() if one is not None}
        weight = native.read(loaded, self.scheme, self.transposed)
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise BadCheckpoint(
                f"it is {list(weight.shape)}, and the model wants {[self.out_features, self.in_features]}"
            )
        self.hold(weight)

    def hold(self, weight: QuantizedWeight) -> None:
        """Keep a weight, laid out for products on the device where it is."""
        for name in [name for name in self._buffers if name.startswith(_HELD)]:
            del self._buffers[name]
        self.kernel = self._kernel(weight)
        kept = {"scale": weight.scale, "zero_point": weight.zero_point, native.INPUT_SCALE: weight.input_scale}
        for name, tensor in kept.items():
            self.register_buffer(name, tensor, persistent=False)
        for name, tensor in KERNELS[self.kernel].hold(weight).items():
            self.register_buffer(_HELD + name, tensor, persistent=False)

    @property
    def grid(self) -> Grid:
        """All of the weight but its integers."""
        return Grid(self.scheme, self.in_features, self.scale, self.zero_point, self._buffers[native.INPUT_SCALE])

    @property
    def held(self) -> dict[str, Tensor]:
        """What the kernel keeps."""
        return {
            name.removeprefix(_HELD): tensor
            for name, tensor in self._buffers.items()
            if name.startswith(_HELD) and tensor is not None
        }

    def quantized(self) -> QuantizedWeight:
        """The weight as a method returned it."""
        _, _, scale, zero, input_scale = self.grid
        return QuantizedWeight(KERNELS[self.kernel].values(self.held, self.grid), scale, zero, self.scheme, input_scale)

    @property
    def weight(self) -> Tensor:
        """The dense weight as the replaced module held it, decoded at each look; for code that goes past `forward`."""
        if not self.kernel:  # before it is loaded: for initializations, which are lost on it
            shape = (self.out_features, self.in_features)
            dense = torch.empty(shape, dtype=self.get_buffer(native.SCALE).dtype, device="meta")
        else:
            dense = self.quantized().dense()
        return dense.t() if self.transposed else dense

    def _kernel(self, weight: QuantizedWeight) -> str:
        return kernel_for(self.scheme, self.out_features, self.in_features, weight.values.device.type)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel:
            for name, tensor in native.to_tensors(self.quantized()).items():
                destination[prefix + name] = tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        """Moves between devices lay the weight out anew; casts touch the scales, as they do a dense weight."""
        if not self.kernel:
            super()._apply(fn, recurse)
            return self
        weight = self.quantized()
        device = fn(weight.scale).device
        moved: dict[str, Any] = {
            name: None if getattr(weight, name) is None else getattr(weight, name).to(device)
            for name in ("values", "zero_point", native.INPUT_SCALE)
        }
        for parameter in self.parameters():
            parameter.data = fn(parameter.data)
        self.hold(QuantizedWeight(scheme=self.scheme, scale=fn(weight.scale), **moved))
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.label}, kernel={self.kernel or None}"


class PackedLinear(Packed):
    """In the place of `nn.Linear`, or transformers' Conv1D."""

    def __init__(self, replaced: nn.Module, scheme: Scheme, expected: Mapping[str, Tensor]) -> None:
        super().__init__(replaced, scheme, expected)
        self.bias: Any = replaced.bias

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():  # an expert that no token goes to
            return x.new_empty(*x.shape[:-1], self.out_features)
        out = KERNELS[self.kernel].product(x, self.held, self.grid)
        return out if self.bias is None else out + self.bias


class PackedEmbedding(Packed):
    """In the place of `nn.Embedding`: only the rows that are looked up are decoded.

    `embed_scale`: what some models' embeddings multiply by (Gemma), in their own dtype.
    """

    def __init__(self, replaced: nn.Module, scheme: Scheme, expected: Mapping[str, Tensor]) -> None:
        super().__init__(replaced, scheme, expected)
        self.embed_scale = getattr(replaced, "embed_scale", None)
        self.num_embeddings, self.embedding_dim = self.out_features, self.in_features

    def forward(self, ids: Tensor) -> Tensor:
        flat, grid = ids.reshape(-1), self.grid
        integers = packing.unpack(self.held["words"][flat], self.scheme.bits, self.in_features)
        zero = None if grid.zero_point is None else grid.zero_point[flat]
        rows = dequantize(integers, F.embedding(flat, grid.scale), zero).view(*ids.shape, self.in_features)
        return rows if self.embed_scale is None else rows * torch.as_tensor(self.embed_scale).to(rows)

    def _kernel(self, weight: QuantizedWeight) -> str:
        return "plain"
