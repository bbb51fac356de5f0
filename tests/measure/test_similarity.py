"""Spearman, cosine and overlap of neighbours against slow float64 loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from llmcomp.measure import similarity
from llmcomp.report.schema import Quality


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """0 where one of them has no direction."""
    lengths = float(np.sqrt(sum(a * a)) * np.sqrt(sum(b * b)))
    return float(sum(a * b)) / lengths if lengths else 0.0


def cosines(embeddings: np.ndarray) -> np.ndarray:
    return np.array([[cosine(a, b) for b in embeddings] for a in embeddings])


def neighbours(similar: np.ndarray, text: int, count: int) -> list[int]:
    others = [other for other in range(len(similar)) if other != text]
    return sorted(others, key=lambda other: -similar[text, other])[:count]


def clear(similar: np.ndarray, count: int) -> bool:
    """Whether nobody's last neighbour and the next one are so alike that rounding decides between them."""
    for text, row in enumerate(similar):
        ordered = np.sort(np.delete(row, text))[::-1]
        if ordered[count - 1] - ordered[count] < 1e-9:
            return False
    return True


@st.composite
def two_models(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Embeddings of the same texts by two models, which may differ in width, and how many neighbours."""
    texts = draw(st.integers(3, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))  # elements of hypothesis' own are mostly ties
    one, other = (rng.normal(size=(texts, draw(st.integers(2, 5)))) for _ in range(2))
    return one * rng.uniform(0.1, 9, (texts, 1)), other, draw(st.integers(1, texts - 2))


@settings(deadline=None, max_examples=60)
@given(two_models(), st.integers(1, 5))
def test_kept_neighbours_against_loops(models: tuple[np.ndarray, np.ndarray, int], at_once: int) -> None:
    one, other, count = models
    similar = cosines(one), cosines(other)
    assume(all(clear(matrix, count) for matrix in similar))
    expected = [
        len(set(neighbours(similar[0], text, count)) & set(neighbours(similar[1], text, count)))
        for text in range(len(one))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "_QUERIES_AT_ONCE", at_once)  # chunks do not show
        assert similarity.kept_neighbours(one, other, count).tolist() == expected


@settings(deadline=None, max_examples=60)
@given(two_models(), st.floats(0.1, 100), st.randoms(use_true_random=False))
def test_kept_neighbours_depend_on_directions_alone(
    models: tuple[np.ndarray, np.ndarray, int], factor: float, random: object
) -> None:
    one, other, count = models
    assume(all(clear(cosines(matrix), count) for matrix in (one, other)))
    kept = similarity.kept_neighbours(one, other, count)
    assert kept.dtype == np.int64 and (kept >= 0).all() and (kept <= count).all()
    assert (similarity.kept_neighbours(other, one, count) == kept).all()
    assert (similarity.kept_neighbours(one * factor, one[:, ::-1], count) == count).all()
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(one.shape[1],) * 2))[0]
    assert (similarity.kept_neighbours(one @ turned, other, count) == kept).all()
    order = list(range(len(one)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert (similarity.kept_neighbours(one[order], other[order], count) == kept[order]).all()


def test_a_text_is_not_its_own_neighbour() -> None:
    one = np.eye(4) + 0.1
    other = one[[1, 0, 3, 2]]
    assert similarity.kept_neighbours(one, other, 3).tolist() == [3, 3, 3, 3], (
        "all others, whatever the order"
    )


def test_of_equally_near_texts_the_first_count() -> None:
    one, other = np.eye(6), np.eye(6)
    other[0, 5] = 1.0  # 0 and 5 draw near; to the rest all are still equally near
    assert similarity.kept_neighbours(one, other, 2).tolist() == [1, 2, 2, 2, 2, 2]


@pytest.fixture(scope="module")
def measured() -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Embeddings of 40 texts by two models of unequal lengths, 20 pairs, and scores with ties."""
    rng = np.random.default_rng(0)
    one = rng.normal(size=(40, 6)) * rng.uniform(0.1, 9, (40, 1))
    other = one + rng.normal(size=one.shape) * 0.5
    pairs = rng.permutation(40).reshape(20, 2)
    return [one, other], pairs, rng.integers(0, 5, 20).astype(float)


def found(quality: Quality | None) -> dict[str, float]:
    assert quality is not None and quality.samples == 20 and quality.tokens == 0 and quality.data == "x"
    assert all(one.low <= one.value <= one.high for one in quality.metrics.values())
    return {name: one.value for name, one in quality.metrics.items()}


def test_both_models_on_scored_pairs(measured: tuple[list[np.ndarray], np.ndarray, np.ndarray]) -> None:
    embeddings, pairs, scores = measured
    before, after = similarity.qualities(embeddings, pairs, scores, "x")
    alike = [[cosine(one[a], one[b]) for a, b in pairs] for one in embeddings]
    assert found(before) == {"spearman": pytest.approx(stats.spearmanr(alike[0], scores)[0], abs=1e-12)}
    similar = [cosines(one) for one in embeddings]
    kept = [len({*neighbours(similar[0], n, 10)} & {*neighbours(similar[1], n, 10)}) / 10 for n in range(40)]
    same = [cosine(a, b) for a, b in zip(*embeddings, strict=True)]
    assert found(after) == {
        "spearman": pytest.approx(stats.spearmanr(alike[1], scores)[0], abs=1e-12),
        "similarity_spearman": pytest.approx(stats.spearmanr(alike[1], alike[0])[0], abs=1e-12),
        "embedding_cosine": pytest.approx(np.mean(same), abs=1e-12),
        "overlap_at_10": pytest.approx(np.mean(kept), abs=1e-12),
    }
    assert after is not None
    for name in ("overlap_at_10", "embedding_cosine", "spearman"):
        assert after.metrics[name].low < after.metrics[name].high
    assert similarity.qualities(embeddings, pairs, scores, "x") == (before, after), "one seed, one interval"


def test_without_scores_or_without_an_original(
    measured: tuple[list[np.ndarray], np.ndarray, np.ndarray],
) -> None:
    embeddings, pairs, scores = measured
    before, after = similarity.qualities(embeddings, pairs, None, "x")
    assert before is None
    assert set(found(after)) == {"similarity_spearman", "embedding_cosine", "overlap_at_10"}
    none, alone = similarity.qualities(embeddings[:1], pairs, scores, "x")
    assert none is None and set(found(alone)) == {"spearman"}
    assert similarity.qualities(embeddings[:1], pairs, None, "x") == (None, None)


def test_the_same_model_twice(measured: tuple[list[np.ndarray], np.ndarray, np.ndarray]) -> None:
    embeddings, pairs, scores = measured
    before, after = similarity.qualities([embeddings[0]] * 2, pairs, scores, "x")
    values = found(after)
    assert values.pop("spearman") == found(before)["spearman"]
    assert values == {name: pytest.approx(1.0) for name in values} and len(values) == 3


def test_what_is_not_defined_is_left_out() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(2, 11, 4))
    pairs = np.arange(10).reshape(5, 2)

    def names(*models: np.ndarray, scores: np.ndarray | None = None) -> set[str]:
        after = similarity.qualities(list(models), pairs[: len(models[0]) // 2], scores, "x")[1]
        return set(after.metrics) if after is not None else set()

    assert names(one, other, scores=np.ones(5)) == {"similarity_spearman", "embedding_cosine"}, (
        "all ten others are near"
    )
    assert names(one, np.ones_like(one)) == {"embedding_cosine"}, "all texts alike"
    assert names(one, other[:, :3]) == {"similarity_spearman"}, "widths differ"
    assert names(one[:3], other[:3], scores=np.ones(1)) == {"embedding_cosine"}, "one pair"
    assert "overlap_at_10" in names(np.vstack([one, one[:1] * -1]), np.vstack([other, other[:1]]))


def test_an_embedding_without_direction_counts_as_unlike_all() -> None:
    rng = np.random.default_rng(2)
    one = rng.normal(size=(12, 3))
    one[4] = 0
    after = similarity.qualities([one, one], np.arange(12).reshape(6, 2), None, "x")[1]
    assert after is not None and after.metrics["embedding_cosine"].value == pytest.approx(11 / 12)
