"""Pure functions of two models' outputs: no module, no state. Read by measuring and by training."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = Σ p (log p - log q), nats.

    Args:
        log_p, log_q: log-probabilities [..., classes]; log_p of the original, log_q of the compressed model.
            Entries that p gives no mass (-inf) count 0.

    Returns:
        [...], never below 0: what rounding leaves of equal distributions is cut off.

    >>> a = torch.tensor([[0.0, 1.0]]).log_softmax(-1)
    >>> kl_divergence(a, a)
    tensor([0.])
    """
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1).clamp_min(0.0)
