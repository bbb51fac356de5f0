"""Low rank and integers together: factors that are quantized, and factors that correct what quantizing has lost.

* `quantize_factors`: the right factor is quantized on its layer's Gram matrix G, the left one fitted anew to what the
  right one then yields (least squares) and quantized on *that* Gram matrix, R G R'. SVD's factors make it diagonal,
  so GPTQ would find nothing to compensate with: the space between the factors is turned first, which their product
  does not see, and the loss that four bits add is about halved (tests/methods/test_factors.py).
* `correct`: W = base + left right, the base integers of few bits, the factors the best of their rank for its error in
  the norm of G, in 8 bits (LQER, arXiv:2402.02446, has the idea with a diagonal norm; CALDERA, arXiv:2405.18886, with
  the whole one).

Both take statistics whose Gram matrix GPTQ has factorized in place: steps on one linear chain on one matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.errors import BadRecipe
from llmcomp.methods._project import diagonal_norm, input_norm, solution_of, solve_damped, truncate
from llmcomp.methods.gptq import gptq
from llmcomp.methods.rtn import rtn, rtn_clip
from llmcomp.methods.solution import Solution
from llmcomp.schemes import Scheme
from llmcomp.weights import LowRankWeight, QuantizedWeight

# (weight [rows, in], stats, scheme, dtype of the scales) → Solution: any function of METHODS.
Quantizer = Callable[..., Solution]


@dataclass(frozen=True)
class CorrectionConfig:
    """Settings of a correction.

    Attributes:
        bits: of both factors, per channel.
        damping: share of the Gram matrix's mean diagonal that is added to it.
    """

    bits: int = 8
    damping: float = 1e-6


def quantize_factors(
    weight: Tensor,
    low: LowRankWeight,
    stats: InputStats | None,
    schemes: tuple[Scheme, Scheme],
    dtype: torch.dtype,
    quantizer: Quantizer = gptq,
    turn: bool = True,
) -> Solution:
    """The same with integers for both factors.

    Args:
        weight: floating [out, in], what is approximated.
        low: its factors, floating; a base stays as it is.
        stats: of its input, None for a quantizer without calibration. GPTQ uses the Gram matrix up, as ever.
        schemes: of left [out, rank] and right [rank, in].
        dtype: of the stored scales.
        quantizer: what rounds the factors.
        turn: by a random orthogonal matrix, always the same: for quantizers that compensate.

    Raises:
        BadRecipe: groups that do not divide the rank or the width.
    """
    left, right = (factor.double() for factor in low.factors())
    for scheme, factor, side in zip(schemes, (left, right), ("rank", "width"), strict=True):
        if not scheme.fits(factor.shape[1]):
            raise BadRecipe(
                f"Groups of {scheme.group_size} do not divide a {side} of {factor.shape[1]}; take a multiple, or "
                "--group-size channel."
            )
    if turn:
        rotation = _rotation(low.rank).to(left.device)
        left, right = left @ rotation, rotation.T @ right
    held_right = _integers(quantizer(right.float(), stats, schemes[1], dtype))
    norm = diagonal_norm() if stats is None else input_norm(stats)
    decoded = held_right.dense().double()
    wanted = weight.double() if low.base is None else weight.double() - low.base.dense().double()
    gram = norm.inner(decoded, decoded)
    gradient = norm.inner(decoded, wanted - left @ decoded).T
    fitted = (left + solve_damped(gram.clone(), gradient, 1e-6)).float()
    of_left = None if stats is None else _stats_behind(decoded, gram, stats)
    held_left = _integers(quantizer(fitted, of_left, schemes[0], dtype))
    return solution_of(weight, LowRankWeight(held_left, held_right, low.base), stats)


def correct(
    weight: Tensor,
    base: QuantizedWeight,
    stats: InputStats | None,
    rank: int,
    dtype: torch.dtype,
    config: CorrectionConfig = CorrectionConfig(),
) -> Solution:
    """A quantized weight with a low-rank correction of its error, in few bits.

    Args:
        weight: floating [out, in]. base: its quantized form.
        stats: of its input; only read, and it may be that GPTQ has factorized the Gram matrix in place. None where
            nothing was seen of it: every input then counts alike.
        rank: of the correction. dtype: of the stored scales.

    Raises:
        BadRecipe: a rank with which nothing is saved.
    """
    if not 1 <= rank <= min(weight.shape):
        raise BadRecipe(
            f"Rank {rank} is no rank of a matrix [{weight.shape[0]}, {weight.shape[1]}]; take 1 to {min(weight.shape)}."
        )
    norm = diagonal_norm() if stats is None else input_norm(stats).damped(config.damping)
    left, right = truncate(weight.double() - base.dense().double(), norm, rank)
    scheme = Scheme(config.bits)
    low = LowRankWeight(left, right, base)
    quantizer = rtn if stats is None else rtn_clip
    solution = quantize_factors(weight, low, stats, (scheme, scheme), dtype, quantizer, turn=False)
    if solution.weight.nbytes >= weight.nbytes:
        raise BadRecipe(
            f"A correction of rank {rank} makes {solution.weight.nbytes:,} bytes of a weight of {weight.nbytes:,}; "
            "take a smaller rank."
        )
    return solution


def _integers(solution: Solution) -> QuantizedWeight:
    assert isinstance(solution.weight, QuantizedWeight)  # what quantizers give
    return solution.weight


def _rotation(size: int) -> Tensor:
    """Orthogonal, float64 [size, size]."""
    normal = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(normal)[0]


def _stats_behind(right: Tensor, gram: Tensor, stats: InputStats) -> InputStats:
    """Statistics of right x, float64 right [rank, in] and gram [rank, rank] = right G right'.

    Its largest values are not known; what stands for them bounds them.
    """
    narrow = gram.float()
    bound = (right.abs() @ stats.absmax.double()).float()
    return InputStats(narrow, bound, narrow.diagonal().clone(), stats.tokens)
