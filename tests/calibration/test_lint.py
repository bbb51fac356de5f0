"""Every warning of the linter, each provoked with a real tokenizer, and its silence on good data."""

from __future__ import annotations

import pytest
import torch
from tiny import PAD, VOCABULARY, write_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmcomp.calibration.data import Texts, windows
from llmcomp.calibration.lint import lint
from llmcomp.errors import BadData

SENTENCE = "the quick brown fox jumps over the lazy dog near the river bank"
ORDINARY = 20_000 * [5]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("bytes"), encoder=True)


@pytest.fixture(scope="module")
def word_piece():
    """Knows the words of SENTENCE and lower-case letters only."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core.train_from_iterator([SENTENCE], trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def enough(*more: int) -> list[torch.Tensor]:
    """Windows of more tokens than the linter asks for."""
    return [torch.tensor([*ORDINARY, *more])]


def test_good_data_is_passed_in_silence(byte_level):
    rows = [f"{SENTENCE} {i}" for i in range(800)]
    texts = Texts(rows, None, "rows", running=True)
    found = windows(texts, byte_level, samples=130, length=128, seed=0, task="masked-lm")
    assert lint(texts, found, byte_level, samples=130) == []


def test_empty_rows_and_repeated_rows_are_counted():
    texts = Texts(["a", "", "b", "  ", "a", "a "], None, "rows")
    assert lint(texts, enough(), None) == [
        "2 of 6 rows are empty and were left out.",
        "2 of 6 rows repeat an earlier one exactly.",
    ]


def test_running_text_may_have_blank_lines_and_headings_but_no_repeated_paragraph():
    long = SENTENCE * 3
    assert lint(Texts(["= Title =", "", "= Title =", long], None, "t", running=True), enough(), None) == []
    assert lint(Texts([long, "x", long], None, "t", running=True), enough(), None) == [
        "1 of 3 paragraphs repeat an earlier one exactly."
    ]
    many = [f"{SENTENCE} {SENTENCE} {i}" for i in range(200)]
    assert lint(Texts([*many, many[0]], None, "t", running=True), enough(), None) == []


def test_few_tokens_and_few_samples_are_told():
    found = [torch.arange(10), torch.arange(10)]
    assert lint(Texts([], None, "t"), found, None, samples=5) == [
        "The data gave 2 samples; 5 were asked for.",
        "Only 20 tokens to calibrate on; 16,384 or more give steadier results.",
    ]


def test_rows_that_were_cut_are_counted(word_piece):
    texts = Texts([SENTENCE, "the dog", "a fox", f"{SENTENCE} again"], None, "rows")
    found = windows(texts, word_piece, samples=4, length=8, seed=0, task="sequence-classification")
    warnings = lint(texts, found, word_piece, task="sequence-classification")
    assert "2 of 4 rows looked at are longer than 8 tokens and were cut there." in warnings
    joined = windows(texts, word_piece, samples=4, length=8, seed=0, task="masked-lm")
    assert not any("were cut" in warning for warning in lint(texts, joined, word_piece, task="masked-lm"))


def test_padding_inside_the_data_is_told(byte_level):
    warnings = lint(Texts([], None, "ids", running=True), enough(*5_000 * [PAD]), byte_level)
    assert warnings == ["20% of the tokens are padding (5,000 of 25,000)."]


def test_text_in_another_script_is_told(word_piece):
    texts = Texts(["быстрая лиса прыгает через ленивую собаку у реки"] * 3, None, "rows")
    found = windows(texts, word_piece, samples=3, length=32, seed=0, task="encoder")
    warnings = lint(texts, found, word_piece)
    assert any(
        "100% of the tokens (24 of 24) are unknown to the tokenizer" in warning for warning in warnings
    )
    known = Texts([SENTENCE], None, "rows")
    found = windows(known, word_piece, samples=1, length=32, seed=0, task="encoder")
    assert not any("unknown" in warning for warning in lint(known, found, word_piece))


def test_byte_level_tokenizers_know_every_text(byte_level):
    texts = Texts(["быстрая лиса прыгает через ленивую собаку"] * 3, None, "rows")
    found = windows(texts, byte_level, samples=3, length=64, seed=0, task="encoder")
    assert not any("unknown" in warning for warning in lint(texts, found, byte_level))


def test_ids_of_another_vocabulary_are_an_error(byte_level):
    texts = Texts([], None, "ids.safetensors", running=True)
    with pytest.raises(BadData, match=r"2 of 20,002 token ids lie outside of the model's vocabulary of 512"):
        lint(texts, enough(VOCABULARY, 70_000), byte_level)
    with pytest.raises(BadData, match="vocabulary of 4 "):
        lint(texts, enough(), None, vocabulary=4)
    assert lint(texts, enough(VOCABULARY), byte_level, vocabulary=VOCABULARY + 1) == []


def test_warnings_of_the_reader_come_first():
    texts = Texts(["a", "a"], None, "rows", warnings=["said before."])
    assert lint(texts, enough(), None)[0] == "said before."
