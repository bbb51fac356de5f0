"""Weights that are trained while products see them on a grid: quantization-aware training.

What is trained is a latent weight W, floating; what the model computes with is what a reader of the checkpoint will
decode,

    Ŵ = (clamp(round(W / s) + z, qmin, qmax) - z) s

in the scale's own dtype, to the bit (`llmcomp.methods._grid.round_to`, `llmcomp.weights.dequantize`). Scales and zero
points are those of the checkpoint. On the way back rounding is taken for the identity (the straight-through estimator,
arXiv:1308.3432), and clamping for what it is, with one exception: a weight beyond an end of its grid gets the gradients
that lead back, or it would never come back. Scales may learn as well, each by a factor e^t from t = 0, with LSQ's
gradient (arXiv:1902.08153, equation 3); so none changes its sign, which on a symmetric grid says which side has one
point more.

A weight starts where the dense model had it, as far as that lies in the cell of its integer, so that the first forward
is the checkpoint's own; without the dense model in the middle of the cell.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcomp.activations import quantized as rounded_inputs
from llmcomp.methods._grid import Grid, round_to
from llmcomp.packed import PackedEmbedding, PackedIntegers
from llmcomp.weights import QuantizedWeight, dequantize

_CELL = 0.499  # of a step to each side of a grid point; 0.5 would round either way


class OnGrid(torch.autograd.Function):
    """Ŵ of W, as the head of this file has it."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, stretch: Tensor | None, grid: Grid, mask: Tensor | None) -> Tensor:
        """latent float32 [out, in]; stretch float32 [out, groups]; mask bool [out, in], False for zero."""
        grid = stretched(grid, stretch)
        values = round_to(latent, grid)
        ctx.save_for_backward(latent, values, mask)
        ctx.grid, ctx.learned = grid, stretch is not None
        dense = dequantize(values, grid.scale, grid.zero_point).float()
        return dense if mask is None else torch.where(mask, dense, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        latent, values, mask = ctx.saved_tensors
        gradient, grid = gradients[0].float(), ctx.grid
        if mask is not None:
            gradient = torch.where(mask, gradient, 0)
        scheme, groups = grid.scheme, grid.scale.shape[1]
        shape = (len(latent), groups, -1)
        scale = grid.scale.float().unsqueeze(-1)
        zero = 0 if grid.zero_point is None else grid.zero_point.float().unsqueeze(-1)
        steps = latent.view(shape) / scale  # from zero
        low, high = steps + zero < scheme.qmin - 0.5, steps + zero > scheme.qmax + 0.5
        inside, own = ~(low | high), gradient.view(shape)
        # A step of descent changes `steps` by minus this one's sign.
        slope = own * scale.sign()
        passed = torch.where(inside | (low & (slope < 0)) | (high & (slope > 0)), own, 0).view(latent.shape)
        if not ctx.learned:
            return passed, None, None, None
        points = values.view(shape).float() - zero
        slopes = torch.where(inside, points - steps, points) * own
        return passed, slopes.sum(-1) * scale.squeeze(-1), None, None


def stretched(grid: Grid, stretch: Tensor | None) -> Grid:
    """The grid with each scale times e^t, rounded to the dtype that it is stored in."""
    if stretch is None:
        return grid
    return Grid((grid.scale.float() * stretch.detach().exp()).to(grid.scale.dtype), grid.zero_point, grid.scheme)


def in_their_cells(source: Tensor, weight: QuantizedWeight) -> Tensor:
    """A dense weight [out, in] moved as little as it takes to be rounded to the integers of `weight`; float32."""
    shape = (len(source), weight.scale.shape[1], -1)
    scale = weight.scale.float().unsqueeze(-1)
    zero = 0 if weight.zero_point is None else weight.zero_point.float().unsqueeze(-1)
    points = weight.values.view(shape).float() - zero
    steps = (source.float().reshape(shape) / scale).clamp(points - _CELL, points + _CELL)
    return (steps * scale).view(source.shape)


class _Through(torch.autograd.Function):
    """Inputs as a reader rounds them; gradients pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, scale: Tensor | None) -> Tensor:
        return rounded_inputs(inputs, scale).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Latent(nn.Module):
    """In the place of a packed module of integers, while it is trained. `settle` ends that.

    Args:
        weight: the integers that it starts from.
        packed: what stood in its place; bias and what embeddings multiply by stay.
        source: the dense weight [out, in] that was quantized, None where it is gone.
        mask: bool [out, in], False for weights that stay zero; of a `weight` with a pattern its own.
        learn_scales: whether scales are trained as well.
    """

    scale: Tensor
    zero_point: Tensor | None
    mask: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self, weight: QuantizedWeight, packed: Any, source: Tensor | None, mask: Tensor | None, learn_scales: bool
    ) -> None:
        super().__init__()
        self.scheme, self.pattern, self.transposed = weight.scheme, weight.pattern, packed.transposed
        self.out_features, self.in_features = weight.shape
        start = weight.dense() if source is None else source
        self.latent: nn.Parameter | None = nn.Parameter(in_their_cells(start, weight))
        self.stretch = nn.Parameter(torch.zeros(weight.scale.shape)) if learn_scales else None
        kept = {"scale": weight.scale, "zero_point": weight.zero_point, "mask": mask}
        for name, tensor in {**kept, "input_scale": weight.input_scale}.items():
            self.register_buffer(name, None if tensor is None else tensor.clone(), persistent=False)
        self._settled: QuantizedWeight | None = None

    @property
    def grid(self) -> Grid:
        """With its scales as they are now."""
        return stretched(Grid(self.scale, self.zero_point, self.scheme), self.stretch)

    @property
    def weight(self) -> Tensor:
        """[out, in], on the grid."""
        if self._settled is not None:
            return self._settled.dense()
        on_grid: Tensor = OnGrid.apply(self.latent, self.stretch, Grid(self.scale, self.zero_point, self.scheme),
                                       self.mask)  # fmt: skip
        return on_grid

    def quantized(self) -> QuantizedWeight:
        """The integers that it computes with."""
        if self._settled is not None:
            return self._settled
        assert self.latent is not None  # not settled
        grid = self.grid
        values = round_to(self.latent.detach(), grid)
        if self.mask is not None:
            zero = torch.zeros_like(grid.scale, dtype=torch.int8) if grid.zero_point is None else grid.zero_point
            values = torch.where(self.mask, values, zero.repeat_interleave(self.in_features // zero.shape[1], 1))
        # Of a mask without a pattern nothing is said in the file.
        mask = None if self.pattern is None else self.mask
        return QuantizedWeight(
            values, grid.scale, grid.zero_point, self.scheme, self.input_scale, self.pattern, mask
        )

    def settle(self) -> None:
        """End the training: the weight is its integers from now on."""
        self._settled, self.latent, self.stretch = self.quantized(), None, None

    def dense(self) -> Tensor:
        """The decoded weight as the module that was replaced held it."""
        dense = self.quantized().dense()
        return dense.t() if self.transposed else dense

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.label}"


class LatentLinear(Latent):
    """Of a linear, or transformers' Conv1D."""

    def __init__(self, weight: QuantizedWeight, packed: Any, *rest: Any) -> None:
        super().__init__(weight, packed, *rest)
        self.bias: Any = packed.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.scheme.activations is not None:
            x = _Through.apply(x, self.input_scale)
        return F.linear(x, self.weight, self.bias)


class LatentEmbedding(Latent):
    """Of an embedding."""

    def __init__(self, weight: QuantizedWeight, packed: Any, *rest: Any) -> None:
        super().__init__(weight, packed, *rest)
        self.embed_scale: float | None = packed.embed_scale
        self.num_embeddings, self.embedding_dim = self.out_features, self.in_features

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight)
        return rows if self.embed_scale is None else rows * torch.tensor(self.embed_scale).to(rows)


def latent(
    weight: QuantizedWeight, packed: PackedIntegers, source: Tensor | None, mask: Tensor | None, learn_scales: bool
) -> Latent:
    """What trains a packed module's weight; arguments as of `Latent`."""
    kind = LatentEmbedding if isinstance(packed, PackedEmbedding) else LatentLinear
    return kind(weight, packed, source, mask, learn_scales)
