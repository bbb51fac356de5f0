"""Two processes train as one does with the same samples a step."""

from __future__ import annotations

from pathlib import Path

import pytest
from crew import Crew
from e2e_runs import LENGTH, quantize, tensors
from tiny import tiny

from llmcomp.cli.main import main
from llmcomp.recipe import Calibration, Recipe, SparsifyStep
from llmcomp.report.schema import Report


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    source = tiny("llama", root / "llama", tokenizer=True)
    recipe = Recipe((SparsifyStep("magnitude"),), Calibration(str(text), 8, LENGTH), format="dense")
    return quantize(source, root / "sparse", recipe).output


@pytest.mark.slow
def test_two_processes_are_one(sparse: Path, text: Path, tmp_path: Path) -> None:
    """Losses are divided by the tokens of all, whoever has them: weights differ by the order of sums alone."""
    shared = [
        "recover", str(sparse), "--data", str(text), "--method", "full", "--sequence-length", str(LENGTH), "--steps",
        "4", "--learning-rate", "1e-3", "--samples", "24", "--no-evaluate", "--no-verify",
    ]  # fmt: skip
    together = [*shared, "--batch-size", "2", "-o", str(tmp_path / "two")]
    ended = Crew(tmp_path).run(main, [together], [together])
    assert [one.status for one in ended] == [0, 0], ended
    assert main([*shared, "--batch-size", "4", "-o", str(tmp_path / "one")]) == 0
    one, two, before = (tensors(path) for path in (tmp_path / "one", tmp_path / "two", sparse))
    for name, tensor in one.items():
        moved = float((tensor - before[name]).norm())
        assert moved > 0 and float((two[name] - tensor).norm()) < 1e-2 * moved, name
    losses = [
        [entry["loss"] for entry in report.recovery.history]
        for report in map(Report.read, (tmp_path / "one", tmp_path / "two")) if report.recovery is not None
    ]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 4
