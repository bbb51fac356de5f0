"""Two processes distil as one does with the same samples a step."""

from __future__ import annotations

from pathlib import Path

import pytest
from crew import Crew
from e2e_runs import LENGTH, tensors
from tiny import tiny
from tiny_media import write_data

from llmcomp.cli.main import main
from llmcomp.report.schema import Report


def both(words: list[str], data: Path, work: Path, name: str = "llama") -> tuple[Path, Path]:
    """Students of one process with batches of four, and of two with batches of two each. The teacher has no dropout."""
    source = tiny(name, work / name, tokenizer=True)
    length = ["--sequence-length", str(LENGTH)] if name == "llama" else []
    shared = [
        "distill", str(source), "--data", str(data), *words, *length, "--steps", "4",
        "--learning-rate", "1e-3", "--samples", "24", "--no-evaluate", "--no-verify",
    ]  # fmt: skip
    one, two = work / "one", work / "two"
    together = [*shared, "--batch-size", "2", "-o", str(two)]
    ended = Crew(work).run(main, [together], [together])
    assert [one.status for one in ended] == [0, 0], ended
    assert main([*shared, "--batch-size", "4", "-o", str(one)]) == 0
    return one, two


def assert_same(one: Path, two: Path) -> None:
    """Weights differ by the order of sums alone."""
    found = tensors(two)
    for name, tensor in tensors(one).items():
        assert float((found[name] - tensor).norm()) < 1e-2 * float(tensor.norm()), name


@pytest.mark.parametrize(
    "student", ["layers=1", pytest.param("layers=1,hidden=64,heads=4,mlp=96", marks=pytest.mark.slow)]
)
def test_two_processes_are_one(student: str, text: Path, tmp_path: Path) -> None:
    """Every loss is divided by the tokens of all, whoever has them; projections are trained by all; the samples of a
    step are the same whoever reads them."""
    words = ["--student", student, "--method", "tinybert", "--hard-weight", "0.5", "--relation-weight", "1"]
    made = both([*words, "--transfer-weight", "1", "--group-by-length"], text, tmp_path)
    assert_same(*made)
    losses = [
        [entry["loss"] for entry in report.distillation.history]
        for report in map(Report.read, made) if report.distillation is not None
    ]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 4


@pytest.mark.slow
def test_two_processes_read_images(tmp_path: Path) -> None:
    """Patches are counted over both."""
    data = write_data("vit-classifier", tmp_path / "images", 16)
    words = ["--student", "layers=1,hidden=64,heads=4,mlp=96", "--method", "tinybert", "--hard-weight", "0.5"]
    assert_same(*both([*words, "--relation-weight", "1", "--transfer-weight", "1"], data, tmp_path, "vit-classifier"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [["--teacher-cache", "CACHE", "--assistants", "layers=2"], ["--peer", "layers=1,hidden=64,heads=4,mlp=96"],
     ["--past", "0.9"]],
    ids=["cache", "peer", "past"],
)  # fmt: skip
def test_schemes_of_two_processes(flags: list[str], text: Path, tmp_path: Path) -> None:
    """Both write their share of a cache and read all of it; a chain of runs meets again for each; a second student has
    gradients of all; each keeps the same past."""
    flags = [str(tmp_path / "cache") if flag == "CACHE" else flag for flag in flags]
    assert_same(*both(["--student", "layers=1", *flags], text, tmp_path))
