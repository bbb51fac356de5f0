"""Modules for the other kinds of packed weights: N of every M weights, and two thin factors.

Two factors are two products, [.., in] → [.., rank] → [.., out], so they take rank * (in + out) multiplications and as
many weights instead of in * out; the dense matrix is made only for those who ask for it.

A sparse weight is smaller in memory, and on a CPU not faster: no CPU multiplies by a mask, so rows are decoded a tile
at a time and multiplied as dense ones. On a CUDA device whose tensor cores know 2:4 (Ampere and later), floating
weights of 16 bits go through torch's semi-structured kernels. Others, N:M and integers, are decoded there, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcomp import native, native_kinds, packing
from llmcomp.activations import quantized
from llmcomp.kernels.tiles import product_dtype, tile_rows
from llmcomp.kinds import LowRank, Sparse
from llmcomp.matmul import multiplies
from llmcomp.native_kinds import BASE, FACTOR, INDICES, LEFT, RIGHT, VALUES
from llmcomp.packed import DecodedWhenUsed, Packed, PackedLinear, Product, shape_of
from llmcomp.patterns import Pattern
from llmcomp.schemes import Scheme
from llmcomp.weights import INPUT_SCALE, LowRankWeight, dequantize

TILES, SEMI_STRUCTURED = "tiles", "semi-structured"
# What both of torch's libraries for them take (`SparseSemiStructuredTensor`): multiples of these rows and columns.
_SEMI_ROWS, _SEMI_COLUMNS = 32, 64


class PackedSparse(Packed):
    """In the place of `nn.Linear`, or transformers' Conv1D: the tensors of the file, as they lie there.

    Attributes:
        fast: torch's semi-structured tensor, which then takes the place of the kept values.
        dtype: that tiles are multiplied in, None for that of the inputs.
    """

    def __init__(self, replaced: nn.Module, kind: Sparse, expected: Mapping[str, Tensor]) -> None:
        super().__init__(replaced, native_kinds.names_of(kind), expected)
        self.kind = kind
        self.bias: Any = replaced.bias
        self.fast: Tensor | None = None
        self.dtype: torch.dtype | None = None

    def settle(self) -> None:
        self.fast = None
        self.require_shape(native_kinds.check(self._held(), self.kind))
        self._hold()

    def _hold(self) -> None:
        self.kernel, dtype = TILES, self.floating.dtype
        if self.floating.device.type != "cpu":
            self.dtype = None
        elif self.kind.values is not None:  # integers were rounded by more than bf16 rounds
            self.dtype = product_dtype()
        else:
            self.dtype = dtype if multiplies(dtype) else torch.float32
        if self.kind.values is None and semi_structured(self.kind, self.floating):
            self._make_fast()

    def _make_fast(self) -> None:
        """Only where the kept values come back from it to the bit (a zero of either sign is one zero there)."""
        dense = self.decoded()
        made = torch.sparse.to_sparse_semi_structured(dense)
        if torch.equal(made.to_dense().view(torch.int16), dense.view(torch.int16)):
            self.kernel, self.fast, self._buffers[VALUES] = SEMI_STRUCTURED, made, None

    def _values(self) -> Tensor:
        """The kept values, wherever they are."""
        if self.fast is None:
            return self.get_buffer(VALUES)
        mask = native_kinds.mask_of(self.get_buffer(INDICES), self.kind.pattern, self.in_features)
        return self.fast.to_dense()[mask].view(self.out_features, -1)

    @property
    def floating(self) -> Tensor:
        return self.fast if self.fast is not None else self.get_buffer(native_kinds.floating_of(self.kind))

    def decoded(self) -> Tensor:
        return self.fast.to_dense() if self.fast is not None else torch.cat(list(self._tiles()))

    def _tiles(self) -> Iterator[Tensor]:
        """The dense weight, a few rows at a time."""
        return tiles(self._held(), self.kind, self.out_features, self.in_features)

    def _held(self) -> dict[str, Tensor]:
        held = {name: self._buffers.get(name) for name in self.parts}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def multiply(self, x: Tensor) -> Tensor:
        if self.kind.values is not None and self.kind.values.activations is not None:
            x = quantized(x, self._buffers.get(INPUT_SCALE))
        if self.fast is not None:
            return F.linear(x.to(self.fast.dtype), self.fast).to(x.dtype)
        dtype = self.dtype or x.dtype
        rows = x.reshape(-1, self.in_features).to(dtype)
        if torch.compiler.is_compiling():
            out = F.linear(rows, torch.ops.llmcomp.spread(*_flat(self._held(), self)).to(dtype))
        else:
            out = torch.cat([F.linear(rows, tile.to(dtype)) for tile in self._tiles()], -1)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():  # an expert that no token goes to
            return x.new_empty(*x.shape[:-1], self.out_features)
        out: Any = self.multiply(x) if torch.compiler.is_compiling() else Product.apply(x, self)
        return out if self.bias is None else out + self.bias

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.fast is not None:
            destination[prefix + VALUES] = self._values()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedSparse:
        """Casts touch what floats, as they do a dense weight; where it lies then, it is laid out anew."""
        if self.fast is not None:
            self._buffers[VALUES], self.fast = self._values(), None
        super()._apply(fn, recurse)
        if self.kernel:
            self._hold()
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind.label}, kernel={self.kernel or None}"


def tiles(held: Mapping[str, Tensor], kind: Sparse, rows: int, columns: int) -> Iterator[Tensor]:
    """The dense weight [rows, columns], a few rows at a time.

    Args:
        held: its tensors in the file.
    """
    scheme, zero, step = kind.values, None, tile_rows(columns, 1)
    if scheme is not None and not scheme.symmetric:
        zero = packing.unpack(held[native.ZERO_POINT], scheme.bits, rows, 0)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        mask = native_kinds.mask_of(held[INDICES][part], kind.pattern, columns)
        if scheme is None:
            yield native_kinds.spread(held[VALUES][part], mask)
            continue
        kept = native.integers(held[native.PACKED][part], scheme.bits, kind.pattern.kept_in_row(columns))
        own = None if zero is None else zero[part]
        others = None if own is None else native_kinds.by_column(own, columns)
        yield dequantize(native_kinds.spread(kept, mask, others), held[native.SCALE][part], own)


# For torch.compile, which does not look into how bits are taken apart: the dense weight as one operator.
torch.library.define(
    "llmcomp::spread",
    "(str[] names, Tensor[] held, int rows, int columns, int kept, int of, int? bits, int? group_size, bool symmetric)"
    " -> Tensor",
)


def _flat(held: Mapping[str, Tensor], module: PackedSparse) -> tuple[Any, ...]:
    pattern, scheme = module.kind.pattern, module.kind.values
    own = (None, None, True) if scheme is None else (scheme.bits, scheme.group_size, scheme.symmetric)
    return (
        list(held), list(held.values()), module.out_features, module.in_features, pattern.kept, pattern.of, *own,
    )  # fmt: skip


def _kind_of(kept: int, of: int, bits: int | None, group_size: int | None, symmetric: bool) -> Sparse:
    return Sparse(Pattern(kept, of), None if bits is None else Scheme(bits, group_size, symmetric))


@torch.library.impl("llmcomp::spread", "CompositeExplicitAutograd")
def _spread(names: list[str], held: list[Tensor], rows: int, columns: int, *kind: Any) -> Tensor:
    return torch.cat(list(tiles(dict(zip(names, held, strict=True)), _kind_of(*kind), rows, columns)))


@torch.library.register_fake("llmcomp::spread")
def _(names: list[str], held: list[Tensor], rows: int, columns: int, *kind: Any) -> Tensor:
    return held[names.index(native_kinds.floating_of(_kind_of(*kind)))].new_empty(rows, columns)


def semi_structured(kind: Sparse, values: Tensor) -> bool:
    """Whether torch's semi-structured kernels take such a weight where its values [out, kept] are."""
    if values.device.type != "cuda" or (kind.pattern.kept, kind.pattern.of) != (2, 4):
        return False
    rows, kept = values.shape
    fits = rows % _SEMI_ROWS == 0 and 2 * kept % _SEMI_COLUMNS == 0 and values.dtype in (torch.float16, torch.bfloat16)
    libraries: Any = torch.backends
    return fits and libraries.cusparselt.is_available() and torch.cuda.get_device_capability(values.device) >= (8, 0)


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
        parts = [part.kernel if isinstance(part, PackedLinear) else "dense" for part in (self.left, self.right)]
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
