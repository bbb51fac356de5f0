"""What a run says on stderr while it works: a bar on a terminal, plain lines elsewhere, never stdout."""

from __future__ import annotations

import io
import re
import time

import pytest

from llmcomp.cli.progress import block_line, colour, listener
from llmcomp.progress import Progress
from llmcomp.report.schema import LayerReport


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def visible(text: str) -> str:
    """Everything that a terminal was ever shown, without control codes."""
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)


def layer(block: int | None, role: str, error: float | None, fallback: str | None = None) -> LayerReport:
    name = f"model.layers.{block}.{role}.proj"
    return LayerReport(name, block, role, (8, 8), "int4 g128", "gptq", 128, 36, error, fallback=fallback)


def play(progress: Progress, pause: float = 0.0) -> None:
    progress.note("Calibrating on [bold]sample[/] text.")
    progress.phase("compress", total=12)
    for block in range(3):
        for role, error in (("attention", 0.002), ("attention", 0.004), ("mlp", 0.03)):
            progress.layer(layer(block, role, error, "clip search" if block == 1 and role == "mlp" else None))
        time.sleep(pause)
        progress.step()
    progress.phase("verify")


def plain(json: bool = False, stream: io.StringIO | None = None) -> str:
    stream = io.StringIO() if stream is None else stream
    with listener(json, stream) as progress:
        play(progress)
    return stream.getvalue()


def test_piped_is_one_line_a_block_and_phase() -> None:
    lines = plain().splitlines()
    assert lines[:2] == ["note: Calibrating on [bold]sample[/] text.", "compress"]
    assert re.fullmatch(r"block  1/12  attention 0\.0030  mlp 0\.0300  [\d.]+ ms", lines[2])
    assert re.fullmatch(r"block  2/12  attention 0\.0030  mlp 0\.0300  1 fell back  [\d.]+ ms", lines[3])
    assert re.fullmatch(r"block  3/12  .*", lines[4])
    assert lines[5:] == ["verify"]


def test_piped_has_no_control_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = plain()
    assert "\x1b" not in text
    assert "\r" not in text


def test_json_is_plain_even_on_a_terminal() -> None:
    assert "\x1b" not in plain(json=True, stream=Terminal())


def test_dumb_terminals_get_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in plain(stream=Terminal())


def test_a_terminal_gets_a_bar_with_the_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with listener(stream=stream) as progress:
        play(progress, pause=0.25)  # the bar is drawn ten times a second
    text = stream.getvalue()
    assert "\x1b[" in text
    shown = visible(text)
    assert "━" in shown
    assert re.search(r"compress ━+.* 2/12 0:00:\d\d 0:00:\d\d left proj 0\.0300", shown)
    assert "proj 0.0300" in shown
    assert "/?" not in shown
    assert "note: Calibrating on [bold]sample[/] text." in shown
    assert shown.count("block  1/12  attention 0.0030") == 1
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is shown again


def test_a_terminal_is_given_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), listener(stream=stream) as progress:
        progress.phase("compress", total=2)
        progress.layer(layer(0, "mlp", 0.1))
        raise KeyboardInterrupt
    assert "\x1b[?25h" in stream.getvalue()
    assert "block 1/2  mlp" in visible(stream.getvalue())


def test_stdout_stays_empty(capsys: pytest.CaptureFixture[str]) -> None:
    with listener() as progress:
        play(progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "verify" in captured.err


def test_blocks_are_told_apart_without_steps() -> None:
    stream = io.StringIO()
    with listener(stream=stream) as progress:
        progress.phase("compress")
        for block in (0, 0, 1):
            progress.layer(layer(block, "mlp", 0.01))
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == [
        "compress",
        "block 1",
        "block 2",
    ]


def test_ascii_streams_do_not_fail() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with listener(stream=stream) as progress:
        progress.note("1 – 2")
    assert raw.getvalue() == b"note: 1 ? 2\n"


def test_line_of_what_lies_outside_the_blocks() -> None:
    assert block_line([layer(None, "head", None)], 4, 2.1).plain == "outside the blocks  head —  2.1 s"


def test_colour_grows_with_error() -> None:
    assert [colour(error) for error in (None, 0.001, 0.02, 0.4)] == ["", "green", "yellow", "red"]
