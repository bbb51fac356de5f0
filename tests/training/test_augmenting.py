"""Augmentation against a slow way to the same candidates; what may change in a sentence, and what is drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny, write_tokenizer

from llmcomp.augmentation import augment_rows
from llmcomp.calibration.data import Texts
from llmcomp.errors import BadCheckpoint, BadData, UserError
from llmcomp.measure.load import load, load_tokenizer
from llmcomp.progress import Silent
from llmcomp.training.augmenting import Augmentation, Filler, augment, copies_of, whole_words

TEXT = ["The weather was fine, and nobody wore a coat.", "It cost 12€ more — “why not”?", "Unbelievable xylophones!"]
WORD = re.compile(r"[^\W\d_]+")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("masked")
    tiny("bert", directory)
    write_tokenizer(directory, encoder=True, text=["the weather was fine and nobody wore a coat it cost more why not "
                                                   "The It trees walked under afternoon whole hat " * 3])  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def filler(model: Path) -> Filler:
    return Filler.of(load(model, "masked-lm"), load_tokenizer(model))


def test_words_are_tokens_of_letters(filler: Filler) -> None:
    known = whole_words(filler.tokenizer)
    assert {"weather", "coat", "nobody"} <= set(known.values()) and len(known) == len(filler.words)
    for number, word in known.items():
        assert WORD.fullmatch(word)
        assert filler.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] == [number]


@pytest.mark.parametrize("text", TEXT)
def test_candidates_are_the_likeliest_or_the_nearest(filler: Filler, text: str) -> None:
    """One word at a time, by loops over the vocabulary in float64."""
    tokenizer, count = filler.tokenizer, 4
    weight = filler.model.get_input_embeddings().weight.detach().double()
    known = whole_words(tokenizer)
    found = filler.candidates(text, count)
    assert [text[start:end] for start, end, _ in found] == WORD.findall(text)
    made = tokenizer(text, return_offsets_mapping=True)
    kinds = set()
    for start, end, words in found:
        pieces = [number for number, (one, other) in enumerate(made["offset_mapping"])
                  if one < other and one < end and other > start]  # fmt: skip
        ids = list(made["input_ids"])
        kinds.add(len(pieces) == 1)
        if len(pieces) == 1:
            ids[pieces[0]] = tokenizer.mask_token_id
            with torch.no_grad():
                scores = filler.model(input_ids=torch.tensor([ids])).logits[0, pieces[0]].double()
        else:
            mean = torch.stack([weight[ids[piece]] for piece in pieces]).mean(0)
            scores = torch.stack([row @ mean / row.norm() for row in weight])
        wanted = sorted(known, key=lambda number: -float(scores[number]))[:count]
        assert words == [known[number] for number in wanted]
    assert {TEXT[0]: True in kinds, TEXT[1]: bool(kinds), TEXT[2]: kinds == {False}}[text]


def test_words_change_and_nothing_else(filler: Filler) -> None:
    text = TEXT[1]
    found = filler.candidates(text, 3)
    every = copies_of(text, found, Augmentation(copies=30, share=1.0), np.random.default_rng(0))
    for copy in every:
        assert WORD.sub("w", copy) == WORD.sub("w", text)
        for word, (_, _, words) in zip(WORD.findall(copy), found, strict=True):
            assert word in words
    drawn = {word for copy in every for word in WORD.findall(copy)[:1]}
    assert drawn == set(found[0][2])  # each of the candidates, in thirty draws
    some = copies_of("a " * 500, [(2 * n, 2 * n + 1, ["b"]) for n in range(500)], Augmentation(4),
                     np.random.default_rng(0))  # fmt: skip
    assert all(150 < copy.count("b") < 250 for copy in some) and len(set(some)) == 4
    assert copies_of("12!", [], Augmentation(2), np.random.default_rng(0)) == ["12!", "12!"]


def test_a_broken_run_ends_with_the_same_bytes(filler: Filler, tmp_path: Path) -> None:
    texts, settings = Texts(TEXT, [1, 0, None], "three rows"), Augmentation(copies=3, candidates=5, seed=2)
    whole = augment(texts, filler, settings, tmp_path / "whole.jsonl")
    rows = [json.loads(line) for line in whole.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 12 and [row["label"] for row in rows] == [1, *[None] * 3, 0, *[None] * 3, None, *[None] * 3]
    assert [rows[number]["text"] for number in (0, 4, 8)] == TEXT

    class Killed(Silent):
        def step(self, done: int = 1) -> None:
            if done:
                raise KeyboardInterrupt

    broken = tmp_path / "broken.jsonl"
    with pytest.raises(KeyboardInterrupt):
        augment(texts, filler, settings, broken, Killed())
    (partial,) = tmp_path.glob(".broken*")
    partial.write_bytes(partial.read_bytes() + b'{"text": "The wea')  # killed while it wrote
    assert not broken.exists()
    done: list[int] = []

    class Counting(Silent):
        def step(self, count: int = 1) -> None:
            done.append(count)

    assert augment(texts, filler, settings, broken, Counting()).read_bytes() == whole.read_bytes()
    assert done == [1, 1, 1] and not list(tmp_path.glob(".*"))
    other = augment(texts, filler, Augmentation(copies=3, candidates=5, seed=3), tmp_path / "other.jsonl")
    assert other.read_bytes() != whole.read_bytes()


def test_from_names_to_a_file(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"sentence": text, "mood": 1}) + "\n" for text in TEXT), encoding="utf-8")
    given: dict[str, Any] = {"text_column": "sentence", "label_column": "mood", "device": "cpu"}
    found = augment_rows(str(data), str(model), tmp_path / "more.jsonl", Augmentation(copies=2), **given)
    rows = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]
    assert [set(row) for row in rows] == [{"sentence", "mood"}] * 9
    before = found.stat().st_mtime_ns
    assert augment_rows("nothing", "nobody", found, **given).stat().st_mtime_ns == before
    with pytest.raises(BadCheckpoint, match="asks a masked language model"):
        augment_rows(str(data), "sample:classifier", tmp_path / "a.jsonl", **given)
    (tmp_path / "text.txt").write_text("One paragraph.\n\nAnother.")
    with pytest.raises(BadData, match="for a table of sentences"):
        augment_rows(str(tmp_path / "text.txt"), str(model), tmp_path / "a.jsonl", device="cpu")
    with pytest.raises(BadData, match="at least 1 copy"):
        augment_rows(str(data), str(model), tmp_path / "a.jsonl", Augmentation(copies=0), **given)


def test_one_process_makes_the_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="is made by one process"):
        augment_rows("sample:classifier", str(model), tmp_path / "a.jsonl")
