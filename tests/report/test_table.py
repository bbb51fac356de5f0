"""The terminal's view: its figures, its width, and that it needs neither colour nor Unicode."""

import dataclasses
import io

import pytest
from rich.console import Console

from llmcomp.report.schema import Interval, Measured, Quality, Report, Size
from llmcomp.report.table import table


def drawn(report: Report, width: int = 80, encoding: str = "utf-8", colour: bool = False) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    console = Console(
        file=stream, width=width, force_terminal=colour, color_system="standard" if colour else None
    )
    console.print(table(report, page="out/llmcomp_report.html"))
    stream.flush()
    return raw.getvalue().decode(encoding)


def test_says_what_matters(report: Report) -> None:
    text = drawn(report)
    for part in (
        "tinyllama  →  tinyllama-gptq-w4",
        "2.20 GB → 762 MB   2.89× smaller   perplexity 12.43 → 12.90 (+3.79%)",
        "[12.55, 13.26]",
        "10 worst of 154 layers",
        "Gram matrix did not factor: clip-searched RTN (2 modules",
        "not in the recipe's targets (attention, mlp) (1 module, 131 MB)",
        "✓ 154 of 154 planned modules are compressed",
        "14 of 2,461 rows were duplicates",
        "3 min 29 s",
        "out/llmcomp_report.html",
    ):
        assert part in text, part


def test_worst_layer_comes_first(report: Report) -> None:
    lines = [line for line in drawn(report).splitlines() if "int4 g128" in line and "model.layers" in line]
    errors = [float(line.split()[-1]) for line in lines]
    assert len(errors) == 10
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(max(layer.error or 0 for layer in report.layers), abs=5e-5)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_fits_the_width(report: Report, width: int) -> None:
    assert max(map(len, drawn(report, width).splitlines())) <= width


def test_eighty_columns_break_no_number_apart(report: Report) -> None:
    text = drawn(report, 80)
    for role in ("415 MB → 107 MB", "1.52 GB → 393 MB"):
        assert role in text


def test_wide_terminals_get_errors_by_block(report: Report) -> None:
    line = next(line for line in drawn(report, 120).splitlines() if "415 MB" in line)
    bars = line.split()[-1]
    assert len(bars) == 22
    assert bars[17] == "█"  # the block of the fallback, whose error was made three times as large


def test_piped_text_has_no_control_codes(report: Report) -> None:
    assert "\x1b" not in drawn(report)
    assert "\x1b[" in drawn(report, colour=True)


def test_ascii_terminals_get_ascii(report: Report) -> None:
    text = drawn(report, encoding="ascii")
    assert text.isascii()
    assert "2.20 GB > 762 MB   2.89x smaller" in text
    assert max(map(len, text.splitlines())) <= 80


def test_without_evaluation(report: Report) -> None:
    text = drawn(dataclasses.replace(report, before=None, after=None, divergence=None))
    assert "Quality was not measured" in text
    assert "2.89× smaller" in text
    assert "perplexity" not in text


def test_a_classifier(report: Report) -> None:
    def measured(value: float) -> Measured:
        metrics = {"accuracy": Interval(value, value - 0.01, value + 0.01), "f1": Interval(value, 0.8, 0.95)}
        return Measured(Size(10, 100), 0.0, Quality(metrics, 1821, 0, "sst2.csv"))

    text = drawn(dataclasses.replace(report, before=measured(0.912), after=measured(0.879), divergence=None))
    assert "accuracy 91.2% → 87.9% (−3.3 points)" in text
    assert "1,821 rows" in text


def test_only_an_evaluation(report: Report) -> None:
    text = drawn(
        dataclasses.replace(
            report,
            command="evaluate",
            layers=[],
            left=[],
            size_before=None,
            before=None,
            divergence=None,
            verification=None,
            recipe={},
            calibration={},
            phases={},
            peak_memory=None,
            labels=[],
            notes=[],
        )
    )
    assert "12.90" in text
    assert "worst" not in text
    assert "not verified" not in text


def test_a_failed_verification_is_loud(report: Report) -> None:
    assert report.verification is not None
    report.verification.passed = False
    assert "Verification FAILED" in drawn(report)


def test_markup_in_names_is_text(report: Report) -> None:
    report.model, report.notes = "[red]evil[/red]", ["[bold]note[/nothing]"]
    text = drawn(report)
    assert "[red]evil[/red]" in text
    assert "[bold]note[/nothing]" in text
