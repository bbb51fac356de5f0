"""What calibration knows of one linear's input. Every method reads the same statistics.

The Gram matrix X'X (half of GPTQ's Hessian 2 X'X / n, up to a factor that no method depends on) carries the
per-channel norms on its diagonal; maxima are kept beside it because no second moment holds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcomp.errors import NumericalError
from llmcomp.matmul import fast_matmul
from llmcomp.ranks import ALONE, World

_TILE = 256  # columns of a strip: only the strips' part right of the diagonal is computed
_STRIP = 2048  # columns that one product yields
_WIDENED = 2048  # tokens whose float32 copies are made at a time
WAITING = 2048  # tokens that wait in float32 for one product: the sum is read and written each time


@dataclass
class InputStats:
    """Sufficient statistics of the inputs X [tokens, in] of one linear, or of several that share them.

    Attributes:
        gram: float32 [in, in], X'X summed over tokens (padding excluded), symmetric. None once a method has
            factorized it in place, which for a wide layer saves the largest matrix there is.
        absmax: float32 [in], the largest |x| a channel has shown.
        diagonal: float32 [in], the Gram matrix's; it outlives the matrix.
        tokens: how many rows of X were summed.
        factor: what a method has made of the Gram matrix, for the next weight with the same input.
    """

    gram: Tensor | None
    absmax: Tensor
    diagonal: Tensor
    tokens: int
    factor: Any = None

    def scale_(self, scale: Tensor) -> None:
        """Make these the statistics of X diag(1 / scale), in place. scale: float32 [in], above zero."""
        assert self.gram is not None and self.factor is None  # nothing has been made of it yet
        self.gram /= scale
        self.gram /= scale.unsqueeze(1)
        self.absmax = self.absmax / scale
        self.diagonal = self.diagonal / scale.square()

    @property
    def norms(self) -> Tensor:
        """Euclidean norm of each input channel over all tokens, float32 [in]."""
        return self.diagonal.clamp_min(0).sqrt()


class GramAccumulator:
    """Sums X'X in float32 over batches of tokens, upper tiles only, mirrored once at the end.

    A bf16 product of bf16 inputs is rounded to eight bits of mantissa, so inputs are widened to float32 first;
    the product itself then takes the machine's fastest float32-accurate path.
    """

    def __init__(self) -> None:
        self._gram: Tensor | None = None
        self._waiting = torch.zeros(0, 0)  # [WAITING, in], of which the first `_filled` rows are not yet in the sum
        self._filled, self._bf16_values = 0, True
        self._absmax = torch.zeros(0)
        self._tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs [tokens, in], any floating dtype, padding already left out."""
        size = inputs.shape[1]
        if self._gram is None:
            self._gram = torch.zeros(size, size, dtype=torch.float32, device=inputs.device)
            self._absmax = torch.zeros(size, dtype=torch.float32, device=inputs.device)
            self._waiting = torch.empty(WAITING, size, dtype=torch.float32, device=inputs.device)
        start = 0
        while start < inputs.shape[0]:
            part = inputs[start : start + WAITING - self._filled]
            self._absmax = self._absmax.maximum(part.amax(0)).maximum(-part.amin(0))
            self._waiting[self._filled : self._filled + len(part)].copy_(part)
            self._filled += len(part)
            self._bf16_values &= part.dtype == torch.bfloat16
            if self._filled == WAITING:
                self._add_product()
            start += len(part)
        self._tokens += inputs.shape[0]

    def _add_product(self) -> None:
        """Add what waits to the sum."""
        gram, part = self._gram, self._waiting[: self._filled]
        assert gram is not None  # made by add
        with fast_matmul(self._bf16_values):
            size = gram.shape[0]
            for row in range(0, size, _TILE):
                stop = min(row + _TILE, size)
                # Pieces of one width: strips of ever other lengths would each want a kernel and its scratch.
                for column in range(row, size, _STRIP):
                    end = min(column + _STRIP, size)
                    gram[row:stop, column:end].addmm_(part[:, row:stop].t(), part[:, column:end])
        self._filled, self._bf16_values = 0, True

    def finish(self, name: str, world: World = ALONE) -> InputStats:
        """The statistics of the module `name`, over what all ranks have added; the accumulator is spent.

        Raises:
            NumericalError: NaN or Inf among the inputs, or none at all.
        """
        if self._filled:
            self._add_product()
        gram, self._gram, self._waiting = self._gram, None, torch.zeros(0, 0)
        if gram is None:
            raise NumericalError(f"No calibration token has reached {name}.")
        size = gram.shape[0]
        for row in range(0, size, _TILE):
            world.sum_(gram[row : row + _TILE, row:])
        world.max_(self._absmax)
        if not bool(torch.isfinite(gram.diagonal()).all()):
            raise NumericalError(f"The calibration inputs of {name} hold NaN or Inf.")
        for row in range(0, size, _TILE):
            stop = min(row + _TILE, size)
            for column in range(stop, size, _TILE):
                end = min(column + _TILE, size)
                gram[column:end, row:stop].copy_(gram[row:stop, column:end].t())
        return InputStats(gram, self._absmax, gram.diagonal().clone(), world.total(self._tokens))


class CrossAccumulator:
    """Sums X' X̃ in float32 over batches of tokens: X what a linear reads in the source model, X̃ what it reads now, of
    the same tokens."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, source: Tensor, now: Tensor) -> None:
        """Add inputs [tokens, in] of the same tokens, any floating dtype, padding already left out."""
        if self._sum is None:
            size = source.shape[1]
            self._sum = torch.zeros(size, size, dtype=torch.float32, device=source.device)
        for start in range(0, source.shape[0], _WIDENED):
            first, second = source[start : start + _WIDENED], now[start : start + _WIDENED]
            with fast_matmul(first.dtype == second.dtype == torch.bfloat16):
                self._sum.addmm_(first.float().t(), second.float())

    def finish(self, name: str, world: World = ALONE) -> Tensor:
        """float32 [in, in], over what all ranks have added; cross[i, j] = sum over tokens of x_i x̃_j.

        Raises:
            NumericalError: NaN or Inf among the inputs of the module `name`, or none at all.
        """
        total, self._sum = self._sum, None
        if total is None:
            raise NumericalError(f"No calibration token has reached {name}.")
        for row in range(0, total.shape[0], _TILE):
            world.sum_(total[row : row + _TILE])
        if not bool(torch.isfinite(total.sum())):
            raise NumericalError(f"The calibration inputs of {name} hold NaN or Inf.")
        return total
