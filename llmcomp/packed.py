"""Modules that keep their weight packed: what `llmcomp.hf` puts where a linear or an embedding was.

Here are those of integers; sparse and low-rank ones are in `llmcomp.packed_kinds`.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from llmcomp import native
from llmcomp.errors import BadCheckpoint
from llmcomp.kernels import KERNELS, kernel_for
from llmcomp.kernels.operator import product
from llmcomp.kernels.tiles import Grid
from llmcomp.schemes import Scheme
from llmcomp.weights import QuantizedWeight, dequantize

_MADV_PAGEOUT = 21  # Linux 5.4; elsewhere in the numbering there is nothing, and the call does nothing
_BACKWARD_ROWS = 1024  # of a weight that are decoded at a time
_HELD = "held_"  # what a kernel keeps, as buffers that no checkpoint has


class Packed(nn.Module, ABC):
    """A module [out_features, in_features] whose weight lies packed, of whatever kind.

    It is made with buffers that a checkpoint's tensors are loaded into; `settle` makes of them what products want.
    `state_dict` gives llmcomp's own layout again, to the bit.

    Args:
        replaced: what stood in its place; its bias stays.
        parts: the names in the file, within the module, of the tensors that it may have.
        expected: {tensor within the module: its dtype and shape in the file}.

    Attributes:
        kernel: by what it computes, '' before it has settled.
    """

    def __init__(self, replaced: nn.Module, parts: tuple[str, ...], expected: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.transposed, self.out_features, self.in_features = shape_of(replaced)
        self.parts = parts
        self.kernel = ""
        for name, tensor in expected.items():
            self.register_buffer(name, tensor)

    @abstractmethod
    def settle(self) -> None:
        """Take over what was loaded.

        Raises:
            BadCheckpoint: a tensor of another shape than the module's.
        """

    @abstractmethod
    def decoded(self) -> Tensor:
        """The dense weight [out_features, in_features]."""

    @property
    @abstractmethod
    def floating(self) -> Tensor:
        """Of the dense weight's dtype and device, loaded or not."""

    def require_shape(self, shape: tuple[int, int]) -> None:
        """Refuse a weight [out, in] that is not the module's.

        Raises:
            BadCheckpoint: it is not.
        """
        if shape != (self.out_features, self.in_features):
            raise BadCheckpoint(f"it is {list(shape)}, and the model wants {[self.out_features, self.in_features]}")

    def dense(self) -> Tensor:
        """The dense weight as the replaced module held it."""
        return self.decoded().t() if self.transposed else self.decoded()

    @property
    def weight(self) -> Tensor:
        """The dense weight for code that goes past `forward`, decoded when something is computed with it."""
        if self.kernel:
            return DecodedWhenUsed(self)
        # Not loaded yet: for initializations, which are lost on it.
        empty = torch.empty(self.out_features, self.in_features, dtype=self.floating.dtype, device="meta")
        return empty.t() if self.transposed else empty

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """The inverse of `_save_to_state_dict`, once the module has settled."""
        own = {part: state_dict[prefix + part] for part in self.parts if prefix + part in state_dict}
        if self.kernel and own:
            for part, tensor in own.items():
                self.register_buffer(part, tensor)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.kernel and own:
            self.settle()


def looks_up(module: nn.Module) -> bool:
    """Whether a packed module can stand in for it that looks rows up."""
    plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    return plain and isinstance(module, nn.Embedding)


def multiplies(module: nn.Module) -> bool:
    """Whether a packed module can stand in for it that multiplies: `nn.Linear` or transformers' Conv1D, and no class
    that computes in a way of its own (Falcon's)."""
    return type(module).forward is nn.Linear.forward or type(module).__name__ == "Conv1D"


def shape_of(replaced: nn.Module) -> tuple[bool, int, int]:
    """Of a linear, Conv1D or embedding: whether it holds [in, out], and out and in."""
    held: Any = replaced.weight
    transposed = type(replaced).__name__ == "Conv1D"
    rows, columns = held.shape[::-1] if transposed else held.shape
    return transposed, rows, columns


class PackedIntegers(Packed):
    """Integers in any layout that `native.read` knows, laid out for a kernel of `llmcomp.kernels`.

    Args:
        scheme: of the weight.
    """

    looked_up = False  # row by row, rather than multiplied with
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, replaced: nn.Module, scheme: Scheme, expected: Mapping[str, Tensor]) -> None:
        super().__init__(replaced, native.PARTS, expected)
        self.scheme = scheme

    def settle(self) -> None:
        # Not by attribute: `weight`, as compressed-tensors calls integers of 8 bits, is a property here.
        loaded = {name: one for name in native.PARTS if (one := self._buffers.get(name)) is not None}
        if native.is_own(loaded, self.scheme, self.transposed):  # as they lie: unpacking would take most of the time
            shape = native.check(loaded, self.scheme)
            stored, scale, zero = loaded[native.PACKED], loaded[native.SCALE], native.zero_points(loaded, self.scheme)
            input_scale = loaded.get(native.INPUT_SCALE)
        else:
            weight = native.read(loaded, self.scheme, self.transposed)
            shape = (weight.shape[0], weight.shape[1])
            stored, scale, zero = native.stored(weight, self.looked_up), weight.scale, weight.zero_point
            input_scale = weight.input_scale
        self.require_shape(shape)
        for name in loaded:
            del self._buffers[name]
        self.hold(stored, Grid(self.scheme, self.in_features, scale, zero, input_scale))
        kept = {tensor.data_ptr() for tensor in self.buffers()}
        for tensor in loaded.values():
            if tensor.data_ptr() not in kept:
                page_out(tensor)

    def hold(self, stored: Tensor, grid: Grid) -> None:
        """Keep a weight, laid out for products on the device where it is.

        Args:
            stored: its integers in any form of `llmcomp.native`.
        """
        for name in [name for name in self._buffers if name.startswith(_HELD)]:
            del self._buffers[name]
        self.kernel = self._kernel(stored.device.type)
        kept = {"scale": grid.scale, "zero_point": grid.zero_point, native.INPUT_SCALE: grid.input_scale}
        for name, tensor in kept.items():
            self.register_buffer(name, tensor, persistent=False)
        for name, tensor in KERNELS[self.kernel].hold(stored, grid).items():
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

    def decoded(self) -> Tensor:
        return self.quantized().dense()

    @property
    def floating(self) -> Tensor:
        return self.scale if self.kernel else self.get_buffer(native.SCALE)

    def _kernel(self, device: str) -> str:
        return kernel_for(self.scheme, self.out_features, self.in_features, device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel:
            for name, tensor in self.stored().items():
                destination[prefix + name] = tensor

    def stored(self) -> dict[str, Tensor]:
        """What a file holds for the weight, by name within the module."""
        return native.to_tensors(self.quantized(), self.looked_up)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedIntegers:
        """Moves between devices lay the weight out anew; casts touch the scales, as they do a dense weight."""
        if not self.kernel:
            super()._apply(fn, recurse)
            return self
        grid, weight = self.grid, self.quantized()
        scale = fn(grid.scale)
        zero, rounded = (None if one is None else one.to(scale.device) for one in (grid.zero_point, grid.input_scale))
        for parameter in self.parameters():
            parameter.data = fn(parameter.data)
        stored = native.stored(weight, self.looked_up).to(scale.device)
        self.hold(stored, grid._replace(scale=scale, zero_point=zero, input_scale=rounded))
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.label}, kernel={self.kernel or None}"


def page_out(tensor: Tensor) -> None:
    """Take a tensor that has been read out of resident memory, where Linux can: what a file maps is read again if it is
    ever asked for. Files stay mapped while any of their tensors lives, so a layout that was read once would stay with
    the one that was made of it."""
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_PAGEOUT)


class Decodes(Protocol):
    """A module that knows its dense weight."""

    transposed: bool
    out_features: int
    in_features: int

    @property
    def floating(self) -> Tensor: ...

    def dense(self) -> Tensor: ...


class DecodedWhenUsed(Tensor):
    """A packed module's dense weight, decoded by each operation on it and not before: models ask linears for the dtype
    of their weight at each call (T5)."""

    module: Decodes

    @staticmethod
    def __new__(cls, module: Decodes) -> DecodedWhenUsed:
        shape = (module.out_features, module.in_features)
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, shape[::-1] if module.transposed else shape, dtype=module.floating.dtype, device=module.floating.device
        )
        made.module = module
        return cast(DecodedWhenUsed, made)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, lambda one: one.module.dense(), (args, kwargs or {}))
        return func(*args, **kwargs)


class Product(torch.autograd.Function):
    """`x W'` by the module's kernel. Gradients go to x alone, through the decoded weight; rounded inputs let them
    pass (straight through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: PackedIntegers) -> Tensor:
        ctx.module = module
        return KERNELS[module.kernel].product(x, module.held, module.grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        weight = ctx.module.quantized()
        if weight.shape[0] <= _BACKWARD_ROWS:
            return gradient @ weight.dense().to(gradient.dtype), None
        found: Any = 0.0
        for start in range(0, weight.shape[0], _BACKWARD_ROWS):  # decoded whole it would be what packing has saved
            rows = weight.rows(start, start + _BACKWARD_ROWS).dense().to(gradient.dtype)
            found = found + (gradient[..., start : start + _BACKWARD_ROWS] @ rows).float()
        return found.to(gradient.dtype), None


class PackedLinear(PackedIntegers):
    """In the place of `nn.Linear`, or transformers' Conv1D."""

    def __init__(self, replaced: nn.Module, scheme: Scheme, expected: Mapping[str, Tensor]) -> None:
        super().__init__(replaced, scheme, expected)
        self.bias: Any = replaced.bias

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():  # an expert that no token goes to
            return x.new_empty(*x.shape[:-1], self.out_features)
        compiling = torch.compiler.is_compiling()
        out: Any = product(x, self.kernel, self.held, self.grid) if compiling else Product.apply(x, self)
        return out if self.bias is None else out + self.bias


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """For a while products are with decoded weights, as those readers compute that decode a checkpoint, and not by
    kernels, some of which round; those of rounded inputs stay as they are."""
    found = [one for one in model.modules() if isinstance(one, PackedLinear) and one.scheme.activations is None]
    for module in found:
        module.__dict__["forward"] = partial(_product_of_decoded, module)
    try:
        yield
    finally:
        for module in found:
            del module.__dict__["forward"]


def _product_of_decoded(module: PackedLinear, x: Tensor) -> Tensor:
    return F.linear(x, module.decoded().to(x.dtype), module.bias)


class PackedEmbedding(PackedIntegers):
    """In the place of `nn.Embedding`: only the rows that are looked up are decoded.

    `embed_scale`: what some models' embeddings multiply by (Gemma), in their own dtype.
    """

    looked_up = True

    def __init__(self, replaced: nn.Module, scheme: Scheme, expected: Mapping[str, Tensor]) -> None:
        super().__init__(replaced, scheme, expected)
        # Gemma keeps the factor in a buffer, too, which is on meta here, and its number beside it.
        scale: Any = getattr(replaced, "scalar_embed_scale", getattr(replaced, "embed_scale", None))
        self.embed_scale = None if scale is None else float(scale)
        self.num_embeddings, self.embedding_dim = self.out_features, self.in_features

    def forward(self, ids: Tensor) -> Tensor:
        flat, grid = ids.reshape(-1), self.grid
        if not len(flat):
            return grid.scale.new_empty(*ids.shape, self.in_features)
        integers = native.integers(self.held["rows"][flat], self.scheme.bits, self.in_features)
        zero = None if grid.zero_point is None else grid.zero_point[flat]
        rows = dequantize(integers, F.embedding(flat, grid.scale), zero).view(*ids.shape, self.in_features)
        return rows if self.embed_scale is None else rows * torch.tensor(self.embed_scale).to(rows)

    def _kernel(self, device: str) -> str:
        return "plain"
