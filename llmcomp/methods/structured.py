"""Structured pruning: which units of a linear's input may go, and what the others must become to make up for them.

A unit is a set of columns of an output projection W [out, in] that goes as a whole: the columns of an attention head
(of all heads that share their keys and values), one column for a neuron of an MLP. What makes them is pruned with them
by whoever knows the module; here are scores and weights. With G = X'X of the projection's input and H = G + d I:

* `importance`: tr(W_u G_uu W_u'), the error of the outputs where u is dropped and nothing else is done;
* `compensated_importance`: tr(W_u ([H^-1]_uu)^-1 W_u'), the error that is left when the other columns are refitted
  (Optimal Brain Surgeon for groups, as in ZipLM, arXiv:2302.04089);
* `magnitude`: the sum of squares of the weights that go, the baseline without calibration;
* `taylor_importance`: the squared change of the loss to first order, from gradients (arXiv:1906.10771);
* `choose`: greedy removal by the second, scores renewed as units go, so of two neurons that say the same one stays;
* `compensate`: the weights that are left, refitted by least squares to the outputs of all.

Everything is in float64; H^-1 [in, in] is only ever held by the second and by `choose`, two such matrices at most.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from llmcomp.errors import BadRecipe
from llmcomp.methods._project import damped_factor, solve_damped

# Units that go before all scores are renewed, as a share of all that go: between two renewals only those of the least
# important ones (_POOL times as many as go) are.
_ROUNDS = 16
_POOL = 2
# Groups that share a scale, and what kernels and packed integers like; each with how often it is in a width that is
# cut in steps of it: a coarser step would miss the share that was asked for.
_MULTIPLES = ((128, 16), (64, 16), (32, 8), (16, 16), (8, 16))


@dataclass(frozen=True)
class PruneConfig:
    """damping: share of the mean diagonal that is added where what is left is refitted. compensate: whether it is.
    multiple: the neurons that stay are a multiple of this; None: of the largest of 128, 64, 32, 16 and 8 that divides
    their number now and is no more than a 16th of it (32: an 8th), so that groups of quantization still fit."""

    damping: float = 0.01
    compensate: bool = True
    multiple: int | None = None

    def multiple_of(self, width: int) -> int:
        """Of what number those that stay of `width` neurons are a multiple.

        >>> PruneConfig().multiple_of(5632), PruneConfig().multiple_of(384), PruneConfig(multiple=8).multiple_of(384)
        (128, 32, 8)
        """
        if self.multiple is not None:
            return self.multiple
        return next((size for size, steps in _MULTIPLES if width % size == 0 and size * steps <= width), 1)


@dataclass(frozen=True)
class Pruned:
    """An output projection without some units of its input.

    Attributes:
        kept: int64 [units that stay], ascending. weight: [out, columns that stay], in the dtype it had.
        error: ||X(W - W')'||² / ||XW'||² over what calibration has read, None where it read nothing.
    """

    kept: Tensor
    weight: Tensor
    error: float | None


def prune(
    weight: Tensor, gram: Tensor, units: Tensor, keep: int, config: PruneConfig = PruneConfig(),
    scores: Tensor | None = None,
) -> Pruned:
    """Choose the units that stay, and refit their columns to the outputs of all.

    Args:
        weight: floating [out, in]. gram: floating [in, in] of its input.
        units: int64 [units, size], the columns of each. keep: how many stay.
        scores: [units], the highest of which stay; None: `choose` finds those that stay.

    Raises:
        NumericalError: a Gram matrix with NaN or Inf.
    """
    kept = choose(weight, gram, units, keep, config.damping) if scores is None else most_important(scores, keep)
    kept = kept.to(weight.device)
    columns = units.to(weight.device)[kept].flatten()
    fitted = compensate(weight, gram, columns, config.damping) if config.compensate else weight[:, columns]
    wide, left = gram.double(), weight.to(torch.float64, copy=True)
    whole = float(((left @ wide) * left).sum())
    left[:, columns] -= fitted.double()
    lost = float(((left @ wide) * left).sum())
    return Pruned(kept, fitted, lost / whole if whole > 0 else 0.0)


def prune_by_size(weights: Iterable[tuple[Tensor, Tensor]], keep: int) -> Pruned:
    """Keep the units of the largest weights, without calibration; what stays is as it was.

    Args:
        weights: as `magnitude`, the output projection first.
    """
    given = list(weights)
    (weight, units), *_ = given
    kept = most_important(magnitude(given), keep)
    return Pruned(kept, weight[:, units[kept].flatten()], None)


def head_units(width: int, head_dim: int, heads_per_group: int = 1) -> Tensor:
    """int64 [units, heads_per_group * head_dim], the columns of each group of heads that share keys and values.

    Raises:
        BadRecipe: heads that do not divide the width.
    """
    size = head_dim * heads_per_group
    if width % size:
        raise BadRecipe(
            f"Heads of {head_dim}, {heads_per_group} to a group, do not divide a width of {width}; leave heads as they "
            "are and prune --mlp or --layers."
        )
    return torch.arange(width).reshape(-1, size)


def neuron_units(width: int) -> Tensor:
    """int64 [width, 1]: each column for itself."""
    return torch.arange(width).unsqueeze(1)


def kept_count(fraction: float, units: int, multiple: int = 1) -> int:
    """How many units are left of `units`, the same number in every layer.

    Args:
        fraction: of the units that go, rounded down.
        multiple: what is left is a multiple of this (of a group size, where what is left will be quantized in groups).

    >>> kept_count(0.25, 32), kept_count(0.3, 5632), kept_count(0.3, 5632, 128)
    (24, 3943, 3968)

    Raises:
        BadRecipe: a fraction that is none, or that leaves all.
    """
    if not 0 < fraction < 1:
        raise BadRecipe(f"A fraction of {fraction} cannot be pruned: it must lie above 0 and below 1, such as 0.25.")
    left = units - int(Fraction(str(fraction)) * units)
    left = -(-left // multiple) * multiple
    if left >= units:
        raise BadRecipe(
            f"Pruning {fraction} of {units} units in steps of {multiple} removes none; take at least "
            f"{_smallest(units, multiple)}."
        )
    return left


def _smallest(units: int, multiple: int) -> str:
    """The smallest fraction that removes something, with as few digits as say it."""
    least = Fraction(units - (units - 1) // multiple * multiple, units)
    for digits in range(1, 9):
        rounded = Fraction(-(-least.numerator * 10**digits // least.denominator), 10**digits)
        if rounded < 1:
            return f"{float(rounded):g}"
    return "a larger fraction"


def importance(weight: Tensor, gram: Tensor, units: Tensor) -> Tensor:
    """The error of the outputs where a unit is dropped and nothing else done; float64 [units].

    Args:
        weight: floating [out, in]. gram: floating [in, in] of its input.
        units: int64 [units, size], the columns of each.
    """
    return (_squares(weight.double(), units) * _blocks(gram, units).double()).sum((1, 2))


def compensated_importance(weight: Tensor, gram: Tensor, units: Tensor, damping: float = 0.01) -> Tensor:
    """The error of the outputs where a unit is dropped and the other columns are refitted; float64 [units].

    Args:
        weight: floating [out, in]. gram: floating [in, in] of its input.
        units: int64 [units, size].
        damping: share of the mean diagonal that is added, ten times more each time H does not factor.

    Raises:
        NumericalError: a Gram matrix with NaN or Inf.
    """
    return _scores(_seen(weight, gram), _inverse(gram, damping), units)


def magnitude(weights: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of squares of all weights that go with a unit; float64 [units]. Reads no activations.

    Args:
        weights: each [out, in] with what a unit is in it: int64 [units, size] of its columns.
    """
    return torch.stack([weight.double().square().sum(0)[units].sum(1) for weight, units in weights]).sum(0)


def taylor_importance(weight: Tensor, gradients: Iterable[Tensor], units: Tensor) -> Tensor:
    """Sum over batches of (sum over a unit's weights of weight * gradient)²; float64 [units].

    Args:
        weight: floating [out, in].
        gradients: floating [out, in] for each batch, of the loss with respect to the weight.
        units: int64 [units, size].
    """
    wide, units = weight.double(), units.to(weight.device)
    total = torch.zeros(len(units), dtype=torch.float64, device=weight.device)
    for gradient in gradients:
        total += (wide * gradient.double()).sum(0)[units].sum(1).square()
    return total


def most_important(scores: Tensor, keep: int) -> Tensor:
    """int64 [keep], the units of the highest scores, ascending; of equals the first."""
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def choose(weight: Tensor, gram: Tensor, units: Tensor, keep: int, damping: float = 0.01) -> Tensor:
    """The units to keep, int64 [keep], ascending: the others go one after the other, each the least important once what
    went before it has been made up for.

    Args:
        weight: floating [out, in]. gram: floating [in, in] of its input.
        units: int64 [units, size].
        keep: how many stay, the same in every layer.
        damping: as for `compensated_importance`.

    Raises:
        NumericalError: a Gram matrix with NaN or Inf.
    """
    wide, inverse = _seen(weight, gram), _inverse(gram, damping)
    units, alive = units.to(weight.device), torch.arange(len(units), device=weight.device)
    batch = -(-(len(units) - keep) // _ROUNDS)
    while len(alive) > keep:
        count = min(batch, len(alive) - keep)
        scores = _scores(wide, inverse, units[alive])
        pool = scores.argsort(stable=True)[: _POOL * count]
        gone = pool[_least_in_turn(wide, inverse, units[alive[pool]], count)]
        _drop_(wide, inverse, units[alive[gone]].flatten())
        left = torch.ones(len(alive), dtype=torch.bool, device=weight.device)
        left[gone] = False
        alive = alive[left]
    return alive


def compensate(weight: Tensor, gram: Tensor, kept: Tensor, damping: float = 0.01) -> Tensor:
    """The columns that are left, refitted to the outputs of all: W_K + W_R G_RK (G_KK + d I)^-1, in the weight's dtype.

    The ridge holds them where they are: nothing moves where nothing is removed or where an input was never seen.

    Args:
        weight: floating [out, in]. gram: floating [in, in] of its input.
        kept: int64 [kept], columns.
        damping: d as a share of the mean diagonal, ten times more each time that does not factor.

    Returns:
        [out, kept], columns in the order of `kept`.
    """
    kept, removed = kept.to(weight.device), torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[kept] = False
    coupling = weight[:, removed].double() @ gram[removed][:, kept].double()
    moved = solve_damped(gram[kept][:, kept].double(), coupling, damping)
    return (weight[:, kept].double() + moved).to(weight.dtype)


def _seen(weight: Tensor, gram: Tensor) -> Tensor:
    """float64 [out, in], zero where an input was never active: such a column costs nothing, damping or not."""
    wide = weight.to(torch.float64, copy=True)
    wide[:, gram.diagonal() == 0] = 0
    return wide


def _squares(wide: Tensor, units: Tensor) -> Tensor:
    """W_u' W_u, [units, size, size]."""
    columns = wide.T[units.to(wide.device)]  # [units, size, out]
    return columns @ columns.transpose(1, 2)


def _blocks(matrix: Tensor, units: Tensor) -> Tensor:
    """M_uu, [units, size, size]."""
    there = units.to(matrix.device)
    return matrix[there.unsqueeze(2), there.unsqueeze(1)]


def _scores(wide: Tensor, inverse: Tensor, units: Tensor) -> Tensor:
    """tr(W_u ([H^-1]_uu)^-1 W_u'), float64 [units]."""
    lower = torch.linalg.cholesky(_blocks(inverse, units))
    solved = torch.cholesky_solve(_squares(wide, units), lower)
    return solved.diagonal(dim1=1, dim2=2).sum(1)


def _inverse(gram: Tensor, damping: float) -> Tensor:
    """(G + d I)^-1, float64 [in, in]."""
    return torch.cholesky_inverse(damped_factor(gram.to(torch.float64, copy=True), damping))


def _least_in_turn(wide: Tensor, inverse: Tensor, units: Tensor, count: int) -> Tensor:
    """int64 [count]: which of these units go, one after the other, each the least important after those before it."""
    columns = units.flatten()
    own, local = wide[:, columns].clone(), inverse[columns][:, columns]
    here = torch.arange(len(columns), device=wide.device).reshape(units.shape)
    left = list(range(len(units)))
    for _ in range(count):
        least = left[int(_scores(own, local, here[left]).argmin())]
        _drop_(own, local, here[least])
        left.remove(least)
    gone = torch.ones(len(units), dtype=torch.bool, device=wide.device)
    gone[left] = False
    return gone.nonzero().flatten()


def _drop_(wide: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Remove columns: the others take over what they can, and H^-1 becomes that of what is left (where columns are gone
    nothing but rounding is left)."""
    rows = inverse[columns]  # [k, in]
    lower = torch.linalg.cholesky(rows[:, columns])
    half = torch.linalg.solve_triangular(lower, rows, upper=False)  # L^-1 [H^-1]_S:
    share = torch.linalg.solve_triangular(lower, wide[:, columns].T, upper=False)  # L^-1 W_S'
    wide.addmm_(share.T, half, alpha=-1)
    inverse.addmm_(half.T, half, alpha=-1)
