"""NF4 and LLM.int8 in float64, straight from the papers; slow and obvious.

NF4: Dettmers et al., 2023, arXiv:2305.14314, section 3 and appendix E. LLM.int8: Dettmers et al., 2022,
arXiv:2208.07339, equation 2, by rows. Nothing of bitsandbytes is used.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm
from torch import Tensor

OFFSET = 0.9677083  # appendix E: the mean of 1 - 1/(2·15) and 1 - 1/(2·16)


def nf4_levels() -> np.ndarray:
    """The 16 values of NormalFloat: 8 negative quantiles, zero, 7 positive ones, over the largest."""
    negative = norm.ppf(np.linspace(1 - OFFSET, 0.5, 8)[:-1])
    positive = norm.ppf(np.linspace(0.5, OFFSET, 9)[1:])
    return np.concatenate([negative, [0.0], positive]) / norm.ppf(OFFSET)


def nf4(weight: Tensor, block: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(decoded [out, in], float64; codes [out · in]; absmax, one a block of the flattened weight)."""
    flat, levels = weight.double().numpy().reshape(-1), nf4_levels()
    codes, absmax, decoded = np.zeros(flat.size, int), [], np.zeros(flat.size)
    for start in range(0, flat.size, block):
        part = flat[start : start + block]
        largest = np.abs(part).max()
        absmax.append(largest)
        for n, value in enumerate(part):
            ratio = value / largest if largest > 0 else 0.0
            codes[start + n] = np.abs(levels - ratio).argmin()
            decoded[start + n] = levels[codes[start + n]] * largest
    return decoded.reshape(tuple(weight.shape)), codes, np.array(absmax)


def int8(weight: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(decoded [out, in], float64; integers [out, in]; absmax [out]) of the weight as float16 holds it."""
    rows = weight.half().double().numpy()
    absmax = np.abs(rows).max(axis=1)
    safe = np.where(absmax > 0, absmax, 1.0)[:, None]
    integers = np.rint(rows * 127 / safe)
    return integers * absmax[:, None] / 127, integers, absmax
