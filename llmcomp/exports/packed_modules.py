"""Modules that stand in a model for its packed weights while it is traced for ONNX, and mean the same in torch.

torch.onnx would otherwise see dense products and leave it to a search for initializers to find out which of them is
which weight. Here a module writes its own nodes (`torch.onnx.ops.symbolic`) from the checkpoint's integers, scales and
zero points, so nothing is looked for and nothing is rounded again; and no dense copy of a packed weight is made.

`mode` says what a forward computes:

    TRACE      the nodes; in torch the result has the right shape and no meaning
    DECODED    products with the weight, decoded in float32 as the nodes do
    AS_STORED  as readers of the checkpoint compute: the weight decoded in its own dtype, and inputs rounded where its
               scheme says so

The last two read the weight anew for each forward, one at a time.

MatMulNBits, com.microsoft: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcomp import packing
from llmcomp.activations import STEPS, quantized
from llmcomp.weights import QuantizedWeight, dequantize

TRACE, DECODED, AS_STORED = "trace", "decoded", "as stored"
Read = Callable[[], QuantizedWeight]

STORED_BITS = {2: 2, 3: 4, 4: 4, 8: 8}  # bits of a scheme → those that onnxruntime has a kernel for
BLOCKS = (128, 64, 32, 16)  # for one scale a row: the largest that divides it; each repeats the scale
# onnxruntime rounds the inputs of each block to 8 bits and multiplies integers. On an AVX2 CPU at 768 × 768 that is
# 0.06 ms a token against 0.15 (4 bits) and 1.2 ms (8 bits) at level 0, for an error of 0.7% of each product's output.
ACCURACY_LEVEL = 4
MIDDLE = 128  # int8 as uint8


@dataclass(frozen=True)
class Blocks:
    """A weight [out, in] as MatMulNBits takes it.

    Attributes:
        packed: uint8 [out, blocks, block * bits / 8], unsigned values, the first in the lowest bits.
        scales: float32 [out, blocks].
        zeros: uint8 [out, ceil(blocks * bits / 8)], packed likewise, or None where all are 2^(bits - 1).
        bits: 2, 4 or 8.
        block: values that share a scale; the last block of a row is filled up with its zero point.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    block: int


def blocks_of(weight: QuantizedWeight, least_bits: int = 2) -> Blocks:
    """The same integers, scales and zero points; 3 bits in the space of 4, one scale a row once for each block.

    Args:
        least_bits: 2, or 4 for a runtime that has no kernel for fewer.
    """
    rows, columns = weight.shape
    bits = max(STORED_BITS[weight.scheme.bits], least_bits)
    block = weight.scheme.group_size or next((size for size in BLOCKS if columns % size == 0), BLOCKS[-1])
    count = -(-columns // block)
    scales = weight.scale.float().expand(rows, count).contiguous()
    zero = weight.zero_point
    filling = torch.zeros(rows, 1, dtype=torch.int8) if zero is None else zero[:, -1:]
    values = torch.cat((weight.values, filling.expand(rows, count * block - columns)), 1)
    packed = packing.pack(values, bits).view(torch.uint8).view(rows, count, block * bits // 8)
    zeros = None
    if zero is not None:
        words = packing.pack(zero.expand(rows, count), bits).view(torch.uint8)
        zeros = words[:, : -(-count * bits // 8)].contiguous()
    return Blocks(packed, scales, zeros, bits, block)


def decoded(weight: QuantizedWeight, mode: str) -> Tensor:
    """float32 [out, in], in AS_STORED with the rounding of the checkpoint's own dtype."""
    if mode == AS_STORED:
        return weight.dense().float()
    return dequantize(weight.values, weight.scale.float(), weight.zero_point)


class NBitsLinear(nn.Module):
    """A linear as one MatMulNBits."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(self, read: Read, bias: Tensor | None, blocks: Blocks | None = None) -> None:
        """`blocks`: those of an embedding that shares its weight with this head, so that they are stored once."""
        super().__init__()
        self.mode = AS_STORED
        self.read = read
        weight = read()
        self.scheme, (self.rows, self.columns) = weight.scheme, weight.shape
        self.blocks = blocks or blocks_of(weight)
        self.register_buffer("weight_packed", self.blocks.packed)
        self.register_buffer("weight_scale", self.blocks.scales)
        self.register_buffer("weight_zero_point", self.blocks.zeros)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.mode == TRACE:
            found = self._nodes(inputs)
            return found if self.bias is None else found + self.bias
        return F.linear(inputs, decoded(self.read(), self.mode), self.bias)

    def _nodes(self, inputs: Tensor) -> Tensor:
        weight = [self.weight_packed, self.weight_scale]
        if self.blocks.zeros is not None:
            weight.append(self.weight_zero_point)
        attributes: dict[str, Any] = {
            "K": self.columns,
            "N": self.rows,
            "bits": self.blocks.bits,
            "block_size": self.blocks.block,
            "accuracy_level": ACCURACY_LEVEL,
        }
        shape = [*inputs.shape[:-1], self.rows]
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits", [inputs, *weight], attributes, dtype=inputs.dtype, shape=shape, version=1
        )


class RoundedLinear(nn.Module):
    """A linear with 8-bit weights of one scale a row, whose inputs are rounded, too: one product of integers.

    Inputs get one scale a token, |x|max / 127.5, as the checkpoint's `int8-dynamic` means it, or the checkpoint's own
    `input_scale`. ONNX's DynamicQuantizeLinear has one scale for a whole batch instead, so that a text's result would
    depend on what else is in the batch, and one loud token would cost all others their precision; on an AVX2 CPU it
    takes 0.85 to 0.92 of this one's time (768 × 768 to 3072 × 768, 128 and 1024 tokens).

    Weights are written as uint8 around 128, not as int8: onnxruntime's product of uint8 with int8 adds pairs in 16 bits
    where a CPU has AVX2 and no VNNI, and saturates (an error of 11% of the outputs at full range).
    """

    weight_quantized: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    input_zero_point: Tensor

    def __init__(self, read: Read, bias: Tensor | None) -> None:
        super().__init__()
        self.mode = AS_STORED
        self.read = read
        weight = read()
        self.scheme, (self.rows, self.columns) = weight.scheme, weight.shape
        shifted = weight.values.view(torch.uint8) + MIDDLE  # modulo 256
        self.register_buffer("weight_quantized", shifted.t().contiguous())
        self.register_buffer("weight_scale", weight.scale.float().view(-1))
        zero = torch.zeros((), dtype=torch.int8) if weight.zero_point is None else weight.zero_point.view(-1)
        self.register_buffer("weight_zero_point", zero.view(torch.uint8) + MIDDLE)
        self.register_buffer("input_zero_point", torch.tensor(MIDDLE, dtype=torch.uint8))
        self.input_scale = None if weight.input_scale is None else float(weight.input_scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.mode == TRACE:
            found = self._nodes(inputs.reshape(-1, self.columns)).reshape(*inputs.shape[:-1], self.rows)
            return found if self.bias is None else found + self.bias
        if self.mode == AS_STORED and self.scheme.activations is not None:
            tokens = inputs.reshape(1, -1, self.columns)  # always by token, as the nodes do
            scale = None if self.input_scale is None else torch.tensor([self.input_scale])
            inputs = quantized(tokens, scale).reshape(inputs.shape)
        return F.linear(inputs, decoded(self.read(), self.mode), self.bias)

    def _nodes(self, tokens: Tensor) -> Tensor:
        """[tokens, in] → [tokens, out]"""
        make = torch.onnx.ops.symbolic
        if self.input_scale is None:
            scale = tokens.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / STEPS
        else:
            scale = torch.full(tokens.shape[:1], self.input_scale)
        zero = torch.full(tokens.shape[:1], MIDDLE, dtype=torch.uint8)
        rounded = make(
            "QuantizeLinear", [tokens, scale, zero], {"axis": 0}, dtype=torch.uint8, shape=list(tokens.shape)
        )
        factors = [rounded, self.weight_quantized, self.input_zero_point, self.weight_zero_point]
        sums = make("MatMulInteger", factors, dtype=torch.int32, shape=[tokens.shape[0], self.rows])
        return sums.float() * scale.unsqueeze(1) * self.weight_scale


class NBitsEmbedding(nn.Module):
    """An embedding whose packed rows are looked up and then decoded, in ONNX's plain operators."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero: Tensor | None

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.mode = AS_STORED
        self.read = read
        weight = read()
        self.scheme, self.columns = weight.scheme, weight.shape[1]
        self.blocks = blocks_of(weight)
        self.register_buffer("weight_packed", self.blocks.packed)
        self.register_buffer("weight_scale", self.blocks.scales)
        zero = weight.zero_point  # one byte each: MatMulNBits packs them, for rows that it reads whole
        every = None if zero is None else zero.expand_as(self.blocks.scales).float()
        self.register_buffer("weight_zero", every)

    def forward(self, ids: Tensor) -> Tensor:
        if self.mode == TRACE:
            return self._decoded(ids)
        weight, rows = self.read(), ids.reshape(-1)
        zero = None if weight.zero_point is None else weight.zero_point[rows]
        found = replace(weight, values=weight.values[rows], scale=weight.scale[rows], zero_point=zero)
        return decoded(found, self.mode).view(*ids.shape, -1)

    def _decoded(self, ids: Tensor) -> Tensor:
        bits, step, rows = self.blocks.bits, float(1 << self.blocks.bits), ids.reshape(-1)
        # Shifts in float32, which is exact for bytes: not every runtime shifts uint8.
        places = torch.tensor([float(1 << (bits * place)) for place in range(8 // bits)])
        shifted = torch.floor(self.weight_packed.index_select(0, rows).float().unsqueeze(-1) / places)
        values = (shifted - step * torch.floor(shifted / step)).flatten(-2) - step / 2  # [rows, blocks, block]
        if self.weight_zero is not None:
            values = values - self.weight_zero.index_select(0, rows).unsqueeze(-1)
        decoded = (values * self.weight_scale.index_select(0, rows).unsqueeze(-1)).flatten(-2)[:, : self.columns]
        return decoded.reshape(*ids.shape, self.columns)


PACKED_MODULES = (NBitsLinear, RoundedLinear, NBitsEmbedding)


def set_mode(model: nn.Module, mode: str) -> None:
    """Let every packed module compute in that mode."""
    for module in model.modules():
        if isinstance(module, PACKED_MODULES):
            module.mode = mode
