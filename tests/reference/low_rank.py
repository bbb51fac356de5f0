"""Low rank as the papers write it, in float64: whitening by a factor of the Gram matrix, a full SVD, an inverse."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def loss(error: Tensor, gram: Tensor) -> float:
    """tr(E G E')."""
    wide = error.double()
    return float(((wide @ gram.double()) * wide).sum())


def root(gram: Tensor) -> Tensor:
    """S [in, in] with S S' = G, by NumPy's eigendecomposition: also where G is singular."""
    values, vectors = np.linalg.eigh(gram.double().numpy())
    return torch.from_numpy(vectors * np.sqrt(values.clip(min=0)))


def singular_values(weight: Tensor, gram: Tensor) -> Tensor:
    """Of W S, falling; float64."""
    return torch.from_numpy(np.linalg.svd((weight.double() @ root(gram)).numpy(), compute_uv=False))


def bound(weight: Tensor, gram: Tensor, rank: int) -> float:
    """The least loss of any factors of that rank (Eckart and Young)."""
    return float(singular_values(weight, gram)[rank:].square().sum())


def svd_llm(weight: Tensor, gram: Tensor, rank: int) -> Tensor:
    """SVD-LLM's W' = U_r Σ_r V_r' S^-1 with the Cholesky factor S of a regular G."""
    lower = np.linalg.cholesky(gram.double().numpy())
    left, values, right = np.linalg.svd(weight.double().numpy() @ lower, full_matrices=False)
    return torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank] @ np.linalg.inv(lower))


def asvd(weight: Tensor, sizes: Tensor, rank: int) -> Tensor:
    """ASVD's W' = U_r Σ_r V_r' S^-1 with S = diag(sizes)."""
    scale = sizes.double().numpy()
    left, values, right = np.linalg.svd(weight.double().numpy() * scale, full_matrices=False)
    return torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank] / scale)


def fitted_left(weight: Tensor, x: Tensor, now: Tensor, right: Tensor) -> Tensor:
    """argmin over L of ||X W' - X' R' L'||, by least squares on the tokens themselves."""
    outputs, hidden = (x.double() @ weight.double().T).numpy(), (now.double() @ right.double().T).numpy()
    return torch.from_numpy(np.linalg.lstsq(hidden, outputs, rcond=None)[0]).T


def fitted_right(weight: Tensor, x: Tensor, now: Tensor, left: Tensor) -> Tensor:
    """argmin over R of ||X W' - X' R' L'|| for a regular X': least squares on the tokens, then onto the left factor."""
    outputs = (x.double() @ weight.double().T).numpy()
    best = np.linalg.lstsq(now.double().numpy(), outputs, rcond=None)[0].T  # [out, in]
    return torch.from_numpy(np.linalg.lstsq(left.double().numpy(), best, rcond=None)[0])
