"""A mask that is chosen while a column sweep goes on, from weights as the errors before them have changed them.

SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774) removes the weights of least w_k² / [H_F⁻¹]_kk, F the columns
from k on: what removing w_k costs after the best change of the columns that follow, those before it being fixed
(its equation 3). Its code reads the denominator off the Cholesky factor C of the inverse, H⁻¹ = C' C with C upper
triangular, as C_kk². In the form of `_solve`, H = R R', C is R⁻¹, and the diagonal of a triangular inverse is that of
the factor inverted:

    [H_F⁻¹]_kk = C_kk² = 1 / R_kk²,    so the score is target_k² R_kk²,

the very term that a column's error adds to `_solve`'s loss. Nothing is inverted. The targets of a group, or of a block,
are those of the moment when the sweep comes to its first column, as in the paper: masks follow updated weights
(`_solve._updated`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcomp.methods._masks import GONE, check_groups, check_removed, is_final, lowest, ranks, shares
from llmcomp.methods._solve import Factor, LookAhead, sweep
from llmcomp.patterns import Pattern

BLOCK = 128  # columns whose weights compete in an unstructured pattern, the paper's


def chunks(pattern: Pattern, shape: torch.Size, held: Tensor | None, step: int) -> list[tuple[slice, int]]:
    """Chunks of `step` rows of a weight [rows, in], and how many weights an unstructured pattern still removes in each.

    Raises:
        BadRecipe: a width that the pattern does not divide, or a held mask that has removed more than it removes.
    """
    pattern.check_width(shape[1])
    rows = [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
    if pattern.group is not None or is_final(pattern, held):
        check_groups(pattern, held)
        return [(part, 0) for part in rows]
    count = pattern.removes(shape.numel())
    check_removed(pattern, held, count)
    if held is None:
        left = [(part.stop - part.start) * shape[1] for part in rows]
    else:
        left = [int(held[part].sum()) for part in rows]
    return list(zip(rows, shares(left, count - shape.numel() + sum(left)), strict=True))


def order_for(pattern: Pattern | None, held: Tensor | None, act_order: bool) -> tuple[bool, int]:
    """(whether columns are taken by falling activation, how many consecutive ones stay together) where `act_order` is
    wished for.

    N:M keeps its groups together. Unstructured, columns stay as they are: a block of columns of one size has to give
    as much as the next, and taking half of the loudest costs more than their early turn wins
    (tests/methods/test_sparsegpt.py). Where nothing is left to choose neither matters.
    """
    if pattern is None or is_final(pattern, held):
        return act_order, 1
    return act_order and pattern.group is not None, pattern.group or 1


class SweptMask:
    """The mask of some rows, chosen while a sweep comes to their columns.

    Args:
        ordered: [in, rows], the rows' columns in the order of the sweep; only its shape is read.
        held: bool [rows, in], the mask of an earlier step, or None.
        count: weights that an unstructured pattern removes beyond it, by `chunks`.
        block: columns whose weights compete in an unstructured pattern.

    Attributes:
        removed: bool [in, rows] in the order of the sweep; complete when the sweep is over.
        ahead: what the sweep is to be given; None where nothing is left to choose.
    """

    def __init__(
        self, pattern: Pattern, factor: Factor, ordered: Tensor, held: Tensor | None, count: int, block: int = BLOCK
    ) -> None:
        if held is None:
            self.removed = torch.zeros_like(ordered, dtype=torch.bool)
        else:
            self.removed = held.t()[factor.order].logical_not_()
        self._pattern, self._pivots, self._block = pattern, factor.pivots.unsqueeze(1), block
        self._held = held is not None
        self.ahead = self._look_ahead(is_final(pattern, held), count)

    def _look_ahead(self, final: bool, count: int) -> LookAhead | None:
        if final:
            return None
        if self._pattern.group is not None:
            return LookAhead(self._pattern.group, self._see_group)
        left = [part.numel() - int(part.sum()) for part in self.removed.split(self._block)]
        self._counts = shares(left, count)
        return LookAhead(self._block, self._see_block)

    def _scores(self, first: int, targets: Tensor) -> Tensor:
        part = slice(first, first + len(targets))
        scores = targets.square().mul_(self._pivots[part])
        return scores.masked_fill_(self.removed[part], GONE) if self._held else scores

    def _see_group(self, first: int, targets: Tensor) -> None:
        assert self._pattern.kept is not None  # N:M
        found = ranks(self._scores(first, targets))
        torch.ge(found, self._pattern.kept, out=self.removed[first : first + len(targets)])

    def _see_block(self, first: int, targets: Tensor) -> None:
        removed = self.removed[first : first + len(targets)]
        removed.copy_(lowest(self._scores(first, targets), int(removed.sum()) + self._counts[first // self._block]))

    def settle(self) -> None:
        """Hold what has been chosen in the sweeps that follow."""
        self.ahead = None

    def kept(self, back: Tensor) -> Tensor:
        """The mask, bool [rows, in], in the weight's own order of columns. back: int64 [in], where in the sweep's each
        of them is."""
        return self.removed.logical_not()[back].t()


def prune(
    ordered: Tensor, factor: Factor, mask: SweptMask, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Remove what the mask says, and let the columns that follow make up for it.

    Args:
        ordered: float32 [in, rows], columns of W in the order of the sweep.
        dtype: of the values; what rounding to it costs is made up for, too.

    Returns:
        The values in `dtype` and the float32 errors, both [in, rows] in the order of the sweep.
    """
    values = torch.empty(ordered.shape, dtype=dtype, device=ordered.device)
    columns, removed = values.unbind(), mask.removed.unbind()

    def prune_column(k: int, target: Tensor) -> Tensor:
        stored = columns[k].copy_(target.masked_fill_(removed[k], 0.0))
        return target if dtype == torch.float32 else target.copy_(stored)

    error = sweep(ordered, factor, prune_column, mask.ahead)
    mask.settle()
    return values, error
