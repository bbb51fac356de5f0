"""Tensors of every kind of weight in llmcomp's own layout (`llmcomp.native` says which and how they are named).

A quantized weight's are in `native`; here are those of sparse weights, which are a shorter quantized or floating weight
with the places of what is kept, and of low-rank ones, whose factors and base are weights of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llmcomp import native, packing
from llmcomp.errors import BadCheckpoint, BadRecipe, RunError
from llmcomp.kinds import Kind, LowRank, Sparse, integers_of
from llmcomp.native import PACKED, SCALE, SHAPE, Shapes
from llmcomp.patterns import Pattern, holds
from llmcomp.schemes import INT8_STATIC, Scheme
from llmcomp.weights import INPUT_SCALE, CompressedWeight, LowRankWeight, QuantizedWeight, SparseWeight

VALUES, INDICES = "weight_values", "weight_indices"
LEFT, RIGHT, BASE = "left", "right", "base"
PARTS = (LEFT, RIGHT, BASE)  # of a low-rank weight
MARKS = (f".{PACKED}", f".{VALUES}")  # how names of tensors end that no dense weight has
FACTOR = "weight"  # a floating factor, within its part
_LARGEST_GROUP = 256  # places are bytes at most


def check_fits(kind: Kind, rows: int, columns: int, name: str) -> None:
    """Refuse what a weight [rows, columns] cannot be, or what this layout does not pack.

    Raises:
        BadRecipe: a pattern that is unstructured, of too large groups, or does not divide the width; a rank that saves
            nothing or is above both widths; groups of integers that do not divide what they lie in.
    """
    if isinstance(kind, Sparse):
        if kind.pattern.of is None or kind.pattern.of > _LARGEST_GROUP:
            raise BadRecipe(
                f"--format llmcomp packs N:M patterns up to M = {_LARGEST_GROUP}, and {name} is {kind.pattern.label}; "
                "take --format dense."
            )
        kind.pattern.check_width(columns, name)
    if isinstance(kind, LowRank) and kind.rank > min(rows, columns):
        raise BadRecipe(f"Rank {kind.rank} is above the widths of {name}, {rows} × {columns}; take a smaller one.")
    for part, scheme, width in _integers_in(kind, columns):
        if not scheme.fits(width):
            raise BadRecipe(
                f"Groups of {scheme.group_size} do not divide the {width} columns of {name}{part}; take "
                "--group-size channel."
            )


def _integers_in(kind: Kind, columns: int) -> list[tuple[str, Scheme, int]]:
    """(part, its scheme, its columns) of all integers in a weight."""
    if not isinstance(kind, LowRank):
        scheme = integers_of(kind)
        return [] if scheme is None else [("", scheme, columns)]
    parts = ((LEFT, kind.left, kind.rank), (RIGHT, kind.right, columns), (BASE, kind.base, columns))
    return [(f".{part}", scheme, width) for part, scheme, width in parts if scheme is not None]


def names_of(kind: Kind) -> tuple[str, ...]:
    """Names within its module of all tensors that a weight may have."""
    if isinstance(kind, Scheme):
        return native.TENSORS
    if isinstance(kind, Sparse):
        return (VALUES, INDICES, SHAPE) if kind.values is None else (*native.TENSORS, INDICES)
    inside = native.TENSORS[:-1]  # without the scale of inputs
    return tuple(
        f"{part}.{name}"
        for part in PARTS
        for name in (inside if getattr(kind, part) is not None else () if part == BASE else (FACTOR,))
    )


def main_of(kind: Kind) -> str:
    """The tensor within its module that every weight of this kind has, and no other module."""
    if isinstance(kind, LowRank):
        return f"{LEFT}.{FACTOR if kind.left is None else PACKED}"
    return VALUES if isinstance(kind, Sparse) and kind.values is None else PACKED


def floating_of(kind: Kind) -> str:
    """The tensor within its module whose dtype is that of the dense weight."""
    if isinstance(kind, LowRank):
        return f"{LEFT}.{FACTOR if kind.left is None else SCALE}"
    return VALUES if isinstance(kind, Sparse) and kind.values is None else SCALE


def part_of(kind: LowRank, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a part of a low-rank weight by their names within that part."""
    return {name.removeprefix(f"{part}."): one for name, one in tensors.items() if name.startswith(f"{part}.")}


def to_tensors(weight: CompressedWeight, kind: Kind, looked_up: bool = False) -> dict[str, Tensor]:
    """What a file holds for a weight, by name within its module; every tensor contiguous.

    Args:
        kind: what it is stored as. A quantized weight with a mask may be a plain `Scheme`: then it lies as integers,
            removed ones included.
        looked_up: row by row (embeddings), rather than multiplied with.

    Raises:
        RunError: a weight that is not of this kind.
    """
    if isinstance(kind, Scheme) and isinstance(weight, QuantizedWeight):
        return native.to_tensors(weight, looked_up)
    if isinstance(kind, LowRank) and isinstance(weight, LowRankWeight):
        parts = {part: getattr(weight, part) for part in PARTS if getattr(weight, part) is not None}
        held = {part: isinstance(one, QuantizedWeight) for part, one in parts.items()}
        if weight.rank == kind.rank and all(held.get(p, False) is (getattr(kind, p) is not None) for p in PARTS):
            return {
                f"{part}.{name}": tensor
                for part, one in parts.items()
                for name, tensor in _part_tensors(one).items()
            }
    if isinstance(kind, Sparse) and isinstance(weight, SparseWeight | QuantizedWeight):
        mask = weight.mask
        if mask is not None and weight.pattern == kind.pattern and kind.pattern.group is not None:
            if isinstance(weight, SparseWeight) and kind.values is None:
                return {VALUES: _kept(weight.values, mask), **_places(mask, kind.pattern)}
            if isinstance(weight, QuantizedWeight) and kind.values is not None:
                short = replace(weight, values=_kept(weight.values, mask), pattern=None, mask=None)
                return {**native.to_tensors(short, looked_up=True), **_places(mask, kind.pattern)}
    raise RunError(f"A {type(weight).__name__} is not what was planned, {kind.label}.")


def _part_tensors(one: Tensor | QuantizedWeight) -> dict[str, Tensor]:
    return native.to_tensors(one, False) if isinstance(one, QuantizedWeight) else {FACTOR: one.contiguous()}


def _kept(values: Tensor, mask: Tensor) -> Tensor:
    """[out, kept] of [out, in], in the order of columns."""
    return values[mask].view(len(values), -1)


def _places(mask: Tensor, pattern: Pattern) -> dict[str, Tensor]:
    columns = torch.arange(mask.shape[1], device=mask.device) % (pattern.of or 1)
    places = columns.to(torch.uint8).expand(mask.shape)[mask].view(len(mask), -1)
    shape = torch.tensor(mask.shape, dtype=torch.int64)
    return {INDICES: packing.pack_bytes(places, pattern.index_bits), SHAPE: shape}


def mask_of(indices: Tensor, pattern: Pattern, columns: int) -> Tensor:
    """bool [rows, columns] of `weight_indices`; of a group whose places are none, or not in order, nothing is kept.

    Any rows may be given.
    """
    if (pattern.kept, pattern.of) == (2, 4):  # most of the time of decoding is this; a byte is two groups
        codes = _TWO_OF_FOUR.to(indices.device).index_select(0, indices.reshape(-1).int())
        return codes.view(torch.bool).view(len(indices), -1)[:, :columns]
    places = packing.unpack_bytes(indices, pattern.index_bits, pattern.kept_in_row(columns))
    places = places.reshape(len(indices), -1, pattern.kept or 1)
    last = places[..., -1] < (pattern.of or 1)
    fine = (places[..., 1:] > places[..., :-1]).all(-1).logical_and_(last).unsqueeze(-1)
    mask = torch.zeros(*places.shape[:2], 1 << pattern.index_bits, dtype=torch.bool, device=indices.device)
    mask.scatter_(2, places.long(), fine.expand(places.shape))
    return mask[..., : pattern.of].reshape(len(indices), columns)


def _two_of_four() -> Tensor:
    """int64 [256]: of a byte of two groups' places the mask of eight columns, a byte each."""
    codes = torch.arange(256)
    nibbles = torch.stack((codes & 15, codes >> 4), 1)
    first, second = (nibbles & 3).unsqueeze(-1), (nibbles >> 2).unsqueeze(-1)
    column = torch.arange(4)
    mask = ((column == first) | (column == second)) & (first < second)
    return mask.view(256, 8).view(torch.int64).view(-1)


_TWO_OF_FOUR = _two_of_four()  # no cache: torch.compile looks through those


def spread(values: Tensor, mask: Tensor, others: Tensor | None = None) -> Tensor:
    """Kept values [rows, kept] in their columns, the others zero, or as in `others` [rows, columns], which changes."""
    if others is None:
        others = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return others.masked_scatter_(mask, values)


def from_tensors(tensors: Mapping[str, Tensor], kind: Kind) -> CompressedWeight:
    """The inverse of `to_tensors`.

    Raises:
        BadCheckpoint: a tensor that is missing, of another shape or dtype than the kind asks for, or places of kept
            weights that cannot be.
    """
    if isinstance(kind, Scheme):
        return native.from_tensors(tensors, kind)
    _, columns = check(tensors, kind)
    if isinstance(kind, LowRank):
        left, right = _factor(tensors, kind, LEFT), _factor(tensors, kind, RIGHT)
        base = None if kind.base is None else native.from_tensors(part_of(kind, BASE, tensors), kind.base)
        return LowRankWeight(left, right, base)
    mask = mask_of(tensors[INDICES], kind.pattern, columns)
    if kind.values is None:
        return SparseWeight(spread(tensors[VALUES], mask), mask, kind.pattern)
    kept = native.integers(tensors[PACKED], kind.values.bits, kind.pattern.kept_in_row(columns))
    zero = native.zero_points(tensors, kind.values)
    values = spread(kept, mask, None if zero is None else by_column(zero, columns))
    return QuantizedWeight(
        values, tensors[SCALE], zero, kind.values, tensors.get(INPUT_SCALE), kind.pattern, mask.contiguous()
    )


def _factor(tensors: Mapping[str, Tensor], kind: LowRank, part: str) -> Tensor | QuantizedWeight:
    own, scheme = part_of(kind, part, tensors), getattr(kind, part)
    return own[FACTOR] if scheme is None else native.from_tensors(own, scheme)


def by_column(zero: Tensor, columns: int) -> Tensor:
    """Zero points [rows, groups] as [rows, columns]."""
    return zero.repeat_interleave(columns // zero.shape[1], 1)


def check(tensors: Mapping[str, Tensor], kind: Kind) -> tuple[int, int]:
    """The shape [out, in] of a weight in this layout.

    Raises:
        BadCheckpoint: a tensor that is missing, of another shape or dtype than the kind asks for, or places of kept
            weights that cannot be.
    """
    if isinstance(kind, Scheme):
        return native.check(tensors, kind)
    shape = _shape_of(tensors, kind)
    check_headers(tensors, kind, shape)
    if isinstance(kind, Sparse):
        _check_places(tensors[INDICES], kind.pattern, shape[1])
    return shape


def check_headers(tensors: Mapping[str, Tensor], kind: Kind, shape: tuple[int, int]) -> None:
    """Refuse tensors of another shape or dtype than a weight [out, in] of this kind has; they may lie on meta.

    Raises:
        BadCheckpoint: the first of them.
    """
    try:
        check_fits(kind, *shape, "a weight")
    except BadRecipe as error:
        raise BadCheckpoint(f"{list(shape)} is no shape of a weight of {kind.label}: {error}".rstrip(".")) from error
    native.require(tensors, _shapes(tensors, kind, shape))
    floats = {name: tensors[name].dtype for name in _floats(kind) if name in tensors}
    main = floats[floating_of(kind)]
    if other := next((name for name, dtype in floats.items() if dtype != main), None):
        raise BadCheckpoint(
            f"{other} is {floats[other]}, and {floating_of(kind)} {main}".replace("torch.", "")
        )


def _floats(kind: Kind) -> list[str]:
    return [name for name in names_of(kind) if name.rpartition(".")[2] in (FACTOR, SCALE, VALUES, INPUT_SCALE)]


def _shape_of(tensors: Mapping[str, Tensor], kind: Kind) -> tuple[int, int]:
    def sizes(name: str, count: int) -> list[int]:
        found = tensors[name].flatten().tolist() if name.endswith(SHAPE) and name in tensors else []
        if name in tensors and not name.endswith(SHAPE):
            found = list(tensors[name].shape)
        if name not in tensors:
            raise BadCheckpoint(f"{name} is missing")
        if len(found) != count or min(found) < 1:
            raise BadCheckpoint(f"{name} {found} is not that of a weight of {kind.label}")
        return [int(size) for size in found]

    if isinstance(kind, LowRank):
        left = sizes(f"{LEFT}.{FACTOR if kind.left is None else SHAPE}", 2)
        right = sizes(f"{RIGHT}.{FACTOR if kind.right is None else SHAPE}", 2)
        return left[0], right[1]
    rows, columns = sizes(SHAPE, 2)
    return rows, columns


def _shapes(tensors: Mapping[str, Tensor], kind: Kind, shape: tuple[int, int]) -> Shapes:
    """{tensor: its dtype and shape}. Of integers there may be several forms; the file's is taken where it can be."""
    rows, columns = shape
    if isinstance(kind, Scheme):
        return native.shapes_of(shape, kind, tensors[PACKED].dtype if PACKED in tensors else torch.int32)
    if isinstance(kind, LowRank):
        sizes = {LEFT: (rows, kind.rank), RIGHT: (kind.rank, columns), BASE: shape}
        found: Shapes = {}
        for part, own in sizes.items():
            scheme = getattr(kind, part)
            if scheme is not None:
                inside = _shapes(part_of(kind, part, tensors), scheme, own)
                found |= {f"{part}.{name}": one for name, one in inside.items()}
            elif part != BASE:
                found[f"{part}.{FACTOR}"] = (None, own)
        return found
    kept = kind.pattern.kept_in_row(columns)
    places: Shapes = {
        INDICES: (torch.uint8, (rows, -(-kept * kind.pattern.index_bits // 8))),
        SHAPE: (torch.int64, (2,)),
    }
    if kind.values is None:
        return {VALUES: (None, (rows, kept)), **places}
    whole = native.shapes_of(shape, kind.values, torch.int32)
    bits = kind.values.bits
    packed = (torch.int8, (rows, kept)) if bits == 8 else (torch.int32, (rows, packing.words(kept, bits)))
    return {**whole, PACKED: packed, **places}


def _check_places(indices: Tensor, pattern: Pattern, columns: int) -> None:
    """A few rows at a time: a mask is as large as eight weights of one bit."""
    step = max(1, (1 << 22) // columns)
    for start in range(0, len(indices), step):
        if not holds(pattern, mask_of(indices[start : start + step], pattern, columns)):
            raise BadCheckpoint(f"{INDICES} does not say which {pattern.kept} of every {pattern.of} weights are kept")


def nbytes(kind: Kind, rows: int, columns: int, itemsize: int) -> int:
    """Bytes of what `to_tensors` returns for a weight [rows, columns]; `itemsize`: of one dense value."""
    if isinstance(kind, LowRank):
        sizes = ((kind.left, rows, kind.rank), (kind.right, kind.rank, columns))
        base = 0 if kind.base is None else nbytes(kind.base, rows, columns, itemsize)
        return base + sum(
            high * wide * itemsize if scheme is None else nbytes(scheme, high, wide, itemsize)
            for scheme, high, wide in sizes
        )
    kept = columns if isinstance(kind, Scheme) else kind.pattern.kept_in_row(columns)
    places = 0 if isinstance(kind, Scheme) else rows * -(-kept * kind.pattern.index_bits // 8)
    scheme = integers_of(kind)
    shape = 2 * 8
    if scheme is None:
        return rows * kept * itemsize + places + shape
    groups = scheme.groups(columns)
    zeros = 0 if scheme.symmetric else packing.words(rows, scheme.bits) * 4 * groups
    inputs = itemsize if scheme.activations == INT8_STATIC else 0
    packed = kept if scheme.bits == 8 else packing.words(kept, scheme.bits) * 4
    return rows * packed + rows * groups * itemsize + zeros + inputs + places + shape


def blank(kind: Kind, rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `to_tensors` returns for a weight [rows, columns], on meta, and 4-bit integers in words."""
    forms = {PACKED: torch.empty(0, dtype=torch.int8)} if isinstance(kind, Scheme) and kind.bits == 8 else {}
    shapes = _shapes(forms, kind, (rows, columns))
    return {name: torch.empty(size, dtype=own or dtype, device="meta") for name, (own, size) in shapes.items()}
