"""The measures of quality as `evaluate.Metric` classes, ready to instantiate without network.

`evaluate.load("accuracy")` fetches a script from the Hub; nothing ships in the library's wheel. These classes
are instantiated directly, hold their inputs in memory and leave no file behind. scikit-learn and scipy do the
arithmetic. `import evaluate` takes seconds: import this module inside the function that needs it.

    >>> Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 0])
    {'accuracy': 0.6666666666666666}
    >>> Perplexity().compute(predictions=[0.0, 0.0], references=[3, 5])
    {'perplexity': 1.0, 'mean_nll': 0.0}
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score

Numbers = np.ndarray


class LocalMetric(evaluate.Metric):
    """A metric that keeps predictions in memory.

    The base class makes a cache directory on construction even then: it gets one that is removed at once.
    Subclasses state `about`, `inputs` and `columns`, and compute in `value`.
    """

    about: str
    inputs: str
    columns: dict[str, str]
    value: Callable[..., dict[str, float]]

    def __init__(self, **settings: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="llmcomp-metric-") as unused:
            super().__init__(cache_dir=unused, keep_in_memory=True, **settings)

    def _info(self) -> evaluate.MetricInfo:
        features = Features({name: Value(kind) for name, kind in self.columns.items()})
        return evaluate.MetricInfo(
            description=self.about,
            citation="",
            inputs_description=self.inputs,
            features=features,
        )

    def _compute(self, **inputs: Any) -> dict[str, float]:
        # Columns arrive as lists: the library's own numpy format would round float64 to float32.
        settings = {name: given for name, given in inputs.items() if name not in self.columns}
        return self.value(**{name: np.asarray(inputs[name]) for name in self.columns}, **settings)


class Perplexity(LocalMetric):
    """exp(sum of negative log-likelihoods / number of scored tokens), over all windows together."""

    about = "Perplexity over windows, each token counted once."
    inputs = (
        "predictions: summed negative log-likelihood of each window, nats; references: its scored tokens."
    )
    columns = {"predictions": "float64", "references": "int64"}  # noqa: RUF012

    def value(self, predictions: Numbers, references: Numbers) -> dict[str, float]:
        mean = float(predictions.sum() / references.sum())
        return {"perplexity": float(np.exp(mean)), "mean_nll": mean}


class Accuracy(LocalMetric):
    """Share of rows whose predicted class is the label."""

    about = "Share of right predictions."
    inputs = "predictions: predicted class; references: label."
    columns = {"predictions": "int64", "references": "int64"}  # noqa: RUF012

    def value(self, predictions: Numbers, references: Numbers) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(LocalMetric):
    """F1 of class 1 where the labels are 0 and 1, else the macro mean over the classes that occur."""

    about = "F1: of class 1 for two classes, macro mean for more."
    inputs = "predictions: predicted class; references: label; average: 'binary' or 'macro', None to choose."
    columns = {"predictions": "int64", "references": "int64"}  # noqa: RUF012

    def value(
        self, predictions: Numbers, references: Numbers, average: str | None = None
    ) -> dict[str, float]:
        if average is None:
            average = "binary" if set(references) | set(predictions) <= {0, 1} else "macro"
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0.0))}


class Pearson(LocalMetric):
    """Linear correlation of scores with references."""

    about = "Pearson's r."
    inputs = "predictions: scores; references: true values."
    columns = {"predictions": "float64", "references": "float64"}  # noqa: RUF012

    def value(self, predictions: Numbers, references: Numbers) -> dict[str, float]:
        return {"pearson": float(stats.pearsonr(predictions, references).statistic)}


class Spearman(LocalMetric):
    """Rank correlation of scores with references."""

    about = "Spearman's rho."
    inputs = "predictions: scores; references: true values."
    columns = {"predictions": "float64", "references": "float64"}  # noqa: RUF012

    def value(self, predictions: Numbers, references: Numbers) -> dict[str, float]:
        return {"spearman": float(stats.spearmanr(predictions, references).statistic)}


class KLDivergence(LocalMetric):
    """Mean and 99th percentile of KL(original || compressed).

    Takes the divergence of each position (`llmcomp.losses.kl_divergence`), not the distributions: a large
    vocabulary never has to be held for all positions at once.
    """

    about = "Mean and 99th percentile of KL divergence over positions."
    inputs = "predictions: KL(original || compressed) of each position, nats."
    columns = {"predictions": "float64"}  # noqa: RUF012

    def value(self, predictions: Numbers) -> dict[str, float]:
        return {"kl_mean": float(predictions.mean()), "kl_p99": float(np.quantile(predictions, 0.99))}


class Top1Agreement(LocalMetric):
    """Share of positions where original and compressed model prefer the same token or class."""

    about = "Share of positions with the same most likely token or class."
    inputs = "predictions: the compressed model's choice; references: the original's."
    columns = {"predictions": "int64", "references": "int64"}  # noqa: RUF012

    def value(self, predictions: Numbers, references: Numbers) -> dict[str, float]:
        return {"top1_agreement": float((predictions == references).mean())}


class EmbeddingCosine(LocalMetric):
    """Mean cosine between original's and compressed model's embedding of one text."""

    about = "Mean cosine between two models' embeddings of the same text."
    inputs = "predictions: cosine of each text."
    columns = {"predictions": "float64"}  # noqa: RUF012

    def value(self, predictions: Numbers) -> dict[str, float]:
        return {"embedding_cosine": float(predictions.mean())}


class NeighbourOverlap(LocalMetric):
    """Share of the original's ten nearest neighbours that the compressed model finds too, mean over texts.

    Takes how many are kept of each text (`similarity.kept_neighbours`), not the embeddings.
    """

    about = "Retrieval overlap at 10."
    inputs = "predictions: how many of a text's ten nearest neighbours are the same, 0 to 10."
    columns = {"predictions": "int64"}  # noqa: RUF012

    def value(self, predictions: Numbers) -> dict[str, float]:
        return {"overlap_at_10": float(predictions.mean() / 10)}
