"""What GGUF holds of a tokenizer: tokens, types, merges or scores, the name of the split, what comes around a text."""

from __future__ import annotations

import copy
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from reference.sentencepiece_merges import merge
from tiny import VOCABULARY, write_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmcomp.errors import UserError
from llmcomp.exports import gguf_tokenizer
from llmcomp.exports.gguf_tokenizer import add_tokenizer, read_vocabulary

TOPICS = list(pydoc_data.topics.topics.values())
SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ISOLATED = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORDS = {**BYTES, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_tokenizer(tmp_path_factory.mktemp("bytes"), encoder=False)


@pytest.fixture(scope="module")
def fallback() -> Tokenizer:
    """As Llama 2's: no split of words, spaces as U+2581, bytes to fall back on."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special, limit_alphabet=60, show_progress=False)
    lines = [line for topic in TOPICS[:12] for line in topic.splitlines()]
    core.train_from_iterator(lines, trainer)
    structure = json.loads(core.to_str())
    structure["added_tokens"] = structure["added_tokens"][:3]
    structure["post_processor"] = json.loads(
        processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]).__getstate__()
    )
    return Tokenizer.from_str(json.dumps(structure))


def written(tokenizer: Any, rows: int, directory: Path) -> tuple[dict[str, Any], list[str]]:
    writer = gguf.GGUFWriter(directory / "t.gguf", "llama")
    notes = add_tokenizer(writer, tokenizer, rows, directory)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(directory / "t.gguf").fields
    return {key: field.contents() for key, field in fields.items()}, notes


def test_a_byte_level_tokenizer(byte_level: Any, tmp_path: Path) -> None:
    byte_level.chat_template = "{{ messages }}"
    found, notes = written(byte_level, VOCABULARY + 3, tmp_path)
    structure = json.loads(byte_level.backend_tokenizer.to_str())
    assert notes == []
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens = found["tokenizer.ggml.tokens"]
    assert [byte_level.convert_tokens_to_ids(token) for token in tokens[:VOCABULARY]] == list(range(VOCABULARY))
    assert tokens[VOCABULARY:] == [f"[PAD{number}]" for number in range(VOCABULARY, VOCABULARY + 3)]
    assert found["tokenizer.ggml.token_type"] == [CONTROL] * 4 + [NORMAL] * (VOCABULARY - 4) + [UNUSED] * 3
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in structure["model"]["merges"]]
    for kind in ("bos", "eos", "unk"):
        wanted = getattr(byte_level, f"{kind}_token_id")
        assert found[f"tokenizer.ggml.{kind}{'nown' if kind == 'unk' else ''}_token_id"] == wanted
    assert found["tokenizer.ggml.padding_token_id"] == byte_level.pad_token_id
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert found["general.name"] == tmp_path.name
    assert found["tokenizer.ggml.add_bos_token"] is False and found["tokenizer.ggml.add_eos_token"] is False


def test_a_tokenizer_that_falls_back_on_bytes(fallback: Tokenizer, tmp_path: Path) -> None:
    whole = PreTrainedTokenizerFast(tokenizer_object=fallback, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found, notes = written(whole, len(whole), tmp_path)
    assert notes == []
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("llama", "default")
    types = found["tokenizer.ggml.token_type"]
    assert types[:3] == [UNKNOWN, CONTROL, CONTROL] and types[3:259] == [BYTE] * 256 and set(types[259:]) == {NORMAL}
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.add_bos_token"] is True and found["tokenizer.ggml.add_eos_token"] is False


@pytest.mark.parametrize("topic", [13, 14])
def test_scores_merge_as_ranks_do(fallback: Tokenizer, topic: int) -> None:
    found = read_vocabulary(json.loads(fallback.to_str()), fallback.get_vocab_size())
    for line in [*TOPICS[topic].splitlines()[:40], "  two  spaces ", "Übergröße 🚀", "aaaaaaa", ""]:
        marked = SPACE + line.replace(" ", SPACE) if line else ""
        wanted = fallback.encode(line, add_special_tokens=False).ids
        assert merge(marked, found.tokens, found.scores) == wanted, line


SPLITS = [
    ([WORDS], False, "gpt-2"),
    ([DIGITS, WORDS], False, "smollm"),
    ([{**ISOLATED, "pattern": {"Regex": gguf_tokenizer._LLAMA3}}, BYTES], True, "llama-bpe"),
    ([{**ISOLATED, "pattern": {"Regex": gguf_tokenizer._LLAMA3}}, BYTES], False, "smaug-bpe"),
    ([{**ISOLATED, "pattern": {"Regex": gguf_tokenizer._QWEN2}}, BYTES], False, "qwen2"),
    ([{**ISOLATED, "pattern": {"Regex": gguf_tokenizer._TEKKEN}}, BYTES], True, "tekken"),
]


@pytest.mark.parametrize(("steps", "whole", "name"), SPLITS, ids=[name for _, _, name in SPLITS])
def test_the_split_has_a_name(byte_level: Any, steps: list[dict[str, Any]], whole: bool, name: str) -> None:
    structure = json.loads(byte_level.backend_tokenizer.to_str())
    structure["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]
    structure["model"]["ignore_merges"] = whole
    Tokenizer.from_str(json.dumps(structure))  # such a tokenizer can be
    assert read_vocabulary(structure, VOCABULARY).splits == name


def _gemma(structure: dict[str, Any]) -> None:
    structure["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    structure["pre_tokenizer"] = {
        "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
    }  # fmt: skip


def _metaspace(structure: dict[str, Any], scheme: str) -> None:
    structure["normalizer"] = None
    structure["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "prefix", "noted"),
    [
        (lambda structure: None, True, False),
        (_gemma, False, False),
        (lambda structure: _metaspace(structure, "never"), False, False),
        (lambda structure: _metaspace(structure, "first"), True, True),
        (lambda structure: _metaspace(structure, "always"), True, True),
    ],
    ids=["llama 2", "gemma", "metaspace never", "metaspace first", "metaspace always"],
)
def test_a_space_before_the_first_word(fallback: Tokenizer, change: Any, prefix: bool, noted: bool) -> None:
    structure = json.loads(fallback.to_str())
    change(structure)
    found = read_vocabulary(structure, fallback.get_vocab_size())
    assert found.space_prefix is prefix
    assert bool(found.notes) is noted


def test_added_tokens(fallback: Tokenizer) -> None:
    structure = json.loads(fallback.to_str())
    size = fallback.get_vocab_size()
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    structure["added_tokens"] += [
        {"id": size, "content": f"{SPACE}§", **plain},
        {"id": size + 1, "content": f"{SPACE}¶", **plain, "normalized": False},
        {"id": size + 2, "content": "<|turn|>", **plain},
        {"id": size + 3, "content": "word", **plain, "rstrip": True},
        {"id": size + 4, "content": "beyond", **plain},
    ]
    found = read_vocabulary(structure, size + 4)
    assert found.tokens[size:] == [" §", f"{SPACE}¶", "<|turn|>", "word"]
    assert found.types[size:] == [USER, USER, CONTROL, USER]
    strips, beyond = found.notes
    assert strips.startswith("1 tokens take in the spaces") and "'word'" in strips
    assert beyond.startswith("1 tokens have no row") and "'beyond'" in beyond


def _set(*path: Any, to: Any) -> Any:
    def change(structure: dict[str, Any]) -> None:
        for key in path[:-1]:
            structure = structure[key]
        structure[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("model", to={"type": "Unigram", "vocab": []}), "its model is Unigram"),
        (_set("model", "continuing_subword_prefix", to="##"), "continuing_subword_prefix"),
        (_set("normalizer", to={"type": "Lowercase"}), "normalizes text by Lowercase"),
        (_set("pre_tokenizer", to={**WORDS, "add_prefix_space": True}), '"add_prefix_space": true'),
        (_set("pre_tokenizer", to={**ISOLATED, "pattern": {"Regex": r"\w+"}}), r"splits text by \w+, for which"),
        (_set("pre_tokenizer", to=None), "by nothing"),
        (_set("model", "ignore_merges", to=True), "takes words that are tokens whole"),
        (_set("added_tokens", 0, "content", to="a"), "two tokens 'a'"),
    ],
)
def test_what_llama_cpp_does_not_do_is_refused(byte_level: Any, change: Any, words: str) -> None:
    structure = copy.deepcopy(json.loads(byte_level.backend_tokenizer.to_str()))
    change(structure)
    with pytest.raises(ValueError, match="it") as wrong:
        read_vocabulary(structure, VOCABULARY)
    assert words in str(wrong.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("normalizer", to={"type": "NFKC"}), "changes text by"),
        (_set("normalizer", to=None), f"does not write spaces as {SPACE}"),
    ],
)
def test_other_ways_with_spaces_are_refused(fallback: Tokenizer, change: Any, words: str) -> None:
    structure = json.loads(fallback.to_str())
    change(structure)
    with pytest.raises(ValueError, match=words):
        read_vocabulary(structure, fallback.get_vocab_size())


@pytest.mark.parametrize(
    ("template", "around"),
    [("<s> $A", (True, False)), ("$A </s>", (False, True)), ("<s> $A </s>", (True, True)), ("$A <unk>", None)],
)
def test_what_comes_around_a_text(
    fallback: Tokenizer, tmp_path: Path, template: str, around: tuple[bool, bool] | None
) -> None:
    core = Tokenizer.from_str(fallback.to_str())
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<unk>", 0), ("<s>", 1), ("</s>", 2)]
    )
    whole = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    if around is None:
        with pytest.raises(UserError, match=r"it makes \[.*\] of a text whose tokens are"):
            written(whole, len(whole), tmp_path)
        return
    found, _ = written(whole, len(whole), tmp_path)
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == around


def test_a_name_that_llama_cpp_would_stumble_over(byte_level: Any, tmp_path: Path) -> None:
    """It looks for tokens of Phi-3 in whatever is called so, and ends when they are not there."""
    directory = tmp_path / "my-Phi-3-model"
    directory.mkdir()
    found, _ = written(byte_level, VOCABULARY, directory)
    assert found["general.name"] == "model"


def test_a_tokenizer_that_ends_no_text_is_told(byte_level: Any, tmp_path: Path) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=byte_level.backend_tokenizer)
    endless.add_special_tokens({"additional_special_tokens": [AddedToken("<more>", special=True)]})
    found, notes = written(endless, VOCABULARY + 1, tmp_path)
    assert "tokenizer.ggml.eos_token_id" not in found
    assert any("names no token that ends a text" in note for note in notes)


@pytest.mark.parametrize(
    ("kind", "model", "splits", "prefix"),
    [
        ("LlamaTokenizer", "llama", "default", True),
        ("GemmaTokenizer", "llama", "default", False),
        ("Qwen2Tokenizer", "gpt2", "qwen2", None),
        ("GPT2Tokenizer", "gpt2", "gpt-2", None),
    ],
)
def test_classes_of_transformers_have_these_structures(
    byte_level: Any, fallback: Tokenizer, kind: str, model: str, splits: str, prefix: bool | None
) -> None:
    core = fallback if model == "llama" else byte_level.backend_tokenizer
    tokens = json.loads(core.to_str())["model"]
    made = getattr(transformers, kind)(vocab=tokens["vocab"], merges=[tuple(merge) for merge in tokens["merges"]])
    found = read_vocabulary(json.loads(made.backend_tokenizer.to_str()), len(made))
    assert (found.model, found.splits, found.space_prefix) == (model, splits, prefix)
