"""Numbers and names as people read them: shared by the terminal table, the page, the card and the bar.

Sizes are decimal (1 MB = 10^6 bytes), as the Hub and disk vendors count. Minus signs are U+2212.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from datetime import datetime, timezone

ABSENT = "—"


def size(count: float) -> str:
    """
    >>> size(812), size(4_210_000), size(2_200_000_000), size(999_999)
    ('812 B', '4.21 MB', '2.20 GB', '1.00 MB')
    """
    if count < 1000:
        return f"{count:.0f} B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            return f"{_three(value)} {unit}"
    raise ValueError(f"not a size: {count}")  # unreachable: TB takes every number


def parameters(count: int) -> str:
    """
    >>> parameters(1_100_048_384), parameters(22_713_216), parameters(640)
    ('1.10 B', '22.7 M', '640')
    """
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale * 0.9995:
            return f"{_three(count / scale)} {unit}"
    return str(count)


def seconds(value: float) -> str:
    """
    >>> seconds(0.00843), seconds(2.13), seconds(192), seconds(3720)
    ('8.43 ms', '2.1 s', '3 min 12 s', '1 h 02 min')
    """
    if value < 0.9995:
        return f"{_three(value * 1000)} ms"
    if value < 99.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def about(value: float) -> str:
    """Seconds that are an estimate, no finer than they are meant.

    >>> about(12.34), about(2853), about(6000), about(108773)
    ('12.3 s', '48 min', '1.7 h', '30 h')
    """
    if value < 99.95:
        return seconds(value)
    if round(value / 60) < 60:
        return f"{round(value / 60)} min"
    return f"{value / 3600:.1f} h" if value < 35_820 else f"{round(value / 3600)} h"  # from 9.95 h on


def moment(created: str) -> str:
    """An ISO time to the minute, in UTC where it has an offset; anything else as it is.

    >>> moment("2026-11-21T10:41:07+01:00"), moment("yesterday")
    ('2026-11-21 09:41 UTC', 'yesterday')
    """
    try:
        when = datetime.fromisoformat(created)
    except ValueError:
        return created
    if when.tzinfo is None:
        return f"{when:%Y-%m-%d %H:%M}"
    return f"{when.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"


def number(value: float) -> str:
    """Four significant digits above one, four decimals below, three digits where those would not show.

    >>> number(31.4159), number(0.98765), number(48210.3), number(0.0381), number(0.000123), number(6.0)
    ('31.42', '0.9877', '48,210', '0.0381', '1.23e-04', '6.000')
    """
    if not math.isfinite(value):
        return str(value)
    magnitude = abs(value)
    if magnitude >= 9999.5:
        return f"{value:,.0f}"
    if magnitude >= 1:
        return f"{value:.{3 - math.floor(math.log10(magnitude))}f}"
    return f"{value:.4f}" if magnitude >= 0.00095 or magnitude == 0 else f"{value:.2e}"


def error(value: float | None) -> str:
    """A layer's relative error.

    >>> error(0.01234), error(0.000012), error(None)
    ('0.0123', '1.2e-05', '—')
    """
    if value is None:
        return ABSENT
    return f"{value:.4f}" if value >= 0.00095 or value == 0 else f"{value:.1e}"


def percent(share: float, digits: int = 1) -> str:
    return f"{share * 100:.{digits}f}%"


def signed(value: float, text: str) -> str:
    """`text` of an absolute value with the sign of `value`."""
    return ("−" if value < 0 else "+") + text


def ratio(before: float, after: float) -> str:
    """
    >>> ratio(420, 100), ratio(100, 110), ratio(100, 100)
    ('4.20× smaller', '1.10× larger', 'same')
    """
    return times(before, after, "smaller", "larger")


def times(before: float, after: float, down: str, up: str, tolerance: float = 0.005) -> str:
    """The factor between two amounts with the word for its direction; '' where one is not positive.

    >>> times(2.31, 2.29, "less", "more", tolerance=0.02), times(1, 1.5, "faster", "slower")
    ('same', '1.50× slower')
    """
    if before <= 0 or after <= 0 or abs(before / after - 1) < tolerance:
        return "same" if before > 0 and after > 0 else ""
    return f"{before / after:.2f}× {down}" if before > after else f"{after / before:.2f}× {up}"


def collapse(names: Iterable[str]) -> list[str]:
    """Names that differ in their first number alone, as one.

    >>> collapse(["h.0.fc", "h.1.fc", "h.2.fc", "h.4.fc", "head"])
    ['h.{0–2, 4}.fc', 'head']
    """
    found: dict[tuple[str, str], list[int]] = {}
    for name in names:
        parts = re.fullmatch(r"((?:[^.]+\.)*?)(\d+)((?:\..*)?)", name)
        if parts is None:
            found.setdefault((name, ""), [])
        else:
            found.setdefault((parts[1], parts[3]), []).append(int(parts[2]))
    return [
        head if not numbers else f"{head}{_braces(sorted(set(numbers)))}{tail}"
        for (head, tail), numbers in found.items()
    ]


def _braces(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else "{" + ranges(numbers) + "}"


def ranges(numbers: list[int]) -> str:
    """Sorted integers as ranges.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0–2, 5, 7, 8'
    """
    runs: list[list[int]] = []
    for value in numbers:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    parts = [f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts)


def _three(value: float) -> str:
    """Three significant digits, no exponent, for 0.0 … 999."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
