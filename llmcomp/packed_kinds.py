"""Modules for the other kinds of packed weights: N of every M weights, and two thin factors.

Two factors are two products, [.., in] → [.., rank] → [.., out], so they take rank * (in + out) multiplications and as
many weights instead of in * out; the dense matrix is made only for those who ask for it.

A sparse weight is smaller in its file. No CPU multiplies by a mask, and taking kept values apart for each product costs
twenty times the product of one token with the dense weight (18 ms against 0.8 for 2048 × 2048 on an EPYC with AVX2), so
they are put in their columns once, when the file is loaded: floating ones then take the memory and the time of dense
weights; integers, removed ones included, those of integers, by the same kernels. On a CUDA device whose tensor cores
know 2:4 (Ampere and later), floating weights of 16 bits go through torch's semi-structured kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcomp import native, native_kinds
from llmcomp.kernels.tiles import Grid
from llmcomp.kinds import LowRank, Sparse
from llmcomp.native_kinds import BASE, FACTOR, INDICES, LEFT, RIGHT, VALUES
from llmcomp.packed import DecodedWhenUsed, Packed, PackedLinear, page_out, shape_of
from llmcomp.patterns import Pattern
from llmcomp.schemes import Scheme
from llmcomp.weights import LowRankWeight, QuantizedWeight

DENSE, SEMI_STRUCTURED = "dense", "semi-structured"
# What both of torch's libraries for them take (`SparseSemiStructuredTensor`): multiples of these rows and columns.
_SEMI_ROWS, _SEMI_COLUMNS = 32, 64
_HELD = "held_weight"


class PackedSparse(Packed):
    """Floating, in the place of `nn.Linear`, or transformers' Conv1D.

    Of the file the places of what is kept stay as they are; the values lie in their columns, or in torch's
    semi-structured tensor (`fast`).
    """

    def __init__(self, replaced: nn.Module, kind: Sparse, expected: Mapping[str, Tensor]) -> None:
        super().__init__(replaced, native_kinds.names_of(kind), expected)
        self.kind = kind
        self.bias: Any = replaced.bias
        self.fast: Tensor | None = None

    def settle(self) -> None:
        loaded = {name: self.get_buffer(name) for name in self.parts if self._buffers.get(name) is not None}
        weight = native_kinds.from_tensors(loaded, self.kind)
        self.require_shape((weight.shape[0], weight.shape[1]))
        self._hold(weight.dense())
        page_out(loaded[VALUES])

    def _hold(self, dense: Tensor) -> None:
        self.kernel, self.fast, self._buffers[VALUES] = DENSE, None, None
        if semi_structured(self.kind.pattern, dense):
            made = torch.sparse.to_sparse_semi_structured(dense)
            # Only where values come back to the bit: a zero of either sign may be one zero there.
            if torch.equal(made.to_dense().view(torch.int16), dense.view(torch.int16)):
                self.kernel, self.fast = SEMI_STRUCTURED, made
        self.register_buffer(_HELD, None if self.fast is not None else dense, persistent=False)

    @property
    def _held(self) -> Tensor:
        return self.get_buffer(_HELD) if self.fast is None else self.fast

    @property
    def floating(self) -> Tensor:
        return self._held if self.kernel else self.get_buffer(VALUES)

    def decoded(self) -> Tensor:
        return self.get_buffer(_HELD) if self.fast is None else self.fast.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():  # an expert that no token goes to
            return x.new_empty(*x.shape[:-1], self.out_features)
        return F.linear(x, self._held, self.bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel:
            mask = native_kinds.mask_of(self.get_buffer(INDICES), self.kind.pattern, self.in_features)
            destination[prefix + VALUES] = self.decoded()[mask].view(self.out_features, -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedSparse:
        """Casts touch what floats, as they do a dense weight; where it lies then, it is laid out anew."""
        if self.fast is not None:
            self._buffers[_HELD], self.fast = self.fast.to_dense(), None
        super()._apply(fn, recurse)
        if self.kernel:
            self._hold(self.get_buffer(_HELD))
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind.label}, kernel={self.kernel or None}"


def semi_structured(pattern: Pattern, dense: Tensor) -> bool:
    """Whether torch's semi-structured kernels take such a weight [out, in] where it is."""
    if dense.device.type != "cuda" or (pattern.kept, pattern.of) != (2, 4):
        return False
    rows, columns = dense.shape
    fits = rows % _SEMI_ROWS == 0 and columns % _SEMI_COLUMNS == 0 and dense.dtype in (torch.float16, torch.bfloat16)
    libraries: Any = torch.backends
    return fits and libraries.cusparselt.is_available() and torch.cuda.get_device_capability(dense.device) >= (8, 0)


class PackedSparseIntegers(PackedLinear):
    """Sparse and quantized: all integers, as the kernels for them want them, and the places of those that the file has.

    Args:
        kind: with the scheme of its values.
    """

    def __init__(self, replaced: nn.Module, kind: Sparse, expected: Mapping[str, Tensor]) -> None:
        assert kind.values is not None
        super().__init__(replaced, kind.values, expected)
        self.kind, self.parts = kind, native_kinds.names_of(kind)

    def settle(self) -> None:
        loaded = {name: self.get_buffer(name) for name in self.parts if self._buffers.get(name) is not None}
        weight = native_kinds.from_tensors(loaded, self.kind)
        self.require_shape((weight.shape[0], weight.shape[1]))
        assert isinstance(weight, QuantizedWeight)  # its kind has a scheme
        for name in loaded:
            del self._buffers[name]
        self.register_buffer(INDICES, loaded[INDICES], persistent=False)
        grid = Grid(self.scheme, self.in_features, weight.scale, weight.zero_point, weight.input_scale)
        self.hold(native.stored(weight, False), grid)
        page_out(loaded[native.PACKED])

    def stored(self) -> dict[str, Tensor]:
        indices, weight = self.get_buffer(INDICES), self.quantized()
        mask = native_kinds.mask_of(indices.to(weight.values.device), self.kind.pattern, self.in_features).contiguous()
        sparse = QuantizedWeight(
            weight.values, weight.scale, weight.zero_point, weight.scheme, weight.input_scale, self.kind.pattern, mask
        )
        return native_kinds.to_tensors(sparse, self.kind)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind.label}, kernel={self.kernel or None}"


class PackedLowRank(nn.Module):
    """In the place of `nn.Linear`, or transformers' Conv1D: `left(right(x))`, on top of `base(x)` where there is one.

    Each of the three is a module, and its tensors are under its name, floating (`nn.Linear`) or packed.
    """

    def __init__(self, replaced: nn.Module, kind: LowRank, expected: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.transposed, self.out_features, self.in_features = shape_of(replaced)
        self.kind = kind
        parts = {part: native_kinds.part_of(kind, part, expected) for part in native_kinds.PARTS}
        self.left = _factor(kind.left, self.out_features, kind.rank, parts[LEFT])
        self.right = _factor(kind.right, kind.rank, self.in_features, parts[RIGHT])
        self.base = None
        if kind.base is not None:
            self.base = _factor(kind.base, self.out_features, self.in_features, parts[BASE])
        self.bias: Any = replaced.bias

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():  # an expert that no token goes to
            return x.new_empty(*x.shape[:-1], self.out_features)
        out: Tensor = self.left(self.right(x))
        if self.base is not None:
            out = out + self.base(x)
        return out if self.bias is None else out + self.bias

    def compressed(self) -> LowRankWeight:
        """The weight as a method returned it."""
        base = self.base.quantized() if isinstance(self.base, PackedLinear) else None
        left, right = (
            part.quantized() if isinstance(part, PackedLinear) else part.weight.detach()
            for part in (self.left, self.right)
        )
        return LowRankWeight(left, right, base)

    def decoded(self) -> Tensor:
        """The dense weight [out_features, in_features]."""
        return self.compressed().dense()

    def dense(self) -> Tensor:
        """The dense weight as the replaced module held it."""
        return self.decoded().t() if self.transposed else self.decoded()

    @property
    def floating(self) -> Tensor:
        """Of the dense weight's dtype and device, loaded or not."""
        return self.left.floating if isinstance(self.left, PackedLinear) else self.left.weight

    @property
    def kernel(self) -> str:
        """Of both factors, '' before they have been loaded."""
        parts = [part.kernel if isinstance(part, PackedLinear) else DENSE for part in (self.left, self.right)]
        return " and ".join(dict.fromkeys(parts)) if all(parts) and self.floating.device.type != "meta" else ""

    @property
    def weight(self) -> Tensor:
        """As `Packed.weight`."""
        if self.kernel:
            return DecodedWhenUsed(self)
        empty = torch.empty(self.out_features, self.in_features, dtype=self.floating.dtype, device="meta")
        return empty.t() if self.transposed else empty

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind.label}, kernel={self.kernel or None}"


def _factor(scheme: Scheme | None, rows: int, columns: int, expected: Mapping[str, Tensor]) -> nn.Linear | PackedLinear:
    dtype = None if scheme is not None else expected[FACTOR].dtype
    made = nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype)
    return made if scheme is None else PackedLinear(made, scheme, expected)
