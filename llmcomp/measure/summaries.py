"""From numbers per position and per row to the report's `Quality` and `Divergence`, with intervals."""

from __future__ import annotations

import numpy as np

from llmcomp.measure import bootstrap
from llmcomp.report.schema import Divergence, Interval, Quality


def language(nll: np.ndarray, tokens: np.ndarray, data: str, seed: int = 0) -> Quality:
    """Perplexity from summed negative log-likelihoods [windows] (nats) and scored tokens [windows]."""
    from llmcomp.measure.metrics import Perplexity

    value = Perplexity().compute(predictions=nll, references=tokens)["perplexity"]
    estimate = bootstrap.interval(bootstrap.perplexity, value, nll, tokens, seed=seed)
    return Quality({"perplexity": estimate}, len(nll), int(tokens.sum()), data)


def classes(logits: np.ndarray, labels: np.ndarray, data: str, seed: int = 0) -> Quality:
    """Accuracy and F1 (of class 1 for two classes, else macro) of logits [rows, classes], labels [rows]."""
    from llmcomp.measure.metrics import F1, Accuracy

    chosen = logits.argmax(-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"
    accuracy = Accuracy().compute(predictions=chosen, references=labels)["accuracy"]
    f1 = F1().compute(predictions=chosen, references=labels, average=average)["f1"]
    right = (chosen == labels).astype(np.float64)
    metrics = {
        "accuracy": bootstrap.interval(lambda r: r.mean(-1), accuracy, right, seed=seed),
        "f1": bootstrap.interval(lambda p, t: bootstrap.f1(p, t, average), f1, chosen, labels, seed=seed),
    }
    return Quality(metrics, len(labels), 0, data)


def scores(predicted: np.ndarray, true: np.ndarray, data: str, seed: int = 0) -> Quality:
    """Pearson and Spearman correlation of scores [rows] with true values [rows].

    A correlation that is not defined (a constant column, fewer than two rows) is left out.
    """
    from llmcomp.measure.metrics import Pearson, Spearman

    metrics: dict[str, Interval] = {}
    if len(true) > 1 and np.ptp(predicted) > 0 and np.ptp(true) > 0:
        for metric, statistic in ((Pearson(), bootstrap.pearson), (Spearman(), bootstrap.spearman)):
            value = metric.compute(predictions=predicted, references=true)[metric.name]
            metrics[metric.name] = bootstrap.interval(statistic, value, predicted, true, seed=seed)
    return Quality(metrics, len(true), 0, data)


def cosine(similarity: np.ndarray, windows: np.ndarray, data: str, seed: int = 0) -> Quality:
    """Mean cosine [positions] of two models' last hidden states; `windows` [positions] tells their window."""
    sums, counts = _by_window(similarity, windows)
    value = float(similarity.mean())
    return Quality(
        {"cosine": bootstrap.interval(bootstrap.ratio, value, sums, counts, seed=seed)}, len(sums), 0, data
    )


def divergence(
    kl: np.ndarray, original: np.ndarray, compressed: np.ndarray, windows: np.ndarray, seed: int = 0
) -> Divergence:
    """KL in nats, each model's choice, and the window or row of each position; all [positions]."""
    from llmcomp.measure.metrics import KLDivergence, Top1Agreement

    values = KLDivergence().compute(predictions=kl)
    agreement = Top1Agreement().compute(predictions=compressed, references=original)["top1_agreement"]
    sums, counts = _by_window(kl, windows)
    same, _ = _by_window((original == compressed).astype(np.float64), windows)
    return Divergence(
        kl_mean=bootstrap.interval(bootstrap.ratio, values["kl_mean"], sums, counts, seed=seed),
        kl_p99=values["kl_p99"],
        top1_agreement=bootstrap.interval(bootstrap.ratio, agreement, same, counts, seed=seed),
        positions=len(kl),
    )


def _by_window(values: np.ndarray, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of each window that has positions."""
    counts = np.bincount(windows)
    sums = np.bincount(windows, weights=values)
    return sums[counts > 0], counts[counts > 0]
