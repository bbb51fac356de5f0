"""The metrics work without network and files and agree with scikit-learn and scipy; so do their intervals."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from llmcomp.measure import bootstrap, metrics, summaries


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No connection can be made; whatever lands in the cache or temporary directory shows."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a metric tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))
    return tmp_path


def test_values_without_network_or_files(sealed: Path) -> None:
    y, p = np.array([0, 1, 1, 0, 1]), np.array([0, 1, 0, 0, 1])
    assert metrics.Accuracy().compute(predictions=p, references=y) == {"accuracy": 0.8}
    assert metrics.F1().compute(predictions=p, references=y)["f1"] == pytest.approx(0.8)
    three = metrics.F1().compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2])
    assert three["f1"] == pytest.approx(f1_score([0, 1, 1, 2], [0, 1, 2, 2], average="macro"))
    x = np.array([0.1, 0.5, 0.4, 0.9, 2.0])
    assert metrics.Pearson().compute(predictions=x, references=y)["pearson"] == stats.pearsonr(x, y)[0]
    assert metrics.Spearman().compute(predictions=x, references=y)["spearman"] == stats.spearmanr(x, y)[0]
    ppl = metrics.Perplexity().compute(predictions=[2.0, 4.0], references=[1, 2])
    assert ppl == {"perplexity": pytest.approx(np.exp(2.0)), "mean_nll": pytest.approx(2.0)}
    kl = metrics.KLDivergence().compute(predictions=np.arange(101.0))
    assert kl == {"kl_mean": 50.0, "kl_p99": 99.0}
    assert metrics.Top1Agreement().compute(predictions=p, references=y) == {"top1_agreement": 0.8}
    assert list(sealed.iterdir()) == []


def test_batches_add_up(sealed: Path) -> None:
    metric = metrics.Accuracy()
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=[1, 1], references=[1, 1])
    assert metric.compute() == {"accuracy": 0.75}


@pytest.mark.parametrize(("classes", "average"), [(2, "binary"), (4, "macro")])
def test_f1_of_many_resamples_is_scikit_learns(classes: int, average: str) -> None:
    rng = np.random.default_rng(0)
    predicted, true = rng.integers(0, classes, (2, 20, 9))
    expected = [
        f1_score(t, p, average=average, zero_division=0.0) for t, p in zip(true, predicted, strict=True)
    ]
    np.testing.assert_allclose(bootstrap.f1(predicted, true, average), expected)


def test_correlations_of_many_resamples_are_scipys() -> None:
    x, y = np.random.default_rng(1).integers(0, 5, (2, 6, 12)).astype(float)
    for row, found in enumerate(bootstrap.pearson(x, y)):
        assert found == pytest.approx(stats.pearsonr(x[row], y[row])[0])
    for row, found in enumerate(bootstrap.spearman(x, y)):
        assert found == pytest.approx(stats.spearmanr(x[row], y[row])[0])


def test_interval_is_the_percentile_interval_of_scipy() -> None:
    values = np.random.default_rng(2).normal(3.0, 1.0, 60)
    found = bootstrap.interval(lambda v: v.mean(-1), float(values.mean()), values)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=5000, method="percentile", rng=0
    ).confidence_interval
    assert found.low == pytest.approx(theirs.low, abs=0.03)
    assert found.high == pytest.approx(theirs.high, abs=0.03)
    assert found == bootstrap.interval(lambda v: v.mean(-1), float(values.mean()), values)


def test_coverage_of_the_interval() -> None:
    """Of 200 data sets, roughly 95% of the intervals hold the true mean."""
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        sums, counts = rng.normal(5.0, 2.0, 40), np.ones(40)
        found = bootstrap.interval(bootstrap.ratio, float(sums.mean()), sums, counts)
        hits += found.low <= 5.0 <= found.high
    assert 180 <= hits <= 199


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 500), st.integers(1, 60)), min_size=1, max_size=30))
def test_interval_holds_its_value(windows: list[tuple[float, int]]) -> None:
    nll, tokens = (
        np.array(column, dtype=kind)
        for column, kind in zip(zip(*windows, strict=True), (float, int), strict=True)
    )
    value = float(bootstrap.perplexity(nll, tokens))
    found = bootstrap.interval(bootstrap.perplexity, value, nll, tokens, resamples=100)
    assert found.low <= found.value == value <= found.high


def test_a_correlation_that_is_not_defined_is_left_out() -> None:
    assert summaries.scores(np.ones(5), np.arange(5.0), "x").metrics == {}
    assert set(summaries.scores(np.arange(5.0), np.arange(5.0), "x").metrics) == {"pearson", "spearman"}
