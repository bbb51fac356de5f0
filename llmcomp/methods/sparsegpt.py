"""SparseGPT: each removed weight is made up for in the columns that follow (arXiv:2301.00774).

The sweep is GPTQ's (`_solve`), with zero where that rounds, and the factor is the same; `_swept` derives what the paper
removes first in terms of it. What this one does beyond the paper:

* rounding to the dtype in which weights are stored is an error like any other, and made up for;
* an unstructured pattern removes its share of the rows that are given to the nearest weight, and of every block of
  columns; rows compete for it, so several ranks, each with its own rows, choose other masks than one has;
* the mask of an earlier step can be held: what it has removed stays so.

The groups of N:M are taken by falling activation, as GPTQ takes columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.errors import BadRecipe
from llmcomp.methods._solve import in_order, sampled_losses, shared_factor
from llmcomp.methods._swept import BLOCK, SweptMask, chunks, order_for, prune
from llmcomp.methods.solution import Solution, dead_columns
from llmcomp.methods.wanda import wanda
from llmcomp.patterns import Pattern
from llmcomp.weights import SparseWeight

# Elements of a chunk of rows: what the sweep holds beside the factor is about a dozen bytes for each. Of N:M, where
# rows do not compete, more at a time give the same weights in fewer of the many small steps, each of which takes a
# while, however few rows it is for.
CHUNK_WEIGHTS, GROUPED_WEIGHTS = 1 << 22, 1 << 24


@dataclass(frozen=True)
class SparseGPTConfig:
    """Settings of SparseGPT.

    Attributes:
        damping: first share of the mean diagonal to add to H (the paper's 1%).
        act_order: groups of N:M by falling activation; off keeps them as they stand, as the paper does.
        mask_block: columns whose weights compete in an unstructured pattern (the paper's 128).
    """

    damping: float = 0.01
    act_order: bool = True
    mask_block: int = BLOCK

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise BadRecipe(f"SparseGPT's damping must lie in (0, 1], got {self.damping}.")
        if self.mask_block < 1:
            raise BadRecipe(f"SparseGPT's mask_block must be 1 column or more, got {self.mask_block}.")


def sparsegpt(
    weight: Tensor, stats: InputStats, pattern: Pattern, dtype: torch.dtype,
    config: SparseGPTConfig = SparseGPTConfig(), mask: Tensor | None = None,
) -> Solution:
    """Sparsify weight [rows, in] with second-order compensation.

    Args:
        weight: floating [rows, in]. Where the pattern is unstructured its rows compete, some thousands at a time.
        stats: of its input. The Gram matrix is factorized in place: `stats.gram` is None afterwards and
            `stats.factor` serves the next weight that shares the input.
        pattern: its groups divide `in`.
        dtype: of the stored values.
        config: settings.
        mask: bool [rows, in] of an earlier step; what it has removed stays removed.

    Raises:
        BadRecipe: a width that the pattern does not divide, or a mask that has removed more than the pattern does.
    """
    rows, columns = weight.shape
    chunk = CHUNK_WEIGHTS if pattern.group is None else GROUPED_WEIGHTS
    parts = chunks(pattern, weight.shape, mask, max(64, chunk // columns))
    factor = shared_factor(stats, config.damping, *order_for(pattern, mask, config.act_order))
    if factor is None:
        solved = wanda(weight, stats, pattern, dtype, mask=mask)
        why = "the Gram matrix does not factor even with full damping: masked by Wanda, nothing made up for"
        return Solution(solved.weight, fallback=why, dead_columns=solved.dead_columns)
    values = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    kept = torch.empty(rows, columns, dtype=torch.bool, device=weight.device)
    error = torch.empty(rows, dtype=torch.float64, device=weight.device)
    norm = torch.empty_like(error)
    back = factor.order.argsort()
    for part, count in parts:
        held = None if mask is None else mask[part]
        ordered = in_order(weight[part], factor)
        swept = SweptMask(pattern, factor, ordered, held, count, config.mask_block)
        found, lost = prune(ordered, factor, swept, dtype)
        error[part], norm[part] = sampled_losses(factor, lost, ordered)
        values[part].copy_(found[back].t())
        kept[part].copy_(swept.kept(back))
    return Solution(SparseWeight(values, kept, pattern), error, norm, factor.damping, None, dead_columns(stats))
