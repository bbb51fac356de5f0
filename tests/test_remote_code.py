"""A model that brings Python code along: refused, and its code not even downloaded, until it is trusted by its flag."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_inside import inside
from hub_server import HubServer
from tiny import tiny

import llmcomp
from llmcomp import remote_code
from llmcomp.errors import BadCheckpoint
from llmcomp.publishing import card_of, push

REPO = "org/with-code"
CODE = {
    "configuration_mine.py": "from transformers import LlamaConfig\n"
    "open({proof!r}, 'a').close()\n"
    "class MineConfig(LlamaConfig):\n    model_type = 'mine_llama'\n",
    "modeling_mine.py": "from transformers import LlamaForCausalLM\n"
    "from .configuration_mine import MineConfig\n"
    "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n",
}
AUTO = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """With a Llama under another name, whose code writes a file when it runs; nothing is cached here."""
    from huggingface_hub import constants

    source = tiny("llama", tmp_path / "hub" / REPO, tokenizer=True, num_hidden_layers=1)
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "mine_llama", "architectures": ["MineForCausalLM"], "auto_map": AUTO}
    (source / "config.json").write_text(json.dumps(config))
    for name, code in CODE.items():
        (source / name).write_text(code.format(proof=str(tmp_path / "ran")))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))  # of the process that verifies
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # What other tests have run of code like this lies in other directories, by the same package's name.
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if not Path(one, "transformers_modules").is_dir()])
    with inside(tmp_path / "hub", monkeypatch) as running:
        yield running


def test_code_is_refused_downloaded_and_run_as_the_flag_says(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with the flag the checkpoint is verified by a fresh process, pushed, and opened by its card's code."""
    given = {"method": "rtn", "bits": 4, "group_size": 32, "evaluate": False, "output": tmp_path / "q"}
    with pytest.raises(BadCheckpoint, match=r"needs Python code .* then pass --trust-remote-code"):
        llmcomp.quantize(REPO, **given)
    assert not any(request.endswith(".py") for request in hub.requests) and not (tmp_path / "ran").exists()

    done = llmcomp.quantize(REPO, trust_remote_code=True, **given)
    assert (tmp_path / "ran").exists()
    assert done.report.verification is not None and done.report.verification.passed
    assert set(CODE) <= set(done.report.files)
    push(tmp_path / "q", "me/q")
    assert all((hub.root / "me/q" / name).read_text() == (tmp_path / "q" / name).read_text() for name in CODE)

    text = card_of(tmp_path / "q", str(tmp_path / "q")).text
    section = text.split("### transformers")[1]
    assert "runs the Python code of this repository" in section and "llmcomp.load" not in text
    assert "vllm serve" in text and "--trust-remote-code" in text
    exec(compile(section.split("```python\n")[1].split("```")[0], "card", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_only_copies_of_trusted_code_are_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_code, "_trusted", set())
    for name in ("source", "copy", "bare"):
        (tmp_path / name).mkdir()
    for name in ("source", "copy"):
        (tmp_path / name / "modeling.py").write_text("X = 1\n")
    (tmp_path / "source/config.json").write_text(json.dumps({"model_type": "llama"}))
    assert not remote_code.trusts(tmp_path / "copy")
    remote_code.register(tmp_path / "source")
    assert remote_code.trusts(tmp_path / "copy") and not remote_code.trusts(tmp_path / "bare")
    (tmp_path / "copy/other.py").write_text("X = 2\n")
    assert not remote_code.trusts(tmp_path / "copy")


@pytest.mark.parametrize(
    ("code", "words"), [("raise RuntimeError('broken')", "RuntimeError: broken"), (None, "does not appear to have")]
)
def test_code_that_fails(code: str | None, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "broken.Config"}}))
    if code is not None:
        (tmp_path / "broken.py").write_text(code)
    with pytest.raises(BadCheckpoint, match=f"The Python code of .* fails: .*{words}"):
        remote_code.register(tmp_path)
