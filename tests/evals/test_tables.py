"""The benchmark's table of a classifier, on logits whose answers are known."""

import json

import numpy as np
import pytest

from evals import learned, quality
from evals.parts import PARTS, TOOLS
from evals.process import Measured
from evals.quality import compared, sst2_table


def test_accuracy_is_counted_against_the_labels_and_in_points_from_the_original(tmp_path, monkeypatch):
    labels = [0, 1, 1, 0]
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    rows = [json.dumps({"sentence": "a", "label": label}) for label in labels]
    (folder / "test.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.setenv("LLMCOMP_ASSETS", str(tmp_path))
    original = np.eye(2)[[0, 1, 1, 1]].tolist()  # three of four are right
    compressed = np.eye(2)[[0, 1, 0, 1]].tolist()  # two are, and one answer differs
    part = PARTS["sst2"]
    results = {(setting.name, "llmcomp"): [{"scores": {"sst2": compressed}}] * 3 for setting in part.settings}

    table = sst2_table(part, ["llmcomp", "llmcompressor gptq"], results, {"sst2": original})

    row = next(line for line in table.splitlines() if "| 4-bit g128    | llmcomp " in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert "accuracy 75.00%" in table
    assert cells[2:4] == ["50.00%", "-25.00 [-75.00, +0.00]"]
    assert cells[6] == "75.00%"
    assert "refused" in table.splitlines()[-1]


def test_auto_stands_against_the_best_peer_where_it_ran():
    losses = {"llmcomp": 4.0, "llmcompressor gptq": 3.9, "auto-round": 3.8}
    values = {name: np.full((3, 8), loss) for name, loss in losses.items()}
    assert compared(values, relative=True).startswith("+22.14%")
    values["llmcomp auto"] = np.full((3, 8), 3.8)
    assert compared(values, relative=True) == "+0.00% [+0.00, +0.00] vs auto-round"


@pytest.mark.parametrize(("name", "kept_ours", "again"), [
    ("auto-round", False, False), ("llmcomp", False, True), ("llmcomp", True, False)
])  # fmt: skip
def test_our_own_cells_are_measured_again_unless_asked(name, kept_ours, again, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "cell_path", lambda *_: tmp_path / "cell.json")
    monkeypatch.setattr(quality, "measure", lambda *_: {"seconds": 2.0})
    (tmp_path / "cell.json").write_text('{"seconds": 1.0}')
    part = PARTS["lm"]
    found = quality.result(TOOLS[name], part, part.settings[0], 0, tmp_path, 1, kept_ours)
    assert found["seconds"] == (2.0 if again else 1.0)


def test_times_of_learned_rounding_are_shares_of_the_peers():
    def measured(seconds):
        return Measured(seconds, seconds, 2_000_000, 0, 0, 0, {}, seconds / 2)

    table = learned.table({"llmcomp signround": [measured(3.0), measured(1.0)], "auto-round": [measured(8.0)]})
    assert [cell.strip() for cell in table.splitlines()[2].strip("|").split("|")] == [
        "llmcomp signround", "2.0", "0.250", "1.0", "0.250", "2",
    ]
