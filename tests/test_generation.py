"""Text that is handed out while it comes: the tokens of `generate`, all of its text, within the model's positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BOS, EOS, POSITIONS, tiny

from llmcomp.errors import BadCheckpoint, BadData
from llmcomp.generation import Sampling, Stream, encode, new_tokens, open_writer, write
from llmcomp.samples import sample_path

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %} !{% endif %}"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return open_writer(tiny("llama", tmp_path_factory.mktemp("llama"), tokenizer=True))


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    """One that writes words."""
    return open_writer(sample_path("sample:lm"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return open_writer(tiny("t5", tmp_path_factory.mktemp("t5"), tokenizer=True))


def written(writer: tuple[Any, Any], prompt: str, sampling: Sampling) -> tuple[Stream, list[str]]:
    pieces: list[str] = []
    stream = Stream(writer[1], pieces.append)
    write(*writer, encode(*writer, prompt), sampling, stream)
    return stream, pieces


@pytest.mark.parametrize("name", ["trained", "t5"])
def test_greedy_text_is_that_of_generate(name: str, request: pytest.FixtureRequest) -> None:
    model, tokenizer = writer = request.getfixturevalue(name)
    stream, pieces = written(writer, "The list of names", Sampling(12, greedy=True))
    ids = encode(model, tokenizer, "The list of names")
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)[0]
    new = made[1:] if name == "t5" else made[ids.shape[1] :]
    assert stream.tokens == len(new) and stream.text == "".join(pieces)
    assert len(pieces) > 1 or name == "t5"  # random weights write no words
    assert stream.text == tokenizer.decode(new, skip_special_tokens=True)
    assert stream.began < stream.moments[0] < stream.moments[-1]
    expected = (stream.tokens - 1) / (stream.moments[-1] - stream.moments[0])
    assert stream.tokens_per_second == pytest.approx(expected)


def test_a_seed_repeats_a_text(llama: tuple[Any, Any]) -> None:
    drawn = [written(llama, "A", Sampling(12, temperature=1.5, seed=seed))[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_one_token_has_no_speed(llama: tuple[Any, Any]) -> None:
    stream, _ = written(llama, "A", Sampling(1))
    assert stream.tokens == 1 and stream.tokens_per_second is None


def test_what_was_written_is_there_where_it_is_interrupted(trained: tuple[Any, Any]) -> None:
    pieces: list[str] = []

    def sink(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    stream = Stream(trained[1], sink)
    with pytest.raises(KeyboardInterrupt):
        write(*trained, encode(*trained, "The list of names"), Sampling(40, greedy=True), stream)
    whole, _ = written(trained, "The list of names", Sampling(40, greedy=True))
    assert 0 < stream.tokens < whole.tokens and whole.text.startswith(stream.text) and stream.text == "".join(pieces)


def test_a_chat_template_is_used_where_there_is_one(llama: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = llama
    with pytest.raises(BadData, match="no chat template"):
        encode(model, tokenizer, "Why?", chat=True)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    for chat in (None, True):
        assert tokenizer.decode(encode(model, tokenizer, "Why?", chat)[0]) == "<s>user: Why? !"
        assert (encode(model, tokenizer, "Why?", chat) == BOS).sum() == 1
    assert tokenizer.decode(encode(model, tokenizer, "Why?", chat=False)[0]) == "Why?"


def test_an_end_of_text_behind_the_prompt_is_taken_off(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    assert encode(model, tokenizer, "Why?</s>").tolist() == encode(model, tokenizer, "Why?").tolist()
    assert encode(model, tokenizer, "</s>").tolist() == [[EOS]]


@pytest.mark.parametrize("tokens", [POSITIONS - 1, POSITIONS])
def test_a_prompt_leaves_room_for_one_token(tokens: int, llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    prompt = "a" * 4 * tokens
    ids = tokenizer(prompt)["input_ids"][:tokens]
    prompt = tokenizer.decode(ids)
    if tokens == POSITIONS:
        with pytest.raises(BadData, match=rf"The prompt has \d+ tokens and the model {POSITIONS} positions"):
            encode(model, tokenizer, prompt)
    else:
        found = encode(model, tokenizer, prompt)
        assert found.shape == (1, tokens) and new_tokens(model, tokenizer, found, Sampling()) == 1
        assert written(llama, prompt, Sampling(9, greedy=True))[0].tokens == 1


def test_how_many_tokens(llama: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.ones(1, 20, dtype=torch.long)
    assert new_tokens(*llama, ids, Sampling()) == POSITIONS - 20
    assert new_tokens(*llama, ids, Sampling(7)) == 7
    monkeypatch.setattr(llama[0].generation_config, "max_new_tokens", 5)
    assert new_tokens(*llama, ids, Sampling()) == 5 and new_tokens(*llama, ids, Sampling(7)) == 7


@pytest.mark.parametrize(("name", "said"), [("bert-classifier", "BertForSequence"), ("bert", "masked-lm")])
def test_a_model_without_a_head_for_text(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=rf"has no head that writes text: it is .*{said}"):
        open_writer(tiny(name, tmp_path, tokenizer=True))


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="has no tokenizer that transformers can load"):
        open_writer(tiny("llama", tmp_path))
