"""Integers of 2, 3 or 4 bits in groups, kept as nibbles in the order of torch's CPU operator for them.

`aten::_weight_int4pack_mm_for_cpu` wants the rows of a weight interleaved in a way that depends on the instruction
set; `order` finds out by packing row numbers, so that tiles can be decoded from, and checkpoints written of, what the
operator reads. Files of llmcomp's own layout hold AVX2's order: they are computed with where they are mapped, or two
of their blocks become one of AVX512's; words, as other files hold them, are laid out anew. Weights of 2 and 3 bits are
widened to nibbles: they take 4 bits in memory, and no more time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcomp import native, packing
from llmcomp.kernels.tiles import Grid, few_rows, product_dtype, tile_rows
from llmcomp.schemes import Scheme

_GROUPS = (256, 128, 64, 32)  # that the operator knows
_PAD = 64  # rows are filled up to this, which every instruction set's block divides
_LANE = 16  # bytes that move together when a block is turned, as one complex128
_OFFSET = 8  # a nibble holds the integer plus this
_LOW = 0x0F0F0F0F  # the low nibbles of a word
_LOW_LANE = 0x0F0F0F0F0F0F0F0F  # and of eight bytes
_ZEROS = -0x77777778  # a word of eight nibbles of 8
_SLAB = 1 << 17  # words that are laid out at a time, so that what is made on the way stays in the cache


class Order(NamedTuple):
    """Of `block` rows, byte j of a column holds row `low[j]` in its low nibble and `high[j]` in its high one."""

    block: int
    low: slice
    high: slice


AVX2 = Order(32, slice(0, 16, 1), slice(16, 32, 1))  # and that of `packing.pack_blocks`
AVX512 = Order(64, slice(0, 32, 1), slice(32, 64, 1))


@functools.cache
def order() -> Order | None:
    """How this machine's operator lays rows out; None if it is no order that `hold` can make."""
    numbers = torch.arange(2 * _PAD, dtype=torch.int32).view(-1, 1)
    low, high = torch.zeros((2, 2 * _PAD), dtype=torch.int64)
    for shift in (0, 4):
        nibbles = (numbers >> shift & 15).expand(-1, 2).contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1).view(-1)
        low += (packed & 15).long() << shift
        high += (packed >> 4).long() << shift
    half = int((low[1:] == low[0]).nonzero()[0]) + 1  # where the second column begins
    rows = [_progression(part[:half].tolist()) for part in (low, high)]
    if rows[0] is None or rows[1] is None or _PAD % (2 * half) or half % _LANE:
        return None
    return Order(2 * half, rows[0], rows[1])


def fits(scheme: Scheme, rows: int, columns: int, device: str) -> bool:
    return (
        device == "cpu"
        and scheme.bits <= 4
        and scheme.activations is None
        and columns % _GROUPS[-1] == 0
        and order() is not None
    )


def hold(stored: Tensor, grid: Grid) -> dict[str, Tensor]:
    """`packed` uint8 [rows / block, columns, block / 2], and the operator's `scales` bf16 [groups, rows, 2]."""
    found = order()
    assert found is not None
    padded = -(-len(grid.scale) // _PAD) * _PAD
    in_blocks = stored.dtype == torch.uint8 and padded == len(grid.scale) and found in (AVX2, AVX512)
    if in_blocks:
        aligned = stored if stored.storage_offset() % 8 == 0 else stored.clone()  # as safetensors writes files
        packed = aligned if found == AVX2 else paired(aligned)
    else:
        packed = _from_words(_words(stored, grid), padded, found)
    return {"packed": packed, "scales": _operator_scales(grid, padded)}


def _words(stored: Tensor, grid: Grid) -> Tensor:
    """The integers in words of eight nibbles."""
    if stored.dtype == torch.int32 and grid.scheme.bits == 4:
        return stored
    return packing.pack(native.integers(stored, grid.scheme.bits, grid.columns), 4)


def _from_words(words: Tensor, padded: int, found: Order) -> Tensor:
    if padded > len(words):
        words = F.pad(words, (0, 0, 0, padded - len(words)), value=_ZEROS)
    packed = torch.empty(padded // found.block, 8 * words.shape[1], found.block // 2, dtype=torch.uint8)
    slab = max(1, _SLAB // (words.shape[1] * _PAD)) * _PAD
    for start in range(0, padded, slab):
        stop = min(start + slab, padded)
        packed[start // found.block : stop // found.block] = _interleaved(words[start:stop], found)
    return packed


def paired(blocks: Tensor) -> Tensor:
    """AVX512's order, uint8 [rows / 64, columns, 32], of AVX2's [rows / 32, columns, 16].

    Lanes of 16 bytes stay whole: of two blocks a and b, the first lane takes the low nibbles of both, the second the
    high ones. One pair of blocks at a time, so that all but the result stays in the cache.
    """
    count, columns, half = blocks.shape
    out = torch.empty(count // 2, columns, 2, dtype=torch.complex128)
    flat = blocks.reshape(-1).view(torch.int64).view(count // 2, 2, -1)
    lane, other = torch.empty_like(flat[0]).unbind()
    for (a, b), pair in zip(flat, out, strict=True):
        torch.bitwise_and(b, _LOW_LANE, out=lane).bitwise_left_shift_(4)
        lane.bitwise_or_(torch.bitwise_and(a, _LOW_LANE, out=other))
        pair[:, 0] = lane.view(torch.complex128)
        torch.bitwise_right_shift(a, 4, out=lane).bitwise_and_(_LOW_LANE)
        lane.bitwise_or_(torch.bitwise_and(b, ~_LOW_LANE, out=other))
        pair[:, 1] = lane.view(torch.complex128)
    return out.view(torch.uint8).view(count // 2, columns, 2 * half)


def product(x: Tensor, held: Mapping[str, Tensor], grid: Grid) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    packed, scales = held["packed"], held["scales"]
    if len(rows) <= few_rows(4):
        columns, padded = x.shape[-1], scales.shape[1]
        flat = packed.view(padded, columns // 2)
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.to(torch.bfloat16).contiguous(), flat, columns // len(scales), scales
        )
    else:
        out = _by_tiles(rows.to(product_dtype()), packed, scales)
    return out[:, : len(grid.scale)].to(x.dtype).contiguous().view(*x.shape[:-1], len(grid.scale))


def values(held: Mapping[str, Tensor], grid: Grid) -> Tensor:
    found = order()
    assert found is not None
    turned = held["packed"].transpose(1, 2)
    nibbles = torch.empty(len(turned), found.block, grid.columns, dtype=torch.uint8)
    nibbles[:, found.low] = turned & 15
    nibbles[:, found.high] = turned >> 4
    return nibbles.view(-1, grid.columns)[: len(grid.scale)].view(torch.int8) - _OFFSET


def _interleaved(words: Tensor, found: Order) -> Tensor:
    """Words [rows, columns / 8], eight columns of a row each, as the operator's uint8 [blocks, columns, block / 2].

    Two rows meet in a byte by shifts of whole words; then words change places with rows, and their four bytes are
    taken apart. Bytes never move one by one, which would take ten times as long.
    """
    blocks = words.view(-1, found.block, words.shape[1])
    count, rows, width = blocks.shape
    low, high = blocks[:, found.low], blocks[:, found.high]
    even = (low & _LOW).bitwise_or_((high & _LOW) << 4)
    odd = ((low >> 4) & _LOW).bitwise_or_(high & ~_LOW)
    out = torch.empty(count, width, 4, 2, rows // 2 // _LANE, dtype=torch.complex128)
    for parity, pairs in enumerate((even, odd)):
        turned = pairs.transpose(1, 2).contiguous()
        lane = torch.empty(turned.shape, dtype=torch.uint8)
        for byte in range(4):
            lane.copy_(turned >> (8 * byte))
            out[:, :, byte, parity] = lane.view(torch.complex128)
    return out.view(torch.uint8).view(count, 8 * width, rows // 2)


def _operator_scales(grid: Grid, padded: int) -> Tensor:
    """Per group and row the scale and what a nibble of 8 stands for: `w = (nibble - 8) * scale + offset`."""
    scale, zero, columns = grid.scale, grid.zero_point, grid.columns
    group = next(size for size in _GROUPS if (columns // scale.shape[1]) % size == 0)
    repeats = columns // scale.shape[1] // group
    pairs = torch.zeros(columns // group, padded, 2, dtype=torch.bfloat16)
    pairs[:, : len(scale), 0] = scale.repeat_interleave(repeats, 1).t()
    if zero is not None:
        offset = -zero.to(torch.float32) * scale.to(torch.float32)
        pairs[:, : len(scale), 1] = offset.repeat_interleave(repeats, 1).t()
    return pairs


class _Buffers(NamedTuple):
    """What a tile passes through: lanes turned, nibbles, the decoded tile [columns, its rows / 2], its product."""

    turned: Tensor
    nibbles: Tensor
    decoded: Tensor
    result: Tensor

    @classmethod
    def make(cls, x: Tensor, blocks: int, half: int, unit: torch.dtype) -> _Buffers:
        columns = x.shape[1]
        return cls(
            torch.empty(columns, blocks, half // unit.itemsize, dtype=unit),
            torch.empty(columns, blocks * half, dtype=torch.uint8),
            torch.empty(columns, blocks * half, dtype=x.dtype),
            torch.empty(len(x), blocks * half, dtype=x.dtype),
        )


def _by_tiles(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x [rows, columns] times the weight's transpose, in x's dtype."""
    found = order()
    assert found is not None
    blocks, columns, half = packed.shape
    groups = len(scales)
    # Lanes of 16 bytes: turning [blocks, columns, half] into [columns, blocks * half] moves them whole, or in halves,
    # which takes three times as long, where the file has put them between.
    unit = torch.complex128 if packed.storage_offset() % _LANE == 0 else torch.int64
    lanes = packed.view(unit)
    factors = scales.view(groups, blocks, found.block, 2)
    out = torch.empty(len(x), blocks, found.block, dtype=x.dtype)
    some = tile_rows(columns, found.block) // found.block
    for tile in torch.arange(blocks).split(some):
        part = slice(int(tile[0]), int(tile[-1]) + 1)
        if part.start == 0 or len(tile) < some:
            turned, nibbles, decoded, result = _Buffers.make(x, len(tile), half, unit)
        turned.copy_(lanes[part].transpose(0, 1))
        pairs = turned.view(columns, -1).view(torch.uint8)
        for which in (found.low, found.high):
            if which is found.low:
                torch.bitwise_and(pairs, 15, out=nibbles)
            else:
                torch.bitwise_right_shift(pairs, 4, out=nibbles)
            # Here, where it is exact: as a part of the offset it would cost bf16 the digits of weights near zero.
            decoded.copy_(nibbles.sub_(_OFFSET).view(torch.int8))
            scale, offset = factors[:, part, which].reshape(groups, 1, -1, 2).to(x.dtype).unbind(-1)
            grouped = decoded.view(groups, columns // groups, -1)
            torch.addcmul(offset.contiguous(), grouped, scale.contiguous(), out=grouped)
            torch.mm(x, decoded, out=result)
            out[:, part, which] = result.view(len(x), len(tile), half)
    return out.view(len(x), -1)


def _progression(numbers: list[int]) -> slice | None:
    step = numbers[1] - numbers[0]
    stop = numbers[0] + step * len(numbers)
    return slice(numbers[0], stop, step) if step > 0 and numbers == list(range(numbers[0], stop, step)) else None
