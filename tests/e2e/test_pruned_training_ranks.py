"""Two processes prune as one does with the same samples a step, and under the same masks."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import Crew
from e2e_runs import tensors
from tiny import tiny

from llmcomp.report.schema import Report
from llmcomp.training import trainer
from llmcomp.training.pruning import mask_buffers

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prune_in_training.py"


def rank(notes: str, arguments: list[str]) -> int:
    """One rank of the script, which notes the masks that it ends every round with."""
    import os

    train, count = trainer.train, 0

    def noting(model: Any, *given: Any, **settings: Any) -> Any:
        nonlocal count
        found = train(model, *given, **settings)
        masks = {name: mask.clone() for name, mask in mask_buffers(model)}
        torch.save(masks, f"{notes}-{os.environ['RANK']}-{count}.pt")
        count += 1
        return found

    from llmcomp import pruned_training

    pruned_training.train = noting
    found: int = runpy.run_path(str(SCRIPT))["main"](arguments)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "rounds"),
    [(["method=gradual", "pattern=2:4"], 1), (["method=movement", "sparsity=0.7"], 1),
     (["method=lottery", "sparsity=0.5", "rounds=1", "rewind=0.25"], 2)],
    ids=["gradual", "movement", "lottery"],
)  # fmt: skip
def test_two_processes_are_one(settings: list[str], rounds: int, text: Path, tmp_path: Path) -> None:
    """Of a model without dropout, which each process draws for itself."""
    source, config = tiny("llama", tmp_path / "source", tokenizer=True), tmp_path / "plan.yaml"
    config.write_text(
        f"model: {source}\ndata: {text}\nsamples: 24\nsequence_length: 32\nsteps: 4\nlearning_rate: 1e-3\n"
        "device: cpu\nevaluate: false\nverify: false\n"
    )
    notes = str(tmp_path / "masks")
    shared = ["--config", str(config), *settings]
    together = [*shared, "batch_size=2", f"output={tmp_path / 'two'}"]
    ended = Crew(tmp_path).run(rank, [notes, together], [notes, together])
    assert [one.status for one in ended] == [0, 0], ended
    for number in range(rounds):
        first, second = (torch.load(f"{notes}-{one}-{number}.pt") for one in (0, 1))
        assert first.keys() == second.keys() and first
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert runpy.run_path(str(SCRIPT))["main"]([*shared, "batch_size=4", f"output={tmp_path / 'one'}"]) == 0
    one, two = (tensors(tmp_path / name) for name in ("one", "two"))
    reports = [Report.read(tmp_path / name) for name in ("one", "two")]
    for layer in reports[0].layers:
        name = f"{layer.name}.weight"
        kept = (one[name] != 0) == (two[name] != 0)
        assert float(kept.float().mean()) > 0.97, name  # where scores are close, the order of sums decides
        assert int((one[name] == 0).sum()) == int((two[name] == 0).sum())
    losses = [[entry["loss"] for entry in report.pruning.history] for report in reports if report.pruning is not None]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and len(losses[0]) == 4 * rounds
