"""`llmcomp generate`: text on stdout, its speed on stderr, and what has been written where it is interrupted."""

from __future__ import annotations

import io
import json
import signal
import sys

import pytest
import torch

from llmcomp.cli import generate as verb
from llmcomp.cli.main import main

SHORT = ["--greedy", "--max-new-tokens", "12"]


def test_text_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "sample:lm", "Return the sum of", *SHORT]) == 0
    printed, said = capsys.readouterr()
    assert len(printed.strip()) > 10 and printed.endswith("\n")
    assert said.startswith("12 tokens, ") and "tokens/s after the first" in said and said.count("\n") == 1


def test_json_from_stdin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Return the sum of"))
    before = torch.get_num_threads()
    command = ["generate", "sample:lm", "-", "--top-k", "5", "--seed", "3", "--max-new-tokens", "9"]
    try:
        assert main([*command, "--json", "--threads", "2"]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    printed, _ = capsys.readouterr()
    found = json.loads(printed)
    assert found["prompt"] == "Return the sum of" and found["seed"] == 3 and found["model"] == "sample:lm"
    assert found["text"].strip() and found["tokens"] > 1 and found["tokens_per_second"] > 0
    assert found["prompt_tokens"] == 5 and found["tokens"] <= 9


def test_ctrl_c_keeps_what_was_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        shown.append(piece)
        if len(shown) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(verb, "_show", show)
    assert main(["generate", "sample:lm", "Return the sum of", "--greedy"]) == 130
    printed, said = capsys.readouterr()
    assert printed == "".join(shown) and printed.endswith("\n") and len(printed.strip()) > 3
    counted, interrupted = said.splitlines()
    assert " tokens" in counted and interrupted == "llmcomp: Interrupted."


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["sample:classifier", "hello"], "has no head that writes text: it is BertForSequenceClassification"),
        (["sample:lm", " \n"], "The prompt is empty"),
        (["sample:lm", "word " * 300], "tokens and the model 256 positions"),
        (["sample:lm", "hello", "--chat"], "The tokenizer has no chat template"),
        (["sample:lm", "hello", "--greedy", "--top-p", "0.9"], "--greedy draws nothing, so --top-p would have"),
    ],
    ids=["encoder", "empty", "too long", "no template", "both"],
)
def test_mistakes(command: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *command]) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and sentence in said and said.startswith("llmcomp: ") and said.count("\n") == 1
