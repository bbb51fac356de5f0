"""The code that a card shows, run as it stands, for each task that has its own (language models: test_pushing.py)."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from tiny import tiny
from tiny_sentences import sentence_encoder

import llmcomp
from llmcomp.publishing import card_of

# task → (source, the line that its code prints)
_TASKS = {
    "masked-lm": ("bert", r"torch\.Size\(\[1, \d+, 512\]\)"),
    "sequence-classification": ("bert-classifier", r"\{(.LABEL_[012].: [\d.e-]+(, )?){3}\}"),
    "token-classification": ("ForTokenClassification", r"\[(.LABEL_\d.(, )?)+\]"),
    "question-answering": ("ForQuestionAnswering", r".*"),
    "seq2seq-lm": ("t5", r".*"),
    "image-classification": ("vit-classifier", r"LABEL_\d"),
    "encoder": ("sentences", r"\(2, 128\)"),
}


def source(kind: str, directory: Path) -> Path:
    """A tiny model with what reads its input."""
    import transformers

    if kind == "sentences":
        return sentence_encoder(directory)
    if not kind.startswith("For"):
        return tiny(kind, directory, tokenizer=True)
    tiny("bert", directory, tokenizer=True)
    config = transformers.BertConfig.from_pretrained(directory, num_labels=3 if "Token" in kind else 2)
    getattr(transformers, f"Bert{kind}")(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("form", ["compressed-tensors", "llmcomp"])
@pytest.mark.parametrize("task", _TASKS)
def test_the_code_runs_as_it_stands(
    task: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, printed = _TASKS[task]
    if kind == "sentences":
        pytest.importorskip("sentence_transformers", reason="needs the extra: pip install -e '.[test-sentences]'")
    monkeypatch.chdir(tmp_path)
    model = source(kind, tmp_path / "source")
    done = llmcomp.quantize(
        str(model), method="rtn", bits=8, group_size="channel", format=form, output=tmp_path / "q", evaluate=False,
        verify=False,
    )  # fmt: skip
    assert done.report.task == task
    text = card_of(tmp_path / "q", "q").text
    section = text.split("## How to load it")[1].split("\n## ")[0]
    blocks = dict(re.findall(r"### (.+?)\n\n.+?\n\n```python\n(.+?)```", section, re.DOTALL))
    assert set(blocks) == {"transformers", "llmcomp", *(["sentence-transformers"] if kind == "sentences" else [])}
    capsys.readouterr()
    for title, code in blocks.items():
        exec(compile(code, title, "exec"), {})
        if title == ("sentence-transformers" if kind == "sentences" else "transformers"):
            said = [line for line in capsys.readouterr().out.split(os.linesep) if line]
            assert re.fullmatch(printed, said[-1] if said else ""), said
