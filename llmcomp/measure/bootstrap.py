"""Bootstrap 95% intervals: the percentile method over windows or rows (Efron & Tibshirani 1993, chapter 13).

Windows are resampled, not tokens: tokens of one window depend on each other, and intervals over tokens would
be too narrow. Statistics are written for many resamples at once, so 1,000 of them take milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from llmcomp.report.schema import Interval

RESAMPLES = 1000
_INDICES_AT_ONCE = 4_000_000  # 32 MB of indices


def interval(
    statistic: Callable[..., np.ndarray],
    value: float,
    *columns: np.ndarray,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """The 95% interval of `value` under resampling of rows.

    Args:
        statistic: takes each column as [resamples, rows], returns [resamples]; NaN where it is undefined.
        value: the estimate on the data itself.
        columns: [rows] each, resampled together.
        seed: of the resampling; equal seeds and rows give equal intervals.

    Returns:
        An interval that contains `value`: where the percentiles of a skewed statistic miss it, it is widened.
    """
    rng = np.random.default_rng(seed)
    rows = len(columns[0])
    at_once = max(1, _INDICES_AT_ONCE // rows)
    drawn = []
    for start in range(0, resamples, at_once):
        picks = rng.integers(0, rows, (min(at_once, resamples - start), rows))
        drawn.append(statistic(*(column[picks] for column in columns)))
    values = np.concatenate(drawn)
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(value, value, value)
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(value, float(min(low, value)), float(max(high, value)))


def ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Σ sums / Σ counts over the last axis: a mean over positions, resampled by window."""
    return np.asarray(sums.sum(-1) / counts.sum(-1))


def perplexity(nll: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """exp(Σ nll / Σ tokens) over the last axis."""
    return np.asarray(np.exp(ratio(nll, tokens)))


def f1(predictions: np.ndarray, references: np.ndarray, average: str) -> np.ndarray:
    """F1 over the last axis as scikit-learn defines it: of class 1 ('binary'), or the mean over classes that
    occur ('macro')."""
    classes = [1] if average == "binary" else np.union1d(predictions, references)
    scores = []
    for label in classes:
        predicted, true = predictions == label, references == label
        occurrences = predicted.sum(-1) + true.sum(-1)
        hits = (predicted & true).sum(-1)
        absent = 0.0 if average == "binary" else np.nan
        scores.append(np.where(occurrences > 0, 2 * hits / np.maximum(occurrences, 1), absent))
    return np.asarray(np.nanmean(scores, axis=0))


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation over the last axis; NaN where a resample is constant."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1)))


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation over the last axis; ties share their mean rank."""
    return pearson(stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1))
