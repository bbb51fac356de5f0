"""GGUF's blocks decoded one weight at a time in float64, as llama.cpp's ggml-common.h lays them out."""

from __future__ import annotations

import struct


def decode_row(kind: str, row: bytes) -> list[float]:
    """One row of blocks of 32 weights."""
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    assert len(row) % size == 0
    return [w for start in range(0, len(row), size) for w in _decode_block(kind, row[start : start + size])]


def _decode_block(kind: str, block: bytes) -> list[float]:
    if kind == "Q8_0":
        (d,) = struct.unpack_from("<e", block)
        return [d * q for q in struct.unpack_from("<32b", block, 2)]
    if kind == "Q4_0":
        (d,), m, nibbles = struct.unpack_from("<e", block), None, block[2:]
    else:
        (d, m), nibbles = struct.unpack_from("<ee", block), block[4:]
    integers = [byte & 15 for byte in nibbles] + [byte >> 4 for byte in nibbles]
    return [d * (q - 8) if m is None else d * q + m for q in integers]


def neighbours(rows: list[list[float]], heads: int) -> list[list[float]]:
    """Rows of q or k in llama.cpp's order: feature i of a head's first half, then feature i of its second."""
    size = len(rows) // heads
    ordered = []
    for head in range(heads):
        for i in range(size // 2):
            ordered += [rows[head * size + i], rows[head * size + size // 2 + i]]
    return ordered
