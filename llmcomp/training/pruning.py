"""Which weights are removed while a model is trained: schedule, scores, masks, and weights that act under one.

A mask is bool of a weight's shape as methods see it, [out, in], True where kept. It acts as a parametrization of the
module's weight: whatever an optimizer does to what lies under it, the model computes with zeros where weights are
removed. It is a buffer beside the weight, and training states hold it.

    magnitude   scores |W|; what was removed stays removed      Zhu and Gupta, arXiv:1710.01878
    movement    scores S are learned: dL/dS = dL/dW' W          Sanh, Wolf and Rush, arXiv:2005.07683
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmcomp.methods._masks import grouped_mask
from llmcomp.patterns import Pattern

WEIGHT = "weight"


def cubic_sparsity(step: int, *, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """The share that is removed after `step` steps, final + (initial - final) (1 - (step - begin) / (end - begin))³
    (arXiv:1710.01878, equation 1): fast while there is much to choose from, slowly at the end.

    Args:
        begin, end: steps between which it rises; before them `initial`, after them `final`.

    >>> [cubic_sparsity(step, begin=2, end=6, final=0.8) for step in (0, 2, 4, 6, 9)]
    [0.0, 0.0, 0.7, 0.8, 0.8]
    """
    left = 1 - min(1.0, max(0.0, (step - begin) / (end - begin)))
    return final + (initial - final) * left**3


def ticket_sparsity(round_: int, rounds: int, final: float) -> float:
    """The share that is removed after so many rounds, each of which removes the same share of what is left
    (arXiv:1803.03635): 1 - (1 - final)^(round / rounds).

    >>> [round(ticket_sparsity(n, 2, 0.75), 6) for n in range(3)]
    [0.0, 0.5, 0.75]
    """
    return final if round_ == rounds else 1 - (1 - final) ** (round_ / rounds)


def masks_of(
    scores: Mapping[str, Tensor], pattern: Pattern, sparsity: float, held: Mapping[str, Tensor] | None = None,
    together: bool = False,
) -> dict[str, Tensor]:
    """Masks that remove the weights of the lowest scores, in exact counts.

    On the way to N:M only what N:M would remove of each group is removed, the lowest first, so the last mask is exactly
    N:M and every earlier one lies around it.

    Args:
        scores: {name: float [out, in]}.
        sparsity: the share that is removed now, at most the pattern's.
        held: masks of before: what they have removed stays removed and counts.
        together: the weights of all matrices compete; else those of each.
    """
    low: dict[str, Tensor] = {}
    for name, own in scores.items():
        ranked = own.detach().float()
        if held is not None:
            ranked = ranked.masked_fill(~held[name], -math.inf)
        if pattern.group is not None:
            ranked = ranked.masked_fill(grouped_mask(ranked, pattern), math.inf)
        low[name] = ranked
    if not together:
        return {name: ~lowest(ranked, _count(sparsity, ranked.numel())) for name, ranked in low.items()}
    every = torch.cat([ranked.flatten() for ranked in low.values()])
    kept = ~lowest(every, _count(sparsity, len(every)))
    parts = kept.split([ranked.numel() for ranked in low.values()])
    return {name: part.view(ranked.shape) for (name, ranked), part in zip(low.items(), parts, strict=True)}


def lowest(scores: Tensor, count: int) -> Tensor:
    """bool of the scores' shape, True for the `count` lowest; of equal ones the last."""
    flat = scores.flatten()
    if not count:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    threshold = flat.kthvalue(count).values
    found = flat < threshold
    tied = (flat == threshold).nonzero().flatten()
    found[tied[len(tied) - (count - int(found.sum())) :]] = True
    return found.view(scores.shape)


def _count(sparsity: float, weights: int) -> int:
    return math.floor(sparsity * weights + 0.5)


class Movement(torch.autograd.Function):
    """W' = W ∘ M, whose mask is taken for the scores themselves on the way back: dL/dW = dL/dW' ∘ M and
    dL/dS = dL/dW' ∘ W, also where a weight is removed (arXiv:2005.07683, section 4)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return torch.where(mask, weight, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, mask = ctx.saved_tensors
        return torch.where(mask, gradients[0], 0), gradients[0] * weight, None


class Masked(nn.Module):
    """A parametrization: a weight under a mask.

    Args:
        weight: as the module holds it.
        learned: whether there are scores that learn, from zero.
        transposed: the module holds [in, out].
    """

    def __init__(self, weight: Tensor, learned: bool, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.mask: Tensor
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
        self.scores = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32)) if learned else None

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the module computes with, of its shape."""
        if self.scores is None:
            return torch.where(self.mask, weight, 0)
        masked: Tensor = Movement.apply(weight, self.scores, self.mask)
        return masked

    def seen(self, tensor: Tensor) -> Tensor:
        """What the module holds, as [out, in]; and back again."""
        return tensor.t() if self.transposed else tensor


@dataclass(frozen=True)
class Under:
    """A module whose weight is under a mask. `weight`: all of it, what is under the mask as it was, [out, in]."""

    module: Any
    held: Masked

    @property
    def weight(self) -> Tensor:
        original: Tensor = self.module.parametrizations[WEIGHT].original
        return self.held.seen(original.detach())

    @property
    def mask(self) -> Tensor:
        """[out, in]."""
        return self.held.seen(self.held.mask)

    @property
    def scores(self) -> Tensor:
        """Those that are learned, [out, in]."""
        assert self.held.scores is not None  # asked of movement alone
        return self.held.seen(self.held.scores)

    def put(self, mask: Tensor) -> None:
        """Set the mask, [out, in]."""
        self.held.mask.copy_(self.held.seen(mask))


def put_masks(model: nn.Module, names: Mapping[str, bool], *, learned: bool) -> None:
    """Put weights under masks that keep all.

    Args:
        names: {module: whether it holds its weight [in, out]}.
        learned: whether scores learn.
    """
    for name, transposed in names.items():
        module = model.get_submodule(name)
        weight: Any = module.weight
        parametrize.register_parametrization(module, WEIGHT, Masked(weight.detach(), learned, transposed))


def under_masks(model: nn.Module) -> dict[str, Under]:
    """{module: what is under a mask}, in the model's order."""
    found = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, WEIGHT):
            first = module.parametrizations[WEIGHT][0]  # type: ignore[index, union-attr]
            if isinstance(first, Masked):
                found[name] = Under(module, first)
    return found


def mask_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The masks by their names as buffers, as training states hold them."""
    for name, module in model.named_modules():
        if isinstance(module, Masked):
            yield f"{name}.mask", module.mask


def fold(model: nn.Module) -> dict[str, Tensor]:
    """Make removed weights zeros of plain parameters; the masks, bool of the shapes that the modules hold."""
    masks = {}
    for name, under in under_masks(model).items():
        masks[name] = under.held.mask.clone()
        parametrize.remove_parametrizations(under.module, WEIGHT, leave_parametrized=True)
    return masks


# --- when, and by what ---


@dataclass(frozen=True)
class Span:
    """The steps in which the share that is removed rises.

    Attributes:
        begin, end: shares of all steps. every: steps between changes of the mask. initial: the share at the begin.
    """

    begin: float = 0.1
    end: float = 0.7
    every: int = 1
    initial: float = 0.0

    def steps(self, total: int) -> tuple[int, int]:
        """(first, last) of `total` steps; at least one lies between them."""
        first = min(int(self.begin * total), total - 1)
        return first, max(first + 1, round(self.end * total))

    def due(self, step: int, total: int, *, after: bool) -> bool:
        """Whether masks change after `step` steps.

        Args:
            after: whether they go on to change when the last share is reached, as learned scores do.
        """
        first, last = self.steps(total)
        regular = step >= first and (step - first) % self.every == 0
        return step == last or (regular and step < last) or (after and step > last)

    def share(self, step: int, total: int, final: float) -> float:
        """Removed after `step` steps."""
        first, last = self.steps(total)
        return cubic_sparsity(step, begin=first, end=last, final=final, initial=self.initial)


def magnitudes(found: Mapping[str, Under]) -> dict[str, Tensor]:
    """|W|, of what is under masks, too."""
    return {name: under.weight.abs() for name, under in found.items()}


def learned_scores(found: Mapping[str, Under]) -> dict[str, Tensor]:
    """S."""
    return {name: under.scores for name, under in found.items()}


Scores = Callable[[Mapping[str, Under]], dict[str, Tensor]]


def above(scores: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Masks of soft movement: what has σ(S) above a threshold (arXiv:2005.07683, section 4.1)."""
    return {name: own.detach().sigmoid() > threshold for name, own in scores.items()}


def penalty(scores: Mapping[str, Tensor]) -> Tensor:
    """Mean of σ(S) over all weights, by which soft movement is pushed to remove; a scalar with a gradient."""
    count = sum(own.numel() for own in scores.values())
    return torch.stack([own.sigmoid().sum() for own in scores.values()]).sum() / count
