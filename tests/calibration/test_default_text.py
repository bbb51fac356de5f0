"""Where a text comes from: the Hub, its cache, or what ships."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hub_server import HubServer, hub_environment

# One process reads several sources: importing torch and datasets takes longer than all of them.
SCRIPT = """
import json, sys
from llmcomp.calibration import data
from llmcomp.errors import BadData
from llmcomp.progress import Silent
class Notes(Silent):
    said = []
    def note(self, text): self.said.append(text)
for function, source in json.loads(sys.argv[1]):
    try:
        texts = getattr(data, function)(source, progress=Notes())
        answer = {"rows": texts.rows[:3], "description": texts.description, "running": texts.running}
    except BadData as error:
        answer = {"error": str(error)}
    print(json.dumps({**answer, "notes": Notes.said, "datasets": "datasets" in sys.modules}))
"""


def read_in_process(environment, *asked: tuple[str, str]) -> list[dict]:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(asked)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory):
    """A Hub with a small dataset under WikiText's name, train and test."""
    root = tmp_path_factory.mktemp("hub")
    folder = root / "datasets/Salesforce/wikitext/wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        table = pyarrow.table({"text": ["", f" = {split} = \n", "A sentence . \n"]})
        pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    files = [{"split": s, "path": f"wikitext-2-raw-v1/{s}-*"} for s in ("train", "test")]
    card = json.dumps({"configs": [{"config_name": "wikitext-2-raw-v1", "data_files": files}]})
    (folder.parent / "README.md").write_text(f"---\n{card}\n---\n")
    return root


def test_default_is_wikitext_through_the_hub_and_then_from_the_cache(wikitext, tmp_path):
    with HubServer(wikitext) as hub:
        train, test, missing, config = read_in_process(
            hub.environment(tmp_path),
            ("read_texts", "default"),
            ("evaluation_texts", "default"),
            ("read_texts", "Salesforce/nothing"),
            ("read_texts", "Salesforce/wikitext:nothing"),
        )
    assert train["rows"] == ["", " = train = \n", "A sentence . \n"]
    assert train["running"] and "WikiText-2 train" in train["description"]
    assert test["rows"][1] == " = test = \n"
    assert "Dataset Salesforce/nothing is not on the Hub" in missing["error"]
    assert "nothing" in config["error"] and "cannot be read" in config["error"]
    (offline,) = read_in_process(hub.environment(tmp_path), ("read_texts", "default"))  # the server is gone
    assert offline["rows"] == train["rows"]


def test_without_network_there_is_one_sentence_or_the_text_that_ships(tmp_path):
    from llmcomp.samples import calibration_text, validation_text

    asked = [("read_texts", "org/name:config")]
    if calibration_text().is_file():
        asked += [("read_texts", "default"), ("evaluation_texts", "default")]
    named, *shipped = read_in_process(hub_environment("http://127.0.0.1:9", tmp_path), *asked)
    assert named["error"].startswith("Dataset org/name (config) is neither cached nor reachable (")
    assert not named["datasets"]
    if not shipped:
        pytest.skip("the sample texts have not been made")
    train, held_out = shipped
    assert "the text that ships" in train["description"] and "WikiText-2 cannot be had" in train["notes"][0]
    assert "held-out text that ships" in held_out["description"]
    assert not held_out["datasets"]
    assert calibration_text().read_text(encoding="utf-8").startswith(train["rows"][0])
    assert validation_text().read_text(encoding="utf-8").startswith(held_out["rows"][0])
