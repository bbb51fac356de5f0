"""Pairs made of a book: each half of a paragraph once, scores by how close together they stood."""

from __future__ import annotations

import json
from pathlib import Path

from evals.sentences import LONGEST, SHORTEST, book_pairs, write_pairs

# Paragraph n is n:0 n:1 …, with some between them that are too short or too long.
PARAGRAPHS = [" ".join(f"{n}:{word}" for word in range(SHORTEST + n % 7)) for n in range(41)]
TEXT = "\n\n".join(f"{one}\n\nA heading\n\n{'long ' * (LONGEST + 1)}" for one in PARAGRAPHS)


def test_scores_are_distances() -> None:
    pairs = book_pairs(TEXT)
    assert len(pairs) == 30
    for first, second, score in pairs:
        one, other = (int(text.split(":")[0]) for text in (first, second))
        assert abs(other - one) == {2: 0, 1: 1, 0: 20}[score]
        assert PARAGRAPHS[one].startswith(first) and PARAGRAPHS[other].endswith(second)
    halves = [text for first, second, _ in pairs for text in (first, second)]
    assert len(set(halves)) == len(halves)
    assert [score for *_, score in pairs] == [2, 1, 0] * 10


def test_written_as_json_lines(tmp_path: Path) -> None:
    pairs = book_pairs(TEXT)
    write_pairs(pairs, tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [(row["first"], row["second"], row["score"]) for row in rows] == pairs
