"""Two processes distil as one does with the same samples a step."""

from __future__ import annotations

from pathlib import Path

import pytest
from crew import Crew
from e2e_runs import LENGTH, tensors
from tiny import tiny

from llmcomp.cli.main import main
from llmcomp.report.schema import Report


@pytest.mark.slow
@pytest.mark.parametrize("student", ["layers=1", "layers=1,hidden=64,heads=4,mlp=96"])
def test_two_processes_are_one(student: str, text: Path, tmp_path: Path) -> None:
    """Every loss is divided by the tokens of all, whoever has them, and projections are trained by all. Llama has no
    dropout; weights differ by the order of sums alone."""
    source = tiny("llama", tmp_path / "llama", tokenizer=True)
    shared = [
        "distill", str(source), "--student", student, "--data", str(text), "--method", "tinybert", "--hard-weight",
        "0.5", "--relation-weight", "1", "--transfer-weight", "1", "--sequence-length", str(LENGTH), "--steps", "4",
        "--learning-rate", "1e-3", "--samples", "24", "--no-evaluate", "--no-verify",
    ]  # fmt: skip
    together = [*shared, "--batch-size", "2", "-o", str(tmp_path / "two")]
    ended = Crew(tmp_path).run(main, [together], [together])
    assert [one.status for one in ended] == [0, 0], ended
    assert main([*shared, "--batch-size", "4", "-o", str(tmp_path / "one")]) == 0
    one, two = (tensors(tmp_path / name) for name in ("one", "two"))
    for name, tensor in one.items():
        assert float((two[name] - tensor).norm()) < 1e-2 * float(tensor.norm()), name
    losses = [
        [entry["loss"] for entry in report.distillation.history]
        for report in map(Report.read, (tmp_path / "one", tmp_path / "two")) if report.distillation is not None
    ]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 4


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
    source = tiny("llama", tmp_path / "llama", tokenizer=True)
    shared = [
        "distill", str(source), "--student", "layers=1", "--data", str(text), "--sequence-length", str(LENGTH),
        "--steps", "4", "--learning-rate", "1e-3", "--samples", "24", "--no-evaluate", "--no-verify",
        *[str(tmp_path / "cache") if flag == "CACHE" else flag for flag in flags],
    ]  # fmt: skip
    together = [*shared, "--batch-size", "2", "-o", str(tmp_path / "two")]
    ended = Crew(tmp_path).run(main, [together], [together])
    assert [one.status for one in ended] == [0, 0], ended
    assert main([*shared, "--batch-size", "4", "-o", str(tmp_path / "one")]) == 0
    one, two = (tensors(tmp_path / name) for name in ("one", "two"))
    for name, tensor in one.items():
        assert float((two[name] - tensor).norm()) < 1e-2 * float(tensor.norm()), name
