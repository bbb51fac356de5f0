"""Products with packed weights: one table, of which a weight takes the first row that fits.

A kernel lays a weight out once, when a checkpoint is loaded, and multiplies from then on. Few rows of inputs (a token
that is decoded) are bound by the bytes of the weight, so they go to torch's operators on packed integers; those cost
as much again for each further row, so many rows (a prompt) are multiplied with weights decoded a tile at a time, in
the type that the machine multiplies fastest (`llmcomp.kernels.tiles`).

Milliseconds of a product of [rows, 2048] with a weight [2048, 2048], one thread of an EPYC with AVX2 only, and why the
change is where it is (`python -m evals.kernels`, which prints this table for another machine):

    rows      dense float32   dense bf16   int4pack   int8pack   _int_mm   int4 by tiles
       1               0.8          0.9        0.6        0.7        4.5             3.0
      16               3.8           13        4.0        4.4         71             5.0
      32               5.7           30        9.9        8.4        166             5.7
     128                15          116         46         39        584              16
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from llmcomp.kernels import int4, int8, plain, rounded
from llmcomp.kernels.tiles import Grid
from llmcomp.schemes import Scheme

Held = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kernel:
    """One way to keep a weight and to multiply with it.

    Attributes:
        fits: (scheme, rows, columns, device type) → whether it takes such a weight [rows, columns].
        hold: (integers as a file holds them, in any form of `llmcomp.native`; grid) → what is kept of a weight besides
            its grid, on the same device. It may be the very tensor that was given.
        product: (inputs [..., columns], what is held, grid) → [..., rows] in the inputs' dtype.
        values: (what is held, grid) → the integers int8 [rows, columns] that `hold` was given.
    """

    fits: Callable[[Scheme, int, int, str], bool]
    hold: Callable[[Tensor, Grid], dict[str, Tensor]]
    product: Callable[[Tensor, Held, Grid], Tensor]
    values: Callable[[Held, Grid], Tensor]


KERNELS: dict[str, Kernel] = {
    "a8": Kernel(rounded.fits, rounded.hold, rounded.product, rounded.values),
    "int4": Kernel(int4.fits, int4.hold, int4.product, int4.values),
    "int8": Kernel(int8.fits, int8.hold, int8.product, int8.values),
    "plain": Kernel(plain.fits, plain.hold, plain.product, plain.values),
}


def kernel_for(scheme: Scheme, rows: int, columns: int, device: str) -> str:
    """The name of the first kernel that takes such a weight."""
    return next(name for name, kernel in KERNELS.items() if kernel.fits(scheme, rows, columns, device))
