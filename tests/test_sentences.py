"""modules.json: what is a sentence encoder and what only looks like one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_sentences import write_json, write_modules

from llmcomp.errors import BadCheckpoint
from llmcomp.sentences import is_sentence_encoder, sentence_modules


def test_modules_without_their_packages(tmp_path: Path) -> None:
    assert sentence_modules(tmp_path) == []
    write_modules(tmp_path, "Pooling")
    assert sentence_modules(tmp_path) == [("Transformer", ""), ("Pooling", "1_Pooling")]
    write_json(tmp_path / "modules.json", [{"path": "x", "type": "mine.Pooling"}, {"path": "y"}])
    assert sentence_modules(tmp_path) == [("mine.Pooling", "x"), ("", "y")]


@pytest.mark.parametrize("content", [{"a": 1}, [{"type": "x"}], ["x"], 3])
def test_a_file_that_is_no_list_of_modules(tmp_path: Path, content: object) -> None:
    write_json(tmp_path / "modules.json", content)
    with pytest.raises(BadCheckpoint, match=r"modules.json is not a list of modules with paths .*; copy or"):
        sentence_modules(tmp_path)


def test_sentence_encoders(tmp_path: Path) -> None:
    assert not is_sentence_encoder(tmp_path)
    write_modules(tmp_path, "Pooling")
    assert is_sentence_encoder(tmp_path)
    write_json(tmp_path / "sentence_bert_config.json", {"transformer_task": "feature-extraction"})
    assert is_sentence_encoder(tmp_path)


def test_cross_and_sparse_encoders_use_their_heads(tmp_path: Path) -> None:
    write_modules(tmp_path, "LogitScore")
    for task in ("sequence-classification", "fill-mask", "text-generation"):
        write_json(tmp_path / "sentence_bert_config.json", {"transformer_task": task})
        assert not is_sentence_encoder(tmp_path)
    (tmp_path / "sentence_bert_config.json").unlink()
    module = {"path": "", "type": "sentence_transformers.sparse_encoder.models.MLMTransformer"}
    write_json(tmp_path / "modules.json", [module])
    assert not is_sentence_encoder(tmp_path)
