"""Products with packed weights: one table, of which a weight takes the first row that fits.

A kernel lays a weight out once, when a checkpoint is loaded, and multiplies from then on. Few rows of inputs (a token
that is decoded) are bound by the bytes of the weight, so they go to torch's operators on packed integers; those cost
as much again for each further row, so many rows (a prompt) are multiplied with weights decoded a tile at a time, in
the type that the machine multiplies fastest (`llmcomp.kernels.tiles`).

Milliseconds of a product of [rows, 2048] with a weight [2048, 2048], as `python -m evals.kernels --threads 1` printed
them on an EPYC with AVX2 only (it prints this table for any machine):

    rows   dense float32   dense bf16   int4pack   int4 by tiles   int8pack   int8 by tiles   _int_mm
       1            1.13         1.10       0.79           10.02       0.75            1.53      4.47
      16            4.96        13.40       5.04           10.54       4.69            4.45     63.46
      32            6.68        26.02       9.64           13.85       8.46            6.63    129.31
      64           10.89        52.05      19.23           18.72      17.25           10.19    276.12
      96           16.38        81.83      27.36           24.58      25.62           15.16    424.00
     128           16.67       107.63      41.10           26.80      33.79           18.64    536.72

Where tiles take over is `tiles.few_rows`: between 16 and 32 rows for INT8, near 64 for INT4; in wider weights earlier
(`--size 4096`: 64 rows of INT4 took 67.8 by tiles and 87.8 packed).
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
