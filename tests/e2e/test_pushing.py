"""The round trip by real processes: compress and push, download, open plainly, and run every snippet of the card."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_inside import TOKEN
from hub_server import HubServer
from hub_writing import User, card_errors
from tiny import tiny

from llmcomp.report.schema import Report

ROOT = Path(__file__).parents[2]
SOURCE = "org/base"
CARD = "---\nlicense: apache-2.0\nlanguage: en\npipeline_tag: text-generation\n---\n# Base\n"
QUICK = ["--samples", "8", "--sequence-length", "32", "--no-evaluate"]
# Both by plain transformers, one in the Hub's cache and one on disk; their logits, and whether llmcomp was imported.
COMPARE = """
import json, sys, torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
local, repo = sys.argv[1:]
path = snapshot_download(repo)
ids = torch.arange(5, 37)[None]
with torch.no_grad():
    one, two = (AutoModelForCausalLM.from_pretrained(where, dtype="auto").eval()(ids).logits for where in (local, path))
words = [AutoTokenizer.from_pretrained(where)("The value of a list")["input_ids"] for where in (local, path)]
print(json.dumps({"equal": bool(torch.equal(one, two)), "tokens": words[0] == words[1], "path": path,
                  "llmcomp": "llmcomp" in sys.modules}))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    root = tmp_path_factory.mktemp("repositories")
    source = tiny("llama", root / SOURCE, tokenizer=True)
    (source / "README.md").write_text(CARD)
    (source / "LICENSE").write_text("Apache License\n")
    with HubServer(root) as server:
        server.users[TOKEN] = User("me", ("team",))
        yield server


@pytest.fixture(scope="module")
def environment(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    more = {"HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return {**hub.environment(home, **more), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def run(environment: dict[str, str], command: list[str], where: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=where, text=True, capture_output=True,
        stdin=subprocess.DEVNULL, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pushed(
    hub: HubServer, environment: dict[str, str], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A Hub model, quantized and pushed by one command; its directory and what was said."""
    where = tmp_path_factory.mktemp("pushed")
    command = ["-m", "llmcomp", "quantize", SOURCE, "--calibration", str(text), "-o", "q", "--push-to-hub", "me/q"]
    done = run(environment, [*command, *QUICK, "--json"], where)
    assert done.returncode == 0, done.stderr
    return where / "q", done


def test_one_command_compresses_and_pushes(
    pushed: tuple[Path, subprocess.CompletedProcess[str]], hub: HubServer
) -> None:
    directory, done = pushed
    report = Report.from_json(done.stdout)  # one object and nothing else
    assert report.origin is not None and report.origin.repo == SOURCE and len(report.origin.commit or "") == 40
    assert "Licence of the source, org/base: apache-2.0." in done.stderr and f"Published: {hub.url}/me/q" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert (directory / "LICENSE").read_text() == (hub.root / "me/q/LICENSE").read_text()


def test_what_is_downloaded_computes_the_same(
    pushed: tuple[Path, subprocess.CompletedProcess[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    done = run({**environment, "PYTHONPATH": ""}, ["-c", COMPARE, str(pushed[0]), "me/q"], tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"] and found["tokens"] and not found["llmcomp"]
    here, there = Report.read(pushed[0]).files, Report.read(found["path"]).files
    assert {name for name in here if here[name] != there[name]} == {"llmcomp_recipe.yaml"}  # without this directory


def test_every_snippet_of_the_card_runs_as_it_stands(
    pushed: tuple[Path, subprocess.CompletedProcess[str]], hub: HubServer, environment: dict[str, str], tmp_path: Path
) -> None:
    text = (hub.root / "me/q/README.md").read_text()
    assert card_errors(text) == []
    section = text.split("## How to load it")[1].split("\n## ")[0]
    blocks = re.findall(r"### (.+?)\n\n(.+?)\n\n```(\w+)\n(.+?)```", section, re.DOTALL)
    ran = []
    for title, hint, language, code in blocks:
        if "Not run by llmcomp's tests." in hint:
            continue
        command = ["-c", code] if language == "python" else ["-m", *code.split()]
        done = run(environment, command, tmp_path)
        assert done.returncode == 0, f"{title}: {done.stderr}"
        ran.append(title)
    assert ran == ["transformers", "llmcomp", "llama.cpp"]
    assert {title for title, *_ in blocks} - set(ran) == {"vLLM"}
    assert (tmp_path / "q-gguf" / "model.gguf").is_file()


def test_what_fails_at_once_costs_no_work(environment: dict[str, str], tmp_path: Path, text: Path) -> None:
    for token, words in (("hf_wrong", "does not accept the token"), ("", "There is no token")):
        command = ["-m", "llmcomp", "quantize", SOURCE, "-o", "q", "--push-to-hub", "me/other", *QUICK]
        done = run({**environment, "HF_TOKEN": token}, command, tmp_path)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    done = run(environment, ["-m", "llmcomp", "quantize", SOURCE, "--push-to-hub", "me/x", "--no-verify"], tmp_path)
    assert done.returncode == 2 and "publishes only what was verified" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_push_that_fails_leaves_the_output(
    pushed: tuple[Path, subprocess.CompletedProcess[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(pushed[0], tmp_path / "q"))
    (directory / "config.json").write_text("{}")
    done = run(environment, ["-m", "llmcomp", "push", "q", "me/q"], tmp_path)
    assert done.returncode == 2 and "config.json has other bytes; compress it again" in done.stderr
    shutil.copy(pushed[0] / "config.json", directory)
    done = run(environment, ["-m", "llmcomp", "push", "q", "me/q", "--json"], tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["sent"] == [], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_the_card_alone(
    pushed: tuple[Path, subprocess.CompletedProcess[str]], hub: HubServer, environment: dict[str, str], tmp_path: Path
) -> None:
    done = run(environment, ["-m", "llmcomp", "card", str(pushed[0]), "--repo", "me/q"], tmp_path)
    assert done.returncode == 0 and done.stdout == (hub.root / "me/q/README.md").read_text()
    done = run(environment, ["-m", "llmcomp", "card", str(pushed[0]), "-o", "card"], tmp_path)
    assert done.returncode == 0 and {path.name for path in (tmp_path / "card").iterdir()} >= {"README.md"}
    done = run(environment, ["-m", "llmcomp", "card", str(ROOT)], tmp_path)
    assert done.returncode == 2 and "holds no llmcomp_report.json" in done.stderr
