"""From texts to pairs of embeddings: which texts, cut where, in which order; and a directory measured whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from tiny import PAD, tiny
from tiny_sentences import NARROW, sentence_encoder, write_json, write_pairs
from transformers import AutoModel, AutoTokenizer

from llmcomp.calibration.data import Texts, evaluation_texts
from llmcomp.errors import BadCheckpoint, BadData
from llmcomp.measure import load
from llmcomp.measure.embeddings import SentenceHead, read_head
from llmcomp.measure.inputs import Inputs, sentence_inputs
from llmcomp.measure.run import Settings, evaluate_model

QUICK = Settings(windows=2, rows=50, tokens_per_batch=100, cost=False)
PARAGRAPHS = [f"Paragraph {n} says that {n} and {n + 1} are next to each other." for n in range(40)]
RUNNING = Texts(PARAGRAPHS, None, "text", running=True)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_encoder(tmp_path_factory.mktemp("sentences") / "original", after=("Dense", "Normalize"))


@pytest.fixture(scope="module")
def rounded(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its matrices rounded to 15 levels a row."""
    directory = sentence_encoder(
        tmp_path_factory.mktemp("sentences") / "rounded", after=("Dense", "Normalize")
    )
    tensors = load_file(original / "model.safetensors")
    for key, value in tensors.items():
        if value.ndim == 2 and "embed" not in key:
            step = value.abs().amax(1, keepdim=True) / 7
            tensors[key] = (value / step).round() * step
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    file = write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")
    return evaluation_texts(str(file), text_column="first,second", label_column="score")


def made(texts: Texts, original: Path, **settings: Any) -> tuple[Inputs, list[str], list[str]]:
    """Inputs, the texts that their rows hold in the batches' order, and by their numbers."""
    tokenizer, model = AutoTokenizer.from_pretrained(original), AutoModel.from_pretrained(original)
    inputs = sentence_inputs(
        texts, tokenizer, model, (read_head(original),), Settings(**{**vars(QUICK), **settings})
    )
    rows = [row[row != PAD] for batch in inputs.batches for row in batch.input_ids]
    words = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    sentences = inputs.subject.sentences
    assert sentences is not None and len(words) == len(sentences.order)
    return inputs, words, [words[at] for at in np.argsort(sentences.order)]


def test_pairs_hold_their_texts_each_once(original: Path, pairs: Texts) -> None:
    inputs, _, texts = made(pairs, original)
    sentences = inputs.subject.sentences
    assert sentences is not None and pairs.partners is not None and pairs.labels is not None
    assert len(set(texts)) == len(texts) < 60, "of 60 texts some are the same"
    assert [texts[one] for one, _ in sentences.pairs] == pairs.rows
    assert [texts[other] for _, other in sentences.pairs] == pairs.partners
    assert sentences.scores is not None and sentences.scores.tolist() == pairs.labels
    assert inputs.notes == [] and inputs.subject.data.endswith("each in [CLS] … [SEP], as pairs")


def test_rows_are_spaced_and_those_without_text_left_out(original: Path) -> None:
    texts = Texts(["a", "b", " ", "d", "e"], [1, 2, 3, 4, 5], "rows", partners=["v", "", "x", "y", "z"])
    inputs, _, found = made(texts, original)
    assert inputs.subject.sentences is not None and inputs.subject.sentences.scores is not None
    assert found == ["a", "d", "e", "v", "y", "z"] and inputs.subject.sentences.scores.tolist() == [1, 4, 5]
    inputs, _, found = made(texts, original, rows=2)
    assert len(found) == 4 and len(inputs.subject.sentences.pairs) == 2


def test_running_text_becomes_pairs_of_paragraphs_that_share_none(original: Path) -> None:
    inputs, _, texts = made(RUNNING, original)
    sentences = inputs.subject.sentences
    assert sentences is not None and sentences.scores is None
    assert len(texts) == 16 and set(texts) <= set(RUNNING.rows), "eight paragraphs for each of two windows"
    assert sorted(sentences.pairs.flatten()) == list(range(16))
    again, _, same = made(RUNNING, original)
    assert same == texts and again.subject.sentences is not None
    assert (again.subject.sentences.pairs == sentences.pairs).all()


def test_token_ids_are_taken_as_they_are(original: Path) -> None:
    ids = torch.randint(5, 500, (6, 12), generator=torch.Generator().manual_seed(0))
    inputs, _, _ = made(Texts([], None, "ids", input_ids=ids), original, windows=5)
    assert torch.equal(torch.cat([batch.input_ids for batch in inputs.batches]), ids[:5])
    assert inputs.subject.sentences is not None and inputs.subject.sentences.pairs.shape == (2, 2)


def test_texts_are_cut_where_the_model_cuts_them(original: Path) -> None:
    long = Texts([" ".join(["many words"] * 99), "few words"], None, "rows")
    for length, expected in ((512, 48), (20, 20)):  # 48 by sentence_bert_config.json
        inputs, _, _ = made(long, original, sequence_length=length)
        assert max(batch.input_ids.shape[1] for batch in inputs.batches) == expected


def test_labels_of_single_texts_are_not_used(original: Path) -> None:
    inputs, _, _ = made(Texts(["one", "two"], [1, 2], "rows"), original)
    assert inputs.subject.sentences is not None and inputs.subject.sentences.scores is None
    assert inputs.notes == [
        "The labels of rows are not used: scores are of pairs, in two columns (--text-column first,second)."
    ]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["high", "low"], r"rows: expected scores, and a label is no number \(could not convert .*high"),
        ([0.5, float("inf")], r"rows: expected scores, and row 1 has inf\."),
        ([float("nan"), 1.0], r"rows: expected scores, and row 0 has nan\."),
    ],
)
def test_scores_that_are_no_numbers(original: Path, labels: list[Any], words: str) -> None:
    with pytest.raises(BadData, match=words):
        made(Texts(["a", "b"], labels, "rows", partners=["c", "d"]), original)


def alone(directory: Path, texts: list[str]) -> np.ndarray:
    """Embeddings of texts one by one, without batches or padding; the head in float64."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    tensors = {key: one.double() for key, one in load_file(directory / "2_Dense/model.safetensors").items()}
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=48)["input_ids"]
        with torch.inference_mode():
            pooled = model(input_ids=ids).last_hidden_state[0].double().mean(0)
        embedding = (tensors["linear.weight"] @ pooled + tensors["linear.bias"]).tanh()
        found.append((embedding / embedding.norm()).numpy())
    return np.stack(found)


def test_a_directory_against_its_original(original: Path, rounded: Path, pairs: Texts) -> None:
    found = evaluate_model(rounded, against=original, data=pairs, settings=QUICK)
    texts = list(dict.fromkeys([*pairs.rows, *(pairs.partners or [])]))
    one, other = alone(original, texts), alone(rounded, texts)
    assert one.shape == (len(texts), NARROW)
    alike = []
    for embeddings in (one, other):
        by_text = dict(zip(texts, embeddings, strict=True))
        alike.append([by_text[a] @ by_text[b] for a, b in zip(pairs.rows, pairs.partners or [], strict=True)])
    near = [np.argsort(-(e @ e.T) + 9 * np.eye(len(e)), axis=1)[:, :10] for e in (one, other)]
    kept = np.mean([len({*a} & {*b}) for a, b in zip(*near, strict=True)]) / 10
    assert found.task == "encoder" and found.divergence is None
    assert found.before is not None and found.before.quality is not None and found.after.quality is not None
    before, after = found.before.quality.metrics, found.after.quality.metrics
    scores = np.array(pairs.labels, dtype=float)
    assert before["spearman"].value == pytest.approx(stats.spearmanr(alike[0], scores)[0], abs=1e-3)
    assert after["spearman"].value == pytest.approx(stats.spearmanr(alike[1], scores)[0], abs=1e-3)
    assert after["similarity_spearman"].value == pytest.approx(stats.spearmanr(*alike)[0], abs=1e-3)
    assert after["embedding_cosine"].value == pytest.approx(np.mean((one * other).sum(1)), abs=1e-5)
    assert after["overlap_at_10"].value == pytest.approx(kept, abs=0.01)
    assert 0.5 < after["overlap_at_10"].value < 1 and 0.9 < after["embedding_cosine"].value < 1 - 1e-5
    assert found.after.quality.samples == len(pairs.rows)


def test_alone_it_needs_scores(original: Path, pairs: Texts) -> None:
    found = evaluate_model(original, data=pairs, settings=QUICK)
    assert found.after.quality is not None and set(found.after.quality.metrics) == {"spearman"}
    bare = evaluate_model(original, data=RUNNING, settings=QUICK)
    assert bare.after.quality is None
    assert bare.notes == [
        "No quality was measured: encoder needs scored pairs (--text-column first,second --label-column score) or "
        "a model to compare with (--against)."
    ]


def test_unknown_modules_and_the_wrong_kind_of_model(original: Path, pairs: Texts, tmp_path: Path) -> None:
    odd = sentence_encoder(tmp_path / "odd")
    write_json(odd / "1_Pooling/config.json", {"pooling_mode": "median"})
    with pytest.raises(BadCheckpoint, match="pools by 'median'"):
        evaluate_model(odd, against=original, data=pairs, settings=QUICK)
    plain = tiny("bert", tmp_path / "plain", tokenizer=True, bare=True)
    with pytest.raises(
        BadData, match=r"two text columns are for sentence encoders .* task is encoder; name one"
    ):
        evaluate_model(plain, data=pairs, settings=QUICK)


def test_a_head_that_its_config_names_is_not_used(original: Path, tmp_path: Path) -> None:
    """all-mpnet-base-v2 names MPNetForMaskedLM, and has no head stored."""
    model = sentence_encoder(tmp_path, "mpnet")
    config = load.read_json_object(model / "config.json")
    write_json(model / "config.json", {**config, "architectures": ["MPNetForMaskedLM"]})
    assert load.task_of(model) == "encoder"
    assert type(load.load(model)).__name__ == "MPNetModel"


def test_a_prompt_and_lower_case(original: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(original), AutoModel.from_pretrained(original)
    head = SentenceHead(("mean",), prompt="Query: ", lower=True)
    inputs = sentence_inputs(Texts(["Some Words"], None, "rows"), tokenizer, model, (head,), QUICK)
    assert tokenizer.decode(inputs.batches[0].input_ids[0], skip_special_tokens=True) == "query: some words"
