"""What of a report is not published: directories, wherever they stand; and what is left as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hub_artefact import make_artefact, report_of, write
from hypothesis import given
from hypothesis import strategies as st

from llmcomp.publishing import card_of, contents
from llmcomp.report.public import public, public_text, shown
from llmcomp.report.schema import Report, Verification

SECRETS = ("somebody", "secret place")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/train.jsonl: 8 samples of 32 tokens", "train.jsonl: 8 samples of 32 tokens"),
        ("on ~/data/held.txt, and (/tmp/x/y.csv)", "on held.txt, and (y.csv)"),
        ("../up/one.parquet and ./here", "one.parquet and here"),
        ("private/train.jsonl: 8 samples", "train.jsonl: 8 samples"),
        ("C:\\Users\\me\\a.txt: 8 samples", "a.txt: 8 samples"),
        ("/h/.cache/huggingface/hub/models--org--a.b/snapshots/" + "0" * 40, "org/a.b"),
        ("source: /home/me/mine.txt, samples: 8", "source: mine.txt, samples: 8"),
    ],
)
def test_directories_go(text: str, expected: str) -> None:
    assert shown(text, []) == expected


@pytest.mark.parametrize(
    "text",
    [
        "org/base", "Salesforce/wikitext:wikitext-2-raw-v1:train", "https://huggingface.co/org/base/blob/main/a.json",
        "12 tokens/s on 2/3 of W8A8", "re:.*\\.(q|k)_proj", "int4 g128 / int8", "and/or", "sample:lm", "a / b",
        "1_Pooling/config.json", "",
    ],
)  # fmt: skip
def test_what_is_no_directory_stays(text: str) -> None:
    assert shown(text, [], {"1_Pooling/config.json": ""}) == text


NAMES = st.text("abcdefghij-_.0", min_size=3, max_size=9).filter(lambda name: name.strip("."))


@given(st.lists(NAMES, min_size=2, max_size=5))
def test_of_any_path_the_last_part_stays(parts: list[str]) -> None:
    path = "/" + "/".join(parts)
    assert shown(path, []) == shown(f"{path}: 8 samples", [])[: -len(": 8 samples")] == parts[-1]


@pytest.fixture
def told(tmp_path: Path) -> tuple[Path, Report]:
    """A checkpoint whose report and recipe name files of this machine, in fields and in sentences."""
    directory = make_artefact(tmp_path)
    data = "/home/somebody/secret place/mine.txt"
    (directory / "llmcomp_recipe.yaml").write_text(f"calibration: {{source: {data}, samples: 8}}\n")
    (directory / "prune_in_training.yaml").write_text(f"data: {data}\n")
    (directory / "distill.yaml").write_text("teacher: /home/somebody/teacher\n")
    report = replace(
        report_of(directory), recipe={"steps": [], "calibration": {"source": data}},
        calibration={"source": data, "description": f"{data}: 8 samples", "warnings": [f"{data} is short"]},
        notes=["Read /home/somebody/secret/held.txt."], verification=Verification(True, ["all"], 0.0, 1),
    )  # fmt: skip
    write(directory, report)
    return directory, report


def test_no_path_is_in_anything_that_is_pushed(told: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcomp.report import png

    monkeypatch.setattr(png, "drawings", lambda report: {})
    directory, report = told
    files, hashes = contents(directory, report, "me/mine")
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        for secret in SECRETS:
            assert secret.encode() not in data, name
    assert b"source: mine.txt" in files["llmcomp_recipe.yaml"]  # type: ignore[operator]
    assert {"prune_in_training.yaml", "distill.yaml"} <= set(files)
    there = Report.from_json(files["llmcomp_report.json"].decode())  # type: ignore[union-attr]
    assert there.files == hashes and hashes["llmcomp_recipe.yaml"] != report.files["llmcomp_recipe.yaml"]
    assert {name for name in hashes if hashes[name] != report.files[name]} == {"llmcomp_recipe.yaml"}
    assert not any(secret in card_of(directory, "me/mine").text for secret in SECRETS)


def test_what_has_no_path_is_the_same(tmp_path: Path) -> None:
    report = replace(report_of(make_artefact(tmp_path)), model="org/base", source="org/base", output="out")
    assert public(report) == Report.from_json(report.to_json())
    text = "steps:\n- {method: gptq, targets: ['re:.*_proj']}\n"
    assert public_text(text, report) == text
    assert json.loads(public(report).to_json())["files"] == report.files
