"""Pure functions of two models' outputs: no module, no state. Read by measuring and by training."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcomp.kept import Kept, alike


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = Σ p (log p - log q), nats.

    Args:
        log_p, log_q: log-probabilities [..., classes]; log_p of the original, log_q of the compressed model.
            Entries may be -inf; where q alone has no mass, the result is inf.

    Returns:
        [...], never below 0: what rounding leaves of equal distributions is cut off.

    >>> a = torch.tensor([[0.0, 1.0]]).log_softmax(-1)
    >>> kl_divergence(a, a)
    tensor([0.])
    """
    # Σ p d - p + q, which is the same sum but of terms that are never negative: between close distributions
    # p d alone cancels down to the rounding error of the logarithms (about 1e-7), which is then all one sees.
    d = log_p - log_q
    p, q = log_p.exp(), log_q.exp()
    terms = torch.where(d.abs() < 0.5, p * (d + torch.expm1(-d)), p * d - p + q)
    return torch.where(log_p == -torch.inf, q, terms).sum(-1).clamp_min(0.0)


IGNORED = -100  # the label of a position that has none, as transformers has it


def hard_targets(logits: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Cross entropy with labels, L = -1/n Σ log softmax(z)[y], nats.

    Args:
        logits: z [..., classes]. labels: y int64 [...], `IGNORED` where there is none.
        count: n, by default the number of labels here; that of a whole step where this is a part of it.

    Returns:
        A scalar in float32; 0 without labels.

    >>> hard_targets(torch.zeros(2, 4), torch.tensor([3, IGNORED]))
    tensor(1.3863)
    """
    total = F.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / _at_least_one(labels.ne(IGNORED).sum() if count is None else count)


def soft_targets(
    logits: Tensor, targets: Tensor | Kept, scored: Tensor, temperature: float = 1.0, count: Tensor | int | None = None
) -> Tensor:
    """A teacher's softened distribution, L = T²/n Σ KL(softmax(t/T) || softmax(z/T)), nats (Hinton et al.,
    arXiv:1503.02531). T² keeps the size of its gradients, which fall with 1/T², beside those of labels.

    n counts positions, not rows: `batchmean` of a three-dimensional tensor would divide by rows alone.

    Args:
        logits: z [..., classes]. targets: t, likewise, of which no gradient is asked. Where one has more classes, as
            vocabularies that are padded, the further ones are left out. Or what is `kept` of softmax(t/T) at the
            scored positions, one after the other.
        scored: bool [...], the positions that count.
        temperature: T.
        count: n, as in `hard_targets`, by default the number of scored positions.

    Returns:
        A scalar in float32; 0 where nothing is scored.

    >>> z = torch.tensor([[0.0, 1.0]])
    >>> soft_targets(z, z, torch.tensor([True]), temperature=2.0)
    tensor(0.)
    """
    log_q, log_p = _softened(logits, targets, scored, temperature)
    total = (log_p.exp() * (log_p - log_q)).sum()
    return temperature**2 * total / _at_least_one(scored.sum() if count is None else count)


def reverse_targets(
    logits: Tensor, targets: Tensor | Kept, scored: Tensor, temperature: float = 1.0, count: Tensor | int | None = None
) -> Tensor:
    """The divergence the other way, L = T²/n Σ KL(softmax(z/T) || softmax(t/T)), nats: the student stays where its
    teacher has mass instead of covering all of it (MiniLLM, arXiv:2306.08543).

    Args, returns: as `soft_targets`.

    >>> z = torch.tensor([[0.0, 1.0]])
    >>> reverse_targets(z, z, torch.tensor([True]))
    tensor(0.)
    """
    log_q, log_p = _softened(logits, targets, scored, temperature)
    total = (log_q.exp() * (log_q - log_p)).sum()
    return temperature**2 * total / _at_least_one(scored.sum() if count is None else count)


def jensen_shannon(
    logits: Tensor, targets: Tensor | Kept, scored: Tensor, temperature: float = 1.0, count: Tensor | int | None = None
) -> Tensor:
    """L = T²/n Σ [KL(p || m) + KL(q || m)] / 2 with m = (p + q) / 2, p the teacher's softened distribution and q the
    student's, nats: bounded by T² log 2 (generalized JSD with β = 1/2 of GKD, arXiv:2306.13649).

    Args, returns: as `soft_targets`.

    >>> z = torch.tensor([[0.0, 1.0]])
    >>> jensen_shannon(z, z, torch.tensor([True]))
    tensor(0.)
    """
    log_q, log_p = _softened(logits, targets, scored, temperature)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    total = (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum() / 2
    return temperature**2 * total / _at_least_one(scored.sum() if count is None else count)


def scores(logits: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Squared error of a regressor, L = 1/n Σ (z - y)².

    Args:
        logits: z [rows, 1]. labels: y [rows], NaN where there is none. count: n, as in `hard_targets`.

    Returns:
        A scalar in float32; 0 without labels.
    """
    known = labels.isfinite()
    total = (logits.float()[..., 0][known] - labels.float()[known]).square().sum()
    return total / _at_least_one(known.sum() if count is None else count)


def _softened(
    logits: Tensor, targets: Tensor | Kept, scored: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log q of the student and log p of the teacher at the scored positions, over the outcomes that both have."""
    if isinstance(targets, Kept):
        return alike(logits[scored], targets, temperature), targets.logs
    classes = min(logits.shape[-1], targets.shape[-1])
    log_q = (logits[scored][:, :classes].float() / temperature).log_softmax(-1)
    log_p = (targets[scored][:, :classes].detach().float() / temperature).log_softmax(-1)
    return log_q, log_p


def _at_least_one(count: Tensor | int) -> Tensor | int:
    return count.clamp_min(1) if isinstance(count, Tensor) else max(1, count)
