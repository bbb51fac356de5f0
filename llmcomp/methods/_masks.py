"""Choosing masks: by scores, in exact counts, held masks respected.

A score says what removing a weight costs; those of the lowest are removed. Of equal scores the later column is
removed first, and in one column the later row, so a mask follows from its scores alone.

* N:M chooses within each group of M columns of each row.
* Unstructured, either the weights of each row compete (`row_mask`), or all of a matrix do (`lowest`).

Every function takes the mask of an earlier step (`held`): what that has removed stays removed and counts, and only
the rest is chosen. A mask that has already all that the pattern asks for comes back as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from llmcomp.errors import BadRecipe
from llmcomp.patterns import Pattern, holds

_CHUNK_WEIGHTS = 1 << 20  # weights whose scores are held at a time

# Up to so many columns of a group are compared in pairs, more are sorted.
_PAIRED = 8

# A score of what an earlier step has removed: lower than all others.
GONE = -1.0


def ranks(scores: Tensor) -> Tensor:
    """How many of several scores [several, …] are ahead of each, place by place: 0 for the highest; of equal ones the
    earlier is ahead."""
    several = len(scores)
    if several > _PAIRED:
        return scores.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    ahead = torch.empty(scores.shape, dtype=torch.int8, device=scores.device)
    for late in range(several):  # each has all that follow ahead of it, but for those that it is found to lead
        ahead[late] = several - 1 - late
        if late:
            leads = (scores[:late] >= scores[late]).view(torch.int8)
            ahead[:late].sub_(leads)
            for one in leads.unbind():
                ahead[late].add_(one)
    return ahead


def grouped_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """The N:M mask of scores [rows, in], bool."""
    assert pattern.of is not None and pattern.kept is not None  # N:M
    rows, columns = scores.shape
    grouped = scores.reshape(rows, columns // pattern.of, pattern.of).movedim(-1, 0)
    return (ranks(grouped) < pattern.kept).movedim(0, -1).reshape(rows, columns)


def row_mask(scores: Tensor, removed: Tensor) -> Tensor:
    """The mask of scores [rows, in] that removes removed [rows] of each row, bool."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    stays = torch.arange(scores.shape[1], device=scores.device) < (scores.shape[1] - removed).unsqueeze(1)
    return torch.empty_like(stays).scatter_(1, order, stays)


def lowest(scores: Tensor, count: int) -> Tensor:
    """bool, True for the `count` lowest of scores [any], float32 and none below zero but for `GONE`; of equal ones the
    last."""
    if not count:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    flat = scores.reshape(-1)
    threshold = _value_at(lambda: [flat], count)
    low = flat < threshold
    tied = (flat == threshold).nonzero().flatten()
    low[tied[len(tied) - (count - int(low.sum())) :]] = True
    return low.reshape(scores.shape)


def matrix_mask(
    score: Callable[[slice], Tensor], rows: int, columns: int, pattern: Pattern, held: Tensor | None
) -> Tensor:
    """The mask, bool [rows, in], for which all weights of an unstructured pattern compete.

    Args:
        score: some rows → float32 [their number, in], never below zero; asked for three times.
    """

    def parts() -> list[slice]:
        step = max(1, _CHUNK_WEIGHTS // columns)
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def scores(part: slice) -> Tensor:
        return without(score(part), None if held is None else held[part])

    device = score(slice(0, 1)).device
    count = pattern.removes(rows * columns)
    check_removed(pattern, held, count)
    mask = torch.ones(rows, columns, dtype=torch.bool, device=device)
    if not count:
        return mask
    threshold, removed, tied = _value_at(lambda: (scores(part) for part in parts()), count), 0, []
    for part in parts():
        found = scores(part)
        torch.ge(found, threshold, out=mask[part])
        removed += int((~mask[part]).sum())
        where = (found == threshold).nonzero()
        where[:, 0] += part.start
        tied.append(where)
    places = torch.cat(tied)
    last = (places[:, 1] * rows + places[:, 0]).argsort()[len(places) - (count - removed) :]
    mask[places[last, 0], places[last, 1]] = False
    return mask


def without(scores: Tensor, held: Tensor | None) -> Tensor:
    """Scores of which those removed by a held mask are below all others. May change `scores`."""
    return scores if held is None else scores.masked_fill_(~held, GONE)


def shares(present: Sequence[int], count: int) -> list[int]:
    """`count` dealt to parts in proportion to what is present in each; the sum is exact, and no part gets more than
    it has if `count` is no more than all that is present."""
    total, seen, dealt, found = max(1, sum(present)), 0, 0, []
    for part in present:
        seen += part
        upto = (2 * seen * count + total) // (2 * total)
        found.append(upto - dealt)
        dealt = upto
    return found


def is_final(pattern: Pattern, held: Tensor | None) -> bool:
    """Whether the held mask [rows, in] has already removed all that the pattern removes; unstructured, to the nearest
    weight of the whole or of every row."""
    if held is None:
        return False
    if pattern.of is not None:
        return holds(pattern, held)
    gone = (~held).sum(1)
    return int(gone.sum()) == pattern.removes(held.numel()) or bool((gone == pattern.removes(held.shape[1])).all())


def check_removed(pattern: Pattern, held: Tensor | None, count: int) -> None:
    """Refuse a held mask that has removed more than `count`.

    Raises:
        BadRecipe: it has.
    """
    gone = 0 if held is None else held.numel() - int(held.sum())
    if gone > count:
        raise BadRecipe(
            f"{pattern.label} removes {count} weights where an earlier step has removed {gone}: take the sparser "
            "step last."
        )


def check_groups(pattern: Pattern, held: Tensor | None) -> None:
    """Refuse a held mask [rows, in] with fewer weights left in a group than N:M keeps.

    Raises:
        BadRecipe: there is such a group.
    """
    if held is None or pattern.of is None or pattern.kept is None:
        return
    left = held[:, :: pattern.of].short()
    for first in range(1, pattern.of):
        left += held[:, first :: pattern.of]
    if bool(left.lt(pattern.kept).any()):
        raise BadRecipe(
            f"{pattern.label} keeps {pattern.kept} of every {pattern.of} weights where an earlier step has left fewer "
            "in some group: take a pattern that every group of the earlier one fits, or one step."
        )


def _value_at(parts: Callable[[], Iterable[Tensor]], count: int) -> Tensor:
    """The `count`-th lowest of all scores, counted from one, without sorting or holding them.

    Bits of floats that are not negative are ordered as the floats are: one pass counts their upper halves, a second
    the lower halves of those that share the upper half in question.
    """
    upper = _counts(_keys(part) >> 16 for part in parts())
    high, below = _bin_of(upper, count)
    lower = _counts(_low_half(_keys(part), high) for part in parts())
    low, _ = _bin_of(lower, count - below)
    key = torch.tensor((high << 16) + low - 1, dtype=torch.int32, device=lower.device)
    return torch.tensor(GONE, device=lower.device) if int(key) < 0 else key.view(torch.float32)


def _keys(scores: Tensor) -> Tensor:
    """int32, zero for `GONE`, else the score's bits and one."""
    return scores.reshape(-1).view(torch.int32).add(1).clamp_min_(0)


def _low_half(keys: Tensor, high: int) -> Tensor:
    return keys[(keys >> 16) == high] & 0xFFFF


def _counts(parts: Iterable[Tensor]) -> Tensor:
    """int64 [65536], how often each number occurs in all parts together."""
    found = [torch.bincount(part, minlength=1 << 16) for part in parts]
    return torch.stack(found).sum(0)


def _bin_of(counts: Tensor, count: int) -> tuple[int, int]:
    """(bin in which the `count`-th lies, how many lie below that bin)."""
    upto = counts.cumsum(0)
    place = int(torch.searchsorted(upto, count))
    return place, int(upto[place] - counts[place])
