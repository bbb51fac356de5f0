"""What a method should aim at behind compressed blocks: the source's outputs, on the inputs that there are now.

A linear W reads X in the source model and X' behind what is compressed already. Methods that see X' alone make the
outputs X' W' least wrong, as if those were right; errors of earlier blocks are then never made up for, and grow. The
outputs to aim at are X W' of the same tokens, and with G = X'' X' and C = X'' X, least squares of

    ||X W' - X' W*'||² + d ||W* - W||²

gives W* = W + W (C' - G)(G + d I)^-1: any method that takes weights and G then works on W* in the place of W. GPTAQ
(arXiv:2504.02692) puts the same asymmetry into the steps of GPTQ's sweep; done beforehand it serves all methods, and it
is the update of SVD-LLM (arXiv:2403.07378, section 3.3) for weights that have no factors yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcomp.methods._project import solve_damped, times

# Of the mean diagonal of G. A trained decoder at 2:4 hardly tells 0.001, 0.01 and 0.1 apart; the strongest moves least.
DAMPING = 0.1


def retarget(
    weight: Tensor, gram: Tensor, cross: Tensor, damping: float = DAMPING, alpha: float = 1.0
) -> Tensor:
    """W* [out, in] for a weight [out, in], in its dtype.

    Args:
        weight: the source's.
        gram: floating [in, in], X'' X'; only read.
        cross: floating [in, in], cross[i, j] = sum over tokens of x_i x'_j, the source's inputs first.
        damping: d as a share of the mean diagonal of G. With inputs that are equal nothing moves, whatever d.
        alpha: share of the way from W to W*.

    Raises:
        NumericalError: a matrix with NaN or Inf.
    """
    wide = weight.double()
    square = gram.to(torch.float64, copy=True)
    difference = times(wide, cross) - wide @ square
    return wide.add(solve_damped(square, difference, damping), alpha=alpha).to(weight.dtype)
