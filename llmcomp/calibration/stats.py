"""What calibration knows of one linear's input. Every method reads the same statistics.

The Gram matrix X'X (half of GPTQ's Hessian 2 X'X / n, up to a factor that no method depends on) carries the
per-channel norms on its diagonal; maxima are kept beside it because no second moment holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class InputStats:
    """Sufficient statistics of the inputs X [tokens, in] of one linear, or of several that share them.

    Attributes:
        gram: float32 [in, in], X'X summed over tokens (padding excluded). Symmetric.
        absmax: float32 [in], the largest |x| a channel has shown.
        tokens: how many rows of X were summed.
    """

    gram: Tensor
    absmax: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> InputStats:
        """Statistics of no token at all, to be filled."""
        return cls(
            gram=torch.zeros(in_features, in_features, dtype=torch.float32, device=device),
            absmax=torch.zeros(in_features, dtype=torch.float32, device=device),
        )

    @property
    def norms(self) -> Tensor:
        """Euclidean norm of each input channel over all tokens, float32 [in]."""
        return self.gram.diagonal().clamp_min(0).sqrt()
