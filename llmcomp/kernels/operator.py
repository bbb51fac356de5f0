"""The product with a packed weight as one operator of torch, for `torch.compile`: traced through, every kernel would
ask the machine what it is in the middle of a graph, and break it there. Outside of graphs it only costs time: torch
takes a tenth of a millisecond to call an operator that is written in Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcomp.kernels import KERNELS, Held
from llmcomp.kernels.tiles import Grid
from llmcomp.schemes import Scheme
from llmcomp.weights import QuantizedWeight

# A grid, flat, as an operator's schema wants it.
_GRID = "int columns, int bits, int? group_size, bool symmetric, str? activations"
_WEIGHT = f"str kernel, str[] names, Tensor[] held, Tensor scale, Tensor? zero_point, Tensor? input_scale, {_GRID}"
torch.library.define("llmcomp::product", f"(Tensor x, {_WEIGHT}) -> Tensor")
torch.library.define("llmcomp::decoded", f"({_WEIGHT}) -> Tensor")


def product(x: Tensor, kernel: str, held: Held, grid: Grid) -> Tensor:
    """`x W'` of x [..., columns] by the kernel of that name, with gradients for x alone."""
    out: Tensor = torch.ops.llmcomp.product(x, *_flat(kernel, held, grid))
    return out


def _flat(kernel: str, held: Held, grid: Grid) -> tuple[Any, ...]:
    scheme = grid.scheme
    return (
        kernel, list(held), list(held.values()), grid.scale, grid.zero_point, grid.input_scale, grid.columns,
        scheme.bits, scheme.group_size, scheme.symmetric, scheme.activations,
    )  # fmt: skip


def _weight(
    kernel: str, names: list[str], held: list[Tensor], scale: Tensor, zero_point: Tensor | None,
    input_scale: Tensor | None, columns: int, *scheme: Any,
) -> tuple[str, Held, Grid]:  # fmt: skip
    """The inverse of `_flat`."""
    grid = Grid(Scheme(*scheme), columns, scale, zero_point, input_scale)
    return kernel, dict(zip(names, held, strict=True)), grid


@torch.library.impl("llmcomp::product", "CompositeExplicitAutograd")
def _product(x: Tensor, *flat: Any) -> Tensor:
    kernel, held, grid = _weight(*flat)
    return KERNELS[kernel].product(x, held, grid)


@torch.library.register_fake("llmcomp::product")
def _(x: Tensor, *flat: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(flat[3]))


@torch.library.impl("llmcomp::decoded", "CompositeExplicitAutograd")
def _decoded(*flat: Any) -> Tensor:
    kernel, held, grid = _weight(*flat)
    return QuantizedWeight(KERNELS[kernel].values(held, grid), grid.scale, grid.zero_point, grid.scheme).dense()


@torch.library.register_fake("llmcomp::decoded")
def _(*flat: Any) -> Tensor:
    return flat[3].new_empty(len(flat[3]), flat[6])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.flat = inputs[1:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    weight = torch.ops.llmcomp.decoded(*ctx.flat)
    held = ctx.flat[2]
    return gradient @ weight.to(gradient.dtype), None, None, [None] * len(held), *[None] * (len(ctx.flat) - 3)


torch.library.register_autograd("llmcomp::product", _backward, setup_context=_remember)
