"""How good sentence embeddings are, and what of their geometry a compressed model keeps.

Against people's scores: Spearman's rho of cosine similarities (as in STS). Against the original: Spearman's
rho between both models' similarities, the cosine between both embeddings of one text, and the share of a
text's ten nearest neighbours that stay the same. Embeddings come as float64 [texts, width].
"""

from __future__ import annotations

import numpy as np

from llmcomp.measure import bootstrap
from llmcomp.report.schema import Interval, Quality

NEIGHBOURS = 10
_QUERIES_AT_ONCE = 256


def qualities(
    embeddings: list[np.ndarray], pairs: np.ndarray, scores: np.ndarray | None, data: str, seed: int = 0
) -> tuple[Quality | None, Quality | None]:
    """Before and after of [original, compressed], or None and after of [model].

    Args:
        embeddings: of each model, float64 [texts, width]; widths may differ between models.
        pairs: [pairs, 2], numbers of texts; scores: [pairs] or None.

    A figure that is not defined is left out: correlations of a constant or of fewer than two pairs, the
    overlap of neighbours where all other texts are neighbours. Intervals resample pairs and texts.
    """
    normal = [_normalized(one) for one in embeddings]
    alike = [(one[pairs[:, 0]] * one[pairs[:, 1]]).sum(-1) for one in normal]
    found: list[dict[str, Interval]] = [{} for _ in normal]
    if scores is not None:
        found = [_spearman("spearman", one, scores, seed) for one in alike]
    if len(normal) == 2:
        found[1] |= _spearman("similarity_spearman", alike[1], alike[0], seed)
        found[1] |= _geometry(normal[0], normal[1], seed)
    made = [Quality(metrics, len(pairs), 0, data) if metrics else None for metrics in found]
    return (made[0] if len(made) == 2 else None), made[-1]


def kept_neighbours(original: np.ndarray, compressed: np.ndarray, count: int = NEIGHBOURS) -> np.ndarray:
    """How many of each text's `count` nearest others (by cosine) are the same in both: int64 [texts].

    Args:
        original, compressed: embeddings [texts, width] of the same texts, more than `count` of them.
    """
    normal = [_normalized(one) for one in (original, compressed)]
    kept = []
    for start in range(0, len(original), _QUERIES_AT_ONCE):
        near, near_after = (_nearest(one, start, count) for one in normal)
        kept.append((near[:, :, None] == near_after[:, None, :]).any(-1).sum(-1))
    return np.concatenate(kept)


def _nearest(normal: np.ndarray, start: int, count: int) -> np.ndarray:
    """Numbers of the nearest others, nearest first, of one chunk of texts; of equally near the first."""
    similarity = normal[start : start + _QUERIES_AT_ONCE] @ normal.T
    itself = np.arange(len(similarity))
    similarity[itself, start + itself] = -np.inf
    return np.argsort(-similarity, axis=-1, kind="stable")[:, :count]


def _geometry(original: np.ndarray, compressed: np.ndarray, seed: int) -> dict[str, Interval]:
    from llmcomp.measure.metrics import EmbeddingCosine, NeighbourOverlap

    found: dict[str, Interval] = {}
    if original.shape == compressed.shape:
        same = (original * compressed).sum(-1)
        cosine = EmbeddingCosine().compute(predictions=same)["embedding_cosine"]
        found["embedding_cosine"] = bootstrap.interval(_mean, cosine, same, seed=seed)
    if len(original) > NEIGHBOURS + 1:
        kept = kept_neighbours(original, compressed)
        overlap = NeighbourOverlap().compute(predictions=kept)["overlap_at_10"]
        found["overlap_at_10"] = bootstrap.interval(_mean, overlap, kept / NEIGHBOURS, seed=seed)
    return found


def _spearman(name: str, alike: np.ndarray, reference: np.ndarray, seed: int) -> dict[str, Interval]:
    from llmcomp.measure.metrics import Spearman

    if len(alike) < 2 or not np.ptp(alike) or not np.ptp(reference):
        return {}
    value = Spearman().compute(predictions=alike, references=reference)["spearman"]
    return {name: bootstrap.interval(bootstrap.spearman, value, alike, reference, seed=seed)}


def _mean(values: np.ndarray) -> np.ndarray:
    return np.asarray(values.mean(-1))


def _normalized(embeddings: np.ndarray) -> np.ndarray:
    """Rows of length one; zeros stay zeros, whose cosine with anything then counts as 0."""
    lengths = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    return np.asarray(embeddings / np.where(lengths > 0, lengths, 1.0))
