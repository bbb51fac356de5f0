"""Integers of 2, 3, 4 or 8 bits in 32-bit words, those of 4 bits in blocks of rows as well, and back; and numbers of up
to 8 bits, such as places in a group, in bytes.

Words: the layout is that of compressed-tensors' `pack-quantized`: value i of a row, shifted into [0, 2^bits), stands
at bits [i * bits, (i + 1) * bits) of the row's words, least significant bit first, with no bit wasted; only a
row's last word is filled up with zeros. compressed-tensors' own `pack_to_int32` makes the same words through
int32 copies and index tensors, ten bytes and more for each value; this one works on bytes, because eight
values fill exactly `bits` bytes. Words are little-endian in memory, as in every safetensors file.

Blocks: the order in which torch's CPU operator for 4 bits reads a weight where vectors have eight lanes (AVX2), and
from which that for sixteen (AVX512) is two shifts away, so that a file can be mapped and computed with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # rows
_OFFSET = 8  # a nibble holds the integer plus this
# Widths that no byte is a multiple of: eight numbers fill `bits` bytes, which this word has room for.
_ACROSS = {3: torch.int32, 5: torch.int64, 6: torch.int64, 7: torch.int64}


def words(count: int, bits: int) -> int:
    """32-bit words that `count` integers of `bits` bits take."""
    return -(-count * bits // 32)


def pack(values: Tensor, bits: int, dim: int = 1) -> Tensor:
    """Pack signed integers.

    Args:
        values: int8 [rows, columns], each in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2, 3, 4 or 8.
        dim: 1 packs each row, 0 packs each column (compressed-tensors does so with zero points).

    Returns:
        int32 [rows, words(columns, bits)], or [words(rows, bits), columns] for dim=0.
    """
    if dim == 0:
        return pack(values.t(), bits).t().contiguous()
    rows, columns = values.shape
    unsigned = F.pad(values.contiguous().view(torch.uint8), (0, -columns % 32), value=256 - (1 << (bits - 1)))
    unsigned += 1 << (bits - 1)  # modulo 256: the signed value's bit pattern, shifted into [0, 2^bits)
    packed = _bytes_from_values(unsigned.view(-1), bits)
    return packed.view(torch.int32).view(rows, -1)[:, : words(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int, dim: int = 1) -> Tensor:
    """Undo `pack`.

    Args:
        packed: int32, as `pack` returns it.
        bits: 2, 3, 4 or 8.
        count: integers along `dim` before packing.
        dim: the dimension that was packed.

    Returns:
        int8 [rows, count], or [count, columns] for dim=0.
    """
    if dim == 0:
        return unpack(packed.t(), bits, count).t().contiguous()
    spare = -packed.shape[1] % bits
    padded = F.pad(packed, (0, spare)) if spare else packed.contiguous()  # a padding of nothing is a copy
    values = _values_from_bytes(padded.view(-1).view(torch.uint8), bits).view(packed.shape[0], -1)
    signed = values[:, :count].view(torch.int8)
    if bits == 8 or signed.numel() < values.numel():  # bits of 8 are the words' own memory
        return signed.sub(1 << (bits - 1)).contiguous()
    return signed.sub_(1 << (bits - 1))


def pack_blocks(values: Tensor) -> Tensor:
    """Integers of 4 bits, int8 [rows, columns] with rows a multiple of 32, as uint8 [rows / 32, columns, 16].

    Byte j of a column holds row j of the block in its low nibble and row 16 + j in its high one, each plus 8.
    """
    halves = (values.view(torch.uint8) + _OFFSET).view(-1, 2, BLOCK // 2, values.shape[1])
    return (halves[:, 1] << 4).bitwise_or_(halves[:, 0]).transpose(1, 2).contiguous()


def unpack_blocks(packed: Tensor) -> Tensor:
    """Undo `pack_blocks`."""
    turned = packed.transpose(1, 2).contiguous()
    values = torch.stack((turned & 15, turned >> 4), 1).view(-1, packed.shape[1])
    return values.view(torch.int8).sub_(_OFFSET)


def pack_bytes(numbers: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] below 2^bits to uint8 [rows, ⌈columns * bits / 8⌉]: number i of a row at bits
    [i * bits, (i + 1) * bits) of its bytes, least significant first."""
    rows, columns = numbers.shape
    padded = F.pad(numbers, (0, -columns % 8)) if columns % 8 else numbers.contiguous()
    packed = _bytes_from_values(padded.view(-1), bits).view(rows, -1)
    return packed[:, : -(-columns * bits // 8)].contiguous()


def unpack_bytes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_bytes`: uint8 [rows, count]."""
    padded = F.pad(packed, (0, -packed.shape[1] % bits)) if packed.shape[1] % bits else packed.contiguous()
    return _values_from_bytes(padded.view(-1), bits).view(len(packed), -1)[:, :count]


def _bytes_from_values(unsigned: Tensor, bits: int) -> Tensor:
    """uint8 [n] below 2^bits, n a multiple of 8, to uint8 [n * bits / 8]."""
    if bits == 8:
        return unsigned
    if bits in _ACROSS:
        octets = unsigned.view(-1, 8)
        word = torch.zeros(len(octets), dtype=_ACROSS[bits], device=unsigned.device)
        for place in range(7, -1, -1):
            word = word.bitwise_left_shift_(bits).bitwise_or_(octets[:, place])
        return word.view(torch.uint8).view(len(octets), -1)[:, :bits].reshape(-1)
    per_byte = 8 // bits
    parts = unsigned.view(-1, per_byte)
    packed = parts[:, per_byte - 1].clone()
    for place in range(per_byte - 2, -1, -1):
        packed.bitwise_left_shift_(bits).bitwise_or_(parts[:, place])
    return packed


def _values_from_bytes(packed: Tensor, bits: int) -> Tensor:
    """Undo `_bytes_from_values`."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    if bits in _ACROSS:
        word = F.pad(packed.view(-1, bits), (0, _ACROSS[bits].itemsize - bits)).view(_ACROSS[bits])  # [n / 8, 1]
        return torch.cat([(word >> (bits * place) & mask).to(torch.uint8) for place in range(8)], -1)
    values = torch.empty(len(packed), 8 // bits, dtype=torch.uint8, device=packed.device)
    for place in range(8 // bits):
        torch.bitwise_and(packed if place == 0 else packed >> (bits * place), mask, out=values[:, place])
    return values
