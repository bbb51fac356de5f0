"""The app: exit statuses, one sentence for every error, tracebacks only where asked for."""

from __future__ import annotations

import signal

import pytest

from llmcomp import api
from llmcomp.cli.main import main
from llmcomp.errors import (
    BadCheckpoint,
    BadData,
    BadRecipe,
    LlmcompError,
    ModelNotFound,
    NumericalError,
    OutputExists,
    RunError,
    UnknownArchitecture,
    UserError,
    VerificationFailed,
)

VERBS = (
    "quantize", "sparsify", "factorize", "compress", "inspect", "evaluate", "bench", "generate", "report", "models",
)  # fmt: skip


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """`llmcomp quantize` raises `error`."""

    def compress(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(api, "compress", compress)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        *[(kind, 2) for kind in (UserError, ModelNotFound, BadCheckpoint, UnknownArchitecture)],
        *[(kind, 2) for kind in (BadRecipe, BadData, OutputExists)],
        *[(kind, 1) for kind in (LlmcompError, RunError, NumericalError, VerificationFailed)],
    ],
)
def test_errors_become_a_sentence_and_a_status(
    error: type[LlmcompError], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, error("That cannot be."))
    assert main(["quantize", "model"]) == status
    assert capsys.readouterr() == ("", "llmcomp: That cannot be.\n")


def test_what_was_not_expected_is_a_sentence_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, ZeroDivisionError("by\nzero"))
    assert main(["quantize", "model"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith("ZeroDivisionError: by zero\n")
    assert said.startswith("llmcomp: Unexpected failure, please report it with --debug's output")


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, RunError("That failed."))
    command = ["--debug", "quantize", "model"] if place == "before" else ["quantize", "model", "--debug"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("\nllmcomp: That failed.\n")


def test_a_reader_that_goes_away_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, BrokenPipeError())
    assert main(["quantize", "model"]) == 0
    assert capsys.readouterr() == ("", "")


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def compress(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(api, "compress", compress)
    before = signal.getsignal(signal.SIGINT)
    assert main(["quantize", "model"]) == 130
    assert capsys.readouterr() == ("", "llmcomp: Interrupted; the same command resumes where it stopped.\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_of_a_verb_that_does_not_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "bench", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert main(["bench", "sample:lm"]) == 130
    assert capsys.readouterr() == ("", "llmcomp: Interrupted.\n")


@pytest.mark.parametrize("other", [RuntimeError("from C++"), RunError("The loss is NaN.")])
def test_ctrl_c_of_which_other_code_makes_an_error(
    other: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compress(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise other

    monkeypatch.setattr(api, "compress", compress)
    assert main(["quantize", "model"]) == 130
    assert capsys.readouterr() == ("", "llmcomp: Interrupted; the same command resumes where it stopped.\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"llmcomp {version('llmcomp')}\n"


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage" in shown and f"llmcomp {verb}" in shown


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["quantise"], "quantise"),
        (["quantize", "model", "--bits", "four"], "--bits"),
        (["quantize", "model", "--nope"], "--nope"),
    ],
)
def test_usage_errors(command: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and "Traceback" not in said and named in said
