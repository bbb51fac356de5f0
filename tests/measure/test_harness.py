"""lm-eval: its table as intervals, and, where it is installed, a local task without network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny

from llmcomp.errors import BadData
from llmcomp.measure import harness, load
from llmcomp.report.schema import Interval

TASK = """
task: neighbours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_its_table_as_intervals() -> None:
    table = {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 0.25,
                   "em_stderr,strict": "N/A",
                   "bad,none": float("nan")}}  # fmt: skip
    assert harness.intervals(table) == {
        "lm-eval:t/acc": Interval(0.5, 0.5 - 0.196, 0.5 + 0.196),
        "lm-eval:t/em,strict": Interval(0.25, 0.25, 0.25),
    }


def test_a_local_task(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install llmcomp[lm-eval]")
    rows = [
        {"question": f"After {n} comes", "choices": [f" {n + 1}", " x"], "label": n % 2} for n in range(8)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "neighbours.yaml"
    task.write_text(TASK.format(data=data))
    directory = tiny("llama", tmp_path / "model", tokenizer=True)
    model, tokenizer = load.load(directory), load.load_tokenizer(directory)
    found = harness.run(model, tokenizer, (str(task),))
    assert set(found) == {"lm-eval:neighbours/acc"}
    assert 0.0 <= found["lm-eval:neighbours/acc"].value <= 1.0
    with pytest.raises(BadData, match="names no 'task'"):
        task.write_text("output_type: x")
        harness.run(model, tokenizer, (str(task),))
