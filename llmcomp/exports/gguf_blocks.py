"""GGUF's blocks of 32 weights, made of integers and scales as they are: no integer is rounded anew.

    Q4_0   d (float16), 32 values of 4 bits:     w = d * (n - 8),  n in [0, 15]
    Q4_1   d, m (float16), 32 values of 4 bits:  w = d * n + m
    Q8_0   d (float16), 32 int8:                 w = d * n

Value i of a block of 4 bits is the low half of byte i, value i + 16 its high half (ggml-quants.c of llama.cpp). What
changes is the scale, which GGUF holds as float16; `Rounding` says by how much.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmcomp.schemes import Scheme
from llmcomp.weights import QuantizedWeight

BLOCK = 32
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


@dataclass(frozen=True)
class Rounding:
    """What float16 has made of the scales of weights that are not all zero.

    Attributes:
        scales: how many there are.
        changed: how many of them float16 does not hold exactly.
        largest: largest relative change of a scale.
        offset: largest change of an offset m, in steps of its scale; 0 without offsets.
    """

    scales: int = 0
    changed: int = 0
    largest: float = 0.0
    offset: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            self.scales + other.scales,
            self.changed + other.changed,
            max(self.largest, other.largest),
            max(self.offset, other.offset),
        )


def kind_of(scheme: Scheme, columns: int) -> str | None:
    """The blocks that hold weights [out, columns] of this scheme exactly, but for float16 scales, or None.

    Zero points of 2 and 3 bits are subtracted: differences of such integers fit into the 4 bits of Q4_0. Those of
    4 bits need five, so they go with an offset; those of 8 bits need nine, which no kind has.
    """
    if columns % BLOCK:
        return None
    if scheme.bits == 8:
        return "Q8_0" if scheme.symmetric else None
    return "Q4_0" if scheme.symmetric or scheme.bits < 4 else "Q4_1"


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of one row of `columns` weights."""
    return columns // BLOCK * BLOCK_BYTES[kind]


def pack(weight: QuantizedWeight) -> tuple[np.ndarray, Rounding]:
    """A weight [out, in] as blocks: uint8 [out, row_bytes].

    Raises:
        ValueError: no kind of block holds it (`kind_of`), or a scale that is not finite in float16.
    """
    rows, columns = weight.shape
    kind = kind_of(weight.scheme, columns)
    if kind is None:
        raise ValueError(f"no block holds {weight.scheme.label} weights in rows of {columns}")
    values, zero = weight.values, weight.zero_point
    used = _used(values, zero, weight.scale.shape[1])
    scale = weight.scale.to(torch.float16)
    rounding = _rounding(weight.scale, scale, used)
    if zero is not None and kind == "Q4_0":
        values, zero = values - _by_weight(zero, columns), None
    parts = [_halves(scale, columns)]
    if kind == "Q4_1":
        assert zero is not None
        exact = (weight.scheme.qmin - zero.double()) * scale.double()
        offset = exact.to(torch.float16)
        steps = torch.where(used & (scale != 0), (offset.double() - exact).abs() / scale.double().abs(), 0.0)
        rounding += Rounding(offset=float(steps.max()))
        parts.append(_halves(offset, columns))
    if not all(np.isfinite(part.view(np.float16)).all() for part in parts):
        raise ValueError("it has a scale that float16 does not hold")
    blocks = values.reshape(rows, columns // BLOCK, BLOCK)
    if kind == "Q8_0":
        parts.append(blocks.numpy().view(np.uint8))
    else:
        lowest = weight.scheme.qmin if kind == "Q4_1" else -8
        shifted = (blocks - lowest).numpy().view(np.uint8)
        parts.append(shifted[..., : BLOCK // 2] | shifted[..., BLOCK // 2 :] << np.uint8(4))
    return np.concatenate(parts, axis=-1).reshape(rows, row_bytes(kind, columns)), rounding


def _by_weight(groups: Tensor, columns: int) -> Tensor:
    """[out, groups] → [out, columns]."""
    return groups.repeat_interleave(columns // groups.shape[1], dim=1)


def _halves(groups: Tensor, columns: int) -> np.ndarray:
    """float16 [out, groups] → its bytes for each block, uint8 [out, blocks, 2]."""
    blocks = columns // BLOCK
    repeated = groups.repeat_interleave(blocks // groups.shape[1], dim=1).contiguous()
    return repeated.numpy().view(np.uint8).reshape(groups.shape[0], blocks, 2)


def _used(values: Tensor, zero: Tensor | None, groups: int) -> Tensor:
    """Which groups [out, groups] hold a weight that is not zero."""
    grouped = values.reshape(values.shape[0], groups, -1)
    if zero is None:
        return grouped.ne(0).any(-1)
    return grouped.ne(zero.unsqueeze(-1)).any(-1)


def _rounding(scale: Tensor, half: Tensor, used: Tensor) -> Rounding:
    exact, rounded = scale.double()[used], half.double()[used]
    changed = exact != rounded
    if not changed.any():
        return Rounding(scales=exact.numel())
    largest = float(((rounded - exact).abs() / exact.abs())[changed].max())
    return Rounding(exact.numel(), int(changed.sum()), largest)
