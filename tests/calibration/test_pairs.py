"""What an encoder reads and a decoder writes; samples of like shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BOS, EOS, PAD, write_tokenizer
from transformers import PreTrainedTokenizerFast

from llmcomp.calibration import batching, pairs
from llmcomp.calibration.data import Batch, Texts
from llmcomp.errors import BadData

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "it", "sleeps"]
RUNNING = Texts([" ".join(WORDS[n % 7 :]) for n in range(60)], None, "words", running=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), encoder=True)


def made(texts: Texts, tokenizer: PreTrainedTokenizerFast, samples: int = 6, length: int = 21) -> list[Batch]:
    return pairs.pairs(texts, tokenizer, samples=samples, length=length, seed=0, start=PAD)


def test_both_halves_are_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """The encoder's is wrapped as any of its texts; the decoder goes on where it ends, behind its own first token."""
    ids = tokenizer("\n\n".join(RUNNING.rows), add_special_tokens=False)["input_ids"]
    found = made(RUNNING, tokenizer)
    assert len(found) == 6
    for one in found:
        read, written = one.context["input_ids"][0].tolist(), one.input_ids[0].tolist()
        assert (read[0], read[-1], written[0]) == (BOS, EOS, PAD)
        body = read[1:-1] + written[1:]
        assert len(body) == 19 and len(read[1:-1]) == 10
        assert any(ids[start : start + 19] == body for start in range(len(ids)))


def test_two_columns_are_read_and_written(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = Texts(["long words to read", " ", "more"], None, "a table", partners=["short", "x", "brief words"])
    found = made(texts, tokenizer)
    said = [
        (tokenizer.decode(one.context["input_ids"][0]), tokenizer.decode(one.input_ids[0, 1:])) for one in found
    ]
    assert said == [
        ("[CLS]long words to read[SEP]", "[CLS]short[SEP]"),
        ("[CLS]more[SEP]", "[CLS]brief words[SEP]"),
    ]
    assert all(int(one.input_ids[0, 0]) == PAD for one in found)
    assert "2 pairs" in pairs.describe(texts, found) and "the second column written" in pairs.describe(texts, found)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (Texts([], None, "ids", input_ids=torch.ones(2, 8, dtype=torch.int64)), "an encoder-decoder reads pairs"),
        (Texts(["a", ""], None, "t", partners=["", "b"]), "no row with text in both columns"),
        (Texts(["few"], None, "t", running=True), "fewer than one sample"),
    ],
    ids=["ids", "empty", "short"],
)
def test_what_gives_no_pairs(texts: Texts, said: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BadData, match=said):
        made(texts, tokenizer)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=20), st.integers(1, 20)
)
def test_batches_hold_every_sample_once_in_the_order_told(shapes: list[tuple[int, int]], most: int) -> None:
    samples = [
        Batch(torch.full((1, one), n), None, {"input_ids": torch.full((1, two), -n)})
        for n, (one, two) in enumerate(shapes)
    ]
    found = batching.like(samples, tokens_per_batch=most)
    assert [int(row[0]) for batch in found for row in batch.input_ids] == batching.order(samples)
    assert [-int(row[0]) for batch in found for row in batch.context["input_ids"]] == batching.order(samples)
    for batch in found:
        ids = batch.input_ids.numel() + batch.context["input_ids"].numel()
        assert ids <= most or len(batch.input_ids) == 1
    assert sorted(batching.order(samples)) == list(range(len(samples)))


def test_a_fingerprint_sees_every_tensor() -> None:
    def prints(ids: list[int], pixel: float, name: str = "pixel_values") -> str:
        return batching.fingerprint([Batch(torch.tensor([ids]), None, {name: torch.full((1, 2), pixel)})])

    same = prints([1, 2], 0.5)
    assert same == prints([1, 2], 0.5)
    assert len({same, prints([1, 3], 0.5), prints([1, 2], 0.25), prints([1, 2], 0.5, "input_features")}) == 4


def test_the_witness_is_the_beginning_of_the_longest() -> None:
    sizes = (3, 9, 9, 5)
    samples = [Batch(torch.full((1, n), n), None, {"pixels": torch.full((1, 2, 2), float(n))}) for n in sizes]
    found = batching.witness_of(samples, rows=2, tokens=4)
    assert found.input_ids.tolist() == [[9] * 4] * 2
    assert found.context["pixels"].shape == (2, 2, 2)
