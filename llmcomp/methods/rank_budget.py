"""How large a rank may be, and which matrix gets which under one budget of bytes.

A matrix [out, in] of rank r takes r (out + in) numbers instead of out * in, so ranks of out * in / (out + in) and more
save nothing. `--ratio` is the share of bytes kept. With one ratio for all every matrix gets `rank_for`; `allocate`
spends the same bytes where they take the most off the measured truncation loss (the aim of ASVD's rank search,
arXiv:2312.05821, which runs the model for each rank; here losses are sums of squared singular values, known for all
ranks at once).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from llmcomp.errors import BadRecipe
from llmcomp.kinds import check_ratio


def largest_rank(out_features: int, in_features: int) -> int:
    """The largest rank whose factors are smaller than the matrix; 0 where there is none."""
    return (out_features * in_features - 1) // (out_features + in_features)


def check_rank(rank: int, out_features: int, in_features: int) -> None:
    """Raises BadRecipe where factors of this rank are no factorization of [out, in] that saves anything."""
    largest = largest_rank(out_features, in_features)
    shape = f"[{out_features}, {in_features}]"
    if largest < 1:
        raise BadRecipe(f"No factors are smaller than a matrix {shape}; leave it dense.")
    if rank > min(out_features, in_features):
        raise BadRecipe(f"Rank {rank} is above the width of a matrix {shape}; take 1 to {largest}.")
    if not 1 <= rank <= largest:
        raise BadRecipe(f"Rank {rank} saves nothing on a matrix {shape}; take 1 to {largest}.")


def rank_for(ratio: float, out_features: int, in_features: int, multiple: int = 1) -> int:
    """The rank whose factors hold `ratio` of a matrix's numbers: ratio * m * n / (m + n), rounded down, at least 1.

    Args:
        multiple: the rank is a multiple of this (of a group size, where factors are quantized in groups).

    >>> rank_for(0.8, 512, 512), rank_for(0.5, 2048, 5632), rank_for(0.5, 2048, 5632, 64)
    (204, 750, 704)

    Raises:
        BadRecipe: a ratio that is no share, or a matrix too small for any rank to save something.
    """
    check_ratio(ratio)
    exact = Fraction(str(ratio)) * out_features * in_features / (out_features + in_features)
    rank = max(int(exact) // multiple, 1) * multiple
    check_rank(rank, out_features, in_features)
    return rank


@dataclass(frozen=True)
class Spectrum:
    """What is known of one matrix when ranks are shared out.

    Attributes:
        energies: float64 [min(out, in)], falling: what each further rank takes off the loss (`lowrank.spectrum`), in
            units in which the losses of matrices may be added (`balanced`).
        shape: (out, in).
    """

    energies: Tensor
    shape: tuple[int, int]


def balanced(spectrum: Spectrum, ratio: float) -> Spectrum:
    """The same in units in which each number of every matrix counts alike: with the rank of `ratio` what is lost of
    each is its size. Where no rank saves anything, energies stay as they are.

    Losses of outputs as they are measured do not add up: a few directions that all tokens share hold most of the energy
    of some matrices, which then lose their ranks to others. On a small trained decoder at a ratio of 0.6 perplexity is
    128 with losses as they are, 99 with each as a share of its output, 69.6 in these units, and 70.0 with one ratio for
    all (at 0.8: 52.4 in these, 52.3 with one ratio; one run each).

    Raises:
        BadRecipe: a ratio that is no share.
    """
    check_ratio(ratio)
    rows, columns = spectrum.shape
    rank = int(ratio * rows * columns / (rows + columns))
    rest = float(spectrum.energies[max(rank, 1) :].sum())
    if largest_rank(rows, columns) < 1 or rest <= 0:
        return spectrum
    return Spectrum(spectrum.energies * (rows * columns / rest), spectrum.shape)


def allocate(
    spectra: Mapping[str, Spectrum], budget: int, itemsize: int, multiple: int = 1
) -> dict[str, int | None]:
    """The ranks of least total loss that one budget pays for.

    Ranks are bought one after the other, the one that takes most off the loss for its bytes first; losses are convex in
    the rank, so this is optimal up to the last few bytes, and there single ranks are exchanged as long as that helps.

    Args:
        spectra: of all targeted matrices.
        budget: bytes that all of them may take together.
        itemsize: bytes of a number, in factors as in what stays dense.
        multiple: ranks are multiples of this.

    Returns:
        {name: its rank, or None where it stays dense: no rank saves anything, or the budget has bought all that do and
        the dense matrix too}.

    Raises:
        BadRecipe: a budget that the smallest ranks overstep.
    """
    if not spectra:
        return {}
    names = sorted(spectra)
    ladders = _ladders([spectra[name] for name in names], itemsize, multiple)
    smallest: list[int] = ladders.costs[:, 0].tolist()
    require_affordable(smallest, budget)
    steps, left = _bought_in_order(ladders, budget - sum(smallest))
    steps = _exchanged(ladders, steps, left)
    dense = (steps == ladders.lengths - 1).tolist()
    ranks = ((steps + 1) * multiple).tolist()
    return {name: None if whole else rank for name, whole, rank in zip(names, dense, ranks, strict=True)}


def require_affordable(smallest: Sequence[int], budget: int) -> None:
    """Refuse a budget that the smallest ranks overstep.

    Args:
        smallest: what that of each matrix takes.

    Raises:
        BadRecipe: it is one.
    """
    if sum(smallest) > budget:
        raise BadRecipe(
            f"The smallest ranks of all {len(smallest)} matrices take {sum(smallest):,} numbers, more than the "
            f"{budget:,} allowed; keep a larger share or target fewer."
        )


@dataclass(frozen=True)
class _Ladders:
    """What can be bought of each matrix, step after step: `multiple` ranks each, and what is left of it with the last.
    The first step is had by all. Padded to one length by steps that cost 0 and have no slope.

    Attributes:
        costs: int64 [matrices, steps], bytes.
        gains: float64, what each takes off the loss.
        slopes: float64, gain for a byte, never rising; -inf behind the last step.
        lengths: int64 [matrices].
    """

    costs: Tensor
    gains: Tensor
    slopes: Tensor
    lengths: Tensor

    def at(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(cost, gain, slope) of step number `steps`, int64 [matrices]; slope -inf where there is none."""
        there = (steps < self.lengths).unsqueeze(1)
        index = steps.unsqueeze(1).clamp_max(self.costs.shape[1] - 1)
        slope = torch.where(there, self.slopes.gather(1, index), -torch.inf)
        return self.costs.gather(1, index).squeeze(1), self.gains.gather(1, index).squeeze(1), slope.squeeze(1)


def _ladders(spectra: Sequence[Spectrum], itemsize: int, multiple: int) -> _Ladders:
    steps = [largest_rank(*spectrum.shape) // multiple for spectrum in spectra]
    size = (len(spectra), max(steps) + 1)
    costs, gains = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.float64)
    slopes = torch.full(size, -torch.inf, dtype=torch.float64)
    for n, (spectrum, count) in enumerate(zip(spectra, steps, strict=True)):
        rows, columns = spectrum.shape
        energies, ranks = spectrum.energies.double().cpu(), count * multiple
        costs[n, :count] = multiple * (rows + columns) * itemsize
        costs[n, count] = (rows * columns - ranks * (rows + columns)) * itemsize
        gains[n, :count] = energies[:ranks].reshape(count, multiple).sum(1)
        gains[n, count] = energies[ranks:].sum()
        # The last step, to all of the matrix, may gain more for a byte than those before; it still comes after them.
        slopes[n, : count + 1] = (gains[n, : count + 1] / costs[n, : count + 1]).cummin(0).values
    return _Ladders(costs, gains, slopes, torch.tensor(steps) + 1)


def _bought_in_order(ladders: _Ladders, budget: int) -> tuple[Tensor, int]:
    """int64 [matrices], the last step that each can have where steps are bought by falling slope, and what is left of
    the budget. What gains nothing is not bought."""
    matrices = len(ladders.lengths)
    slopes = ladders.slopes[:, 1:].T.flatten()  # of equals the lower step comes first, so that they rise together
    order = slopes.argsort(descending=True, stable=True)
    order = order[slopes[order] > 0]
    costs = ladders.costs[:, 1:].T.flatten()[order]
    bought = int((costs.cumsum(0) <= budget).sum())
    steps = torch.bincount(order[:bought] % matrices, minlength=matrices)
    return _bought_besides(ladders, steps, budget - int(costs[:bought].sum()))


def _bought_besides(ladders: _Ladders, steps: Tensor, left: int) -> tuple[Tensor, int]:
    """The same after all further steps that what is left pays for: the next one was too dear, a cheaper one may not be.
    Changes `steps`."""
    while True:
        cost, _, slope = ladders.at(steps + 1)
        slope[cost > left] = -torch.inf
        n = int(slope.argmax())
        if not float(slope[n]) > 0:
            return steps, left
        steps[n] += 1
        left -= int(cost[n])


def _exchanged(ladders: _Ladders, steps: Tensor, left: int) -> Tensor:
    """Steps after all exchanges of one for one that fit and lower the loss, the best first; what an exchange leaves
    over is spent. Changes `steps`."""
    while True:
        freed, lost, _ = ladders.at(steps)
        lost = torch.where(steps > 0, lost, torch.inf)
        price, won, slope = ladders.at(steps + 1)
        won = torch.where(slope > -torch.inf, won, -torch.inf)
        better = won - lost.unsqueeze(1)  # [given up, bought]
        better[price > freed.unsqueeze(1) + left] = -torch.inf
        better.fill_diagonal_(-torch.inf)
        giver, taker = divmod(int(better.argmax()), len(steps))
        if not float(better[giver, taker]) > 1e-12 * float(won[taker]):
            return steps
        steps[giver] -= 1
        steps[taker] += 1
        steps, left = _bought_besides(ladders, steps, left + int(freed[giver]) - int(price[taker]))
