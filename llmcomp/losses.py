"""Pure functions of two models' outputs: no module, no state. Read by measuring and by training."""

from __future__ import annotations

import torch
from torch import Tensor


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
