"""Made-up linears and their inputs, as real ones are: correlated channels, unequal in size, heavy tails."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcomp.calibration.stats import GramAccumulator, InputStats


def inputs(
    tokens: int, width: int, seed: int, *, spread: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[tokens, width]: channels share a few directions, and their sizes differ by e^±spread."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, max(1, width // 4), generator=generator)
    mixing = torch.randn(max(1, width // 4), width, generator=generator)
    own = torch.randn(tokens, width, generator=generator)
    sizes = (spread * torch.randn(width, generator=generator)).exp()
    return ((shared @ mixing / max(1, width // 4) ** 0.5 + 0.7 * own) * sizes).to(dtype)


def weights(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[rows, width], Student's t with five degrees of freedom, 0.05 wide."""
    generator = torch.Generator().manual_seed(seed + 1)
    normal = torch.randn(rows, width, generator=generator)
    spread = torch.randn(rows, width, 5, generator=generator).square().mean(-1).sqrt()
    return (0.05 * normal / spread).to(dtype)


def stats_of(x: Tensor) -> InputStats:
    """Fresh statistics; methods use up the Gram matrix, so each gets its own."""
    accumulator = GramAccumulator()
    accumulator.add(x)
    return accumulator.finish("layer")


def gram_of(x: Tensor) -> Tensor:
    """X'X in float64, token after token."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for token in x.double():
        total += torch.outer(token, token)
    return total
