"""The table of QAT beside post-training methods: pairs, the cache, and what is printed. No model is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmcomp
from evals import qat
from llmcomp.cli import main as command_line


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been made; QAT loses 0.1 nats less than GPTQ, learned rounding 0.05 less."""
    done: list[str] = []
    worse = {"gptq": 0.2, "gptq-signround": 0.15, "qat": 0.1}

    def quantize(words: list[str]) -> int:
        done.append(words[words.index("--method") + 1])
        output = Path(words[words.index("--output") + 1])
        output.mkdir()
        (output / "loss").write_text(str(worse[done[-1]]))
        assert words[words.index("--bits") + 1] == "2" and words[words.index("--group-size") + 1] == "64"
        return 0

    def recover(start: Path, data: str, **settings: Any) -> None:
        assert (start / "loss").read_text() == "0.15" and data.endswith("train.txt")
        assert settings["samples"] == 5 * 8 and settings["method"] == "qat" and settings["teaching"].weight == 1
        done.append("qat")
        settings["output"].mkdir()
        (settings["output"] / "loss").write_text(str(worse["qat"]))

    def losses(directory: Path, text: str) -> np.ndarray:
        more = float((directory / "loss").read_text()) if (directory / "loss").exists() else 0.0
        return np.linspace(3.0, 4.0, 12) + more

    monkeypatch.setenv("LLMCOMP_EVAL_CACHE", str(tmp_path))
    monkeypatch.setattr(command_line, "main", quantize)
    monkeypatch.setattr(llmcomp, "recover", recover, raising=False)
    monkeypatch.setattr(qat, "losses", losses)
    monkeypatch.setattr(qat, "windows_file", lambda part, seed, folder: folder / f"{seed}.safetensors")
    return done


def test_the_table_holds_qat_against_the_best_other(made: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--settings", "2-bit g64", "--steps", "5", "--seeds", "0", "1"]
    assert qat.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("| 2-bit g64") == 2 and "books" in printed and "wikitext" in printed
    assert "-4.88% [-4.88, -4.88] vs gptq-signround" in printed  # e^-0.05 - 1
    assert f"{np.exp(3.5):.2f}" in printed and f"{np.exp(3.6):.2f}" in printed
    assert sorted(made) == ["gptq", "gptq", "gptq-signround", "gptq-signround", "qat", "qat"]
    assert qat.main([*arguments[:-1], "1", "0"]) == 0 and len(made) == 6  # all of it is kept
    assert qat.main([*arguments, "--learning-rate", "5e-4"]) == 0 and made[6:] == ["qat", "qat"]
