"""`llmcomp bench`: numbers in, a table or one JSON object out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmcomp import api
from llmcomp.cli.main import main
from llmcomp.measure.bench import Benchmark, Settings
from llmcomp.measure.figures import Figure, Ratio, Result
from llmcomp.report.schema import Machine

FIGURES = (
    Figure("decode 1 × 32", "tokens/s", (10.0, 12.0, 14.0), 12.0, 10.0, 14.0),
    Figure("load", "s", (0.5,), 0.5, 0.5, 0.5),
    Figure("memory in use", "bytes", (2e9,), 2e9, 2e9, 2e9),
)
RATIOS = (Ratio("decode 1 × 32", "tokens/s", (2.0, 3.0, 4.0), 3.0, 2.0, 4.0),)
MACHINE = Machine("Some CPU", 1, 2**34, "cpu", {"torch": "2.13", "transformers": "5.23"})
FOUND = Benchmark(
    "w4", "base", ((1, 128),), 32, False, 3, MACHINE, "AVX512", 32 << 20,
    (Result("w4", 1, FIGURES, RATIOS), Result("base", 1, FIGURES[:1])),
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What the verb asks the API for."""
    found: dict = {}

    def bench(directory: Path, **given: object) -> Benchmark:
        found.update(given, directory=directory)
        return FOUND if given["against"] else replace(FOUND, against=None, results=(Result("w4", 2, FIGURES),))

    monkeypatch.setattr(api, "bench", bench)
    return found


def test_lists_by_commas_or_by_repetition(asked: dict, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "sample:lm", "--threads", "1", "--threads", "2,1", "--prompt-tokens", "8, 16"]
    assert main([*command, "--batch-size", "4", "--new-tokens", "5", "--repeats", "7", "--compile"]) == 0
    expected = Settings((1, 2), (8, 16), (4,), new_tokens=5, compile=True, rounds=7)
    assert asked["settings"] == expected and asked["against"] is None
    assert "2 threads" in capsys.readouterr().out


def test_a_table_with_ratios(asked: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sample:lm", "--against", "sample:lm"]) == 0
    printed = capsys.readouterr().out
    for part in ("Some CPU · AVX512", "torch 2.13", "1 thread", "12.00", "[10.00, 14.00]", "3.00×", "[2.00×, 4.00×]"):
        assert part in printed
    assert "500 ms" in printed and "2.00 GB" in printed and "—" in printed


def test_json_is_one_object(asked: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sample:lm", "--against", "sample:lm", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["results"][0]["ratios"][0] == {
        "name": "decode 1 × 32", "unit": "tokens/s", "rounds": [2, 3, 4], "median": 3, "low": 2, "high": 4,
    }  # fmt: skip
    assert found["machine"]["cpu"] == "Some CPU" and found["shapes"] == [[1, 128]]


@pytest.mark.parametrize("wrong", ["0", "two", "1,,2", "-1", "1.5"])
def test_what_is_no_number(wrong: str, asked: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sample:lm", f"--threads={wrong}"]) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and said.startswith("llmcomp: --threads '") and said.count("\n") == 1 and not asked


def test_too_long_a_prompt_costs_no_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sample:lm", "--prompt-tokens", "300"]) == 2
    assert "256 positions hold no input of 300 tokens and 32 new ones" in capsys.readouterr().err


def test_an_encoder_for_real(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "sample:classifier", "--threads", "1", "--batch-size", "2", "--prompt-tokens", "16"]
    assert main([*command, "--repeats", "1", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    figures = {(figure["name"], figure["unit"]): figure["median"] for figure in result["figures"]}
    assert figures["forward 2 × 16", "samples/s"] == pytest.approx(2 / figures["forward 2 × 16", "s"])
    assert figures["those of the blocks", "bytes"] < figures["parameters and buffers", "bytes"]
