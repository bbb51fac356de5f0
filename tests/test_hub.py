"""Names to directories: samples, local, alias, cache, Hub on loopback; and what is said where none is."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_inside import inside
from hub_server import HubServer, hub_environment
from tiny import tiny

from llmcomp import downloading, hub, network
from llmcomp.aliases import ALIASES
from llmcomp.errors import BadCheckpoint, ModelNotFound, RunError
from llmcomp.provenance import origin_of

BERT = "google-bert/bert-base-uncased"
# A fresh process, since huggingface_hub reads its environment when imported.
SCRIPT = """
import dataclasses, json, sys
from llmcomp.errors import LlmcompError
from llmcomp.hub import resolve
from llmcomp.progress import Silent

class Notes(Silent):
    said = []
    def note(self, text): self.said.append(text)

name, revision, config_only = json.loads(sys.argv[1])
try:
    found = dataclasses.asdict(resolve(name, revision=revision, config_only=config_only, progress=Notes()))
    answer = {**found, "path": str(found["path"])}
except LlmcompError as error:
    answer = {"error": type(error).__name__, "message": str(error)}
heavy = [module for module in ("torch", "transformers", "datasets") if module in sys.modules]
print(json.dumps({**answer, "notes": Notes.said, "heavy": heavy}))
"""


def resolve_in_process(environment: dict[str, str], name: str, revision=None, config_only=False) -> dict:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([name, revision, config_only])],
        env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    answer = json.loads(run.stdout)
    assert answer["heavy"] == []
    return answer


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    """A Hub's folder: a tiny BERT in shards behind the real name, and repositories with something wrong."""
    root = tmp_path_factory.mktemp("hub")
    bert = tiny("bert", root / BERT, tokenizer=True, shard="300KB")
    for junk in ("pytorch_model.bin", "tf_model.h5", "modeling_evil.py", "model.onnx", "onnx/model.onnx"):
        (bert / junk).parent.mkdir(exist_ok=True)
        (bert / junk).write_bytes(b"not wanted")
    sentence = tiny("bert", root / "sentence-transformers/all-MiniLM-L6-v2", num_hidden_layers=1)
    (sentence / "modules.json").write_text("[]")
    (sentence / "1_Pooling").mkdir()
    (sentence / "1_Pooling/config.json").write_text("{}")
    (sentence / "consolidated.safetensors").write_bytes(b"twice the same weights")
    pickled = root / "facebook/opt-125m"
    pickled.mkdir(parents=True)
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    return root


@pytest.fixture(scope="module")
def server(repositories):
    with HubServer(repositories) as running:
        yield running


@pytest.fixture(scope="module")
def closed_url() -> str:
    """An address at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(scope="module")
def home(server, tmp_path_factory) -> Path:
    """A HF_HOME into which 'bert-base' has been downloaded."""
    home = tmp_path_factory.mktemp("home")
    answer = resolve_in_process(server.environment(home), "bert-base")
    assert answer["origin"] == "hub"
    return home


def test_an_alias_downloads_what_is_needed_and_no_more(server, home, repositories):
    answer = resolve_in_process(server.environment(home), "bert-base")
    path = Path(answer["path"])
    have = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    wanted = {p.name for p in (repositories / BERT).iterdir() if p.suffix in (".json", ".safetensors")}
    assert have == wanted
    assert sum(name.endswith(".safetensors") for name in have) > 1
    for name in have:
        assert (path / name).read_bytes() == (repositories / BERT / name).read_bytes()
    assert (answer["source"], answer["name"]) == (BERT, "bert-base-uncased")
    assert answer["revision"] == path.name


def test_offline_mode_takes_the_cache_and_asks_nothing(server, home):
    before = len(server.requests)
    answer = resolve_in_process(server.environment(home, HF_HUB_OFFLINE="1"), "bert-base")
    assert answer["origin"] == "cache"
    assert (Path(answer["path"]) / "config.json").is_file()
    assert len(server.requests) == before


def test_an_unreachable_hub_falls_back_to_the_cache_and_says_so(home, closed_url):
    answer = resolve_in_process(hub_environment(closed_url, home), "bert-base")
    assert answer["origin"] == "cache"
    assert "cache" in answer["notes"][0] and answer["revision"][:12] in answer["notes"][0]


@pytest.mark.parametrize("offline", ["0", "1"])
def test_neither_cached_nor_reachable(tmp_path, closed_url, offline):
    environment = {**hub_environment(closed_url, tmp_path), "HF_HUB_OFFLINE": offline}
    answer = resolve_in_process(environment, "bert-base")
    why = "HF_HUB_OFFLINE is set" if offline == "1" else "[Errno 111] Connection refused"
    assert answer["error"] == "ModelNotFound"
    assert answer["message"] == (
        f"bert-base ({BERT}) is neither cached (in {tmp_path}/hub) nor reachable ({why}); what works "
        "offline: sample:lm, sample:classifier, or a directory with a local model."
    )


def test_an_incomplete_cache_is_not_taken(home, closed_url, tmp_path):
    copy = tmp_path / "home"
    shutil.copytree(home, copy, symlinks=True)
    shard = next(copy.rglob("snapshots/*/model-00002*"))
    shard.unlink()
    answer = resolve_in_process(hub_environment(closed_url, copy), "bert-base")
    assert answer["error"] == "ModelNotFound"
    assert f"lacks {shard.name}" in answer["message"]


def test_config_only_downloads_no_weights(server, tmp_path):
    answer = resolve_in_process(server.environment(tmp_path), "minilm", config_only=True)
    names = {p.name for p in Path(answer["path"]).iterdir()}
    assert "config.json" in names
    assert not any(name.endswith(".safetensors") for name in names)


def test_sentence_transformers_modules_come_along_and_doubled_weights_do_not(server, tmp_path):
    path = Path(resolve_in_process(server.environment(tmp_path), "minilm")["path"])
    assert (path / "1_Pooling/config.json").is_file()
    assert [p.name for p in path.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "revision", "error", "words"),
    [
        ("bert-base", "no-such-branch", "ModelNotFound", "has no revision 'no-such-branch' on the Hub"),
        ("google-bert/bert-base-uncasd", None, "ModelNotFound", f"did you mean {BERT}"),
        ("bert-bse", None, "ModelNotFound", "did you mean bert-base"),
        ("gpt2", None, "ModelNotFound", "gpt2 stands for openai-community/gpt2, which"),
        (
            "opt-125m",
            None,
            "BadCheckpoint",
            "has no model.safetensors, only pytorch_model.bin: such files can run",
        ),
    ],
)
def test_what_the_hub_does_not_have(server, tmp_path, name, revision, error, words):
    answer = resolve_in_process(server.environment(tmp_path), name, revision)
    assert answer["error"] == error
    assert words in answer["message"]


def test_a_gated_repository_names_the_login(server, tmp_path):
    server.gated.add(BERT)
    try:
        answer = resolve_in_process(server.environment(tmp_path), "bert-base")
    finally:
        server.gated.discard(BERT)
    assert answer["error"] == "ModelNotFound"
    assert "hf auth login" in answer["message"]


def test_a_name_server_that_does_not_answer_costs_one_second(monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(4) or [])
    start = time.perf_counter()
    with pytest.raises(network.Unreachable, match="no connection within 1 s"):
        network.ask("https://hub.invalid/api/models/x")
    assert time.perf_counter() - start < 2


def test_a_download_that_does_not_fit_is_not_begun(repositories, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(downloading.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 1000))
    with inside(repositories, monkeypatch) as running:
        with pytest.raises(RunError, match=r"takes 0\.00 GB, and the disk of .* set HF_HOME to a place that has it"):
            hub.resolve(BERT)
        assert not [request for request in running.requests if "/resolve/" in request]


def test_the_card_and_the_licence_come_along(repositories, tmp_path):
    folder = repositories / "org/licensed"
    shutil.copytree(repositories / BERT, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "LICENSE.md").write_text("MIT")
    with HubServer(repositories) as running:
        path = Path(resolve_in_process(running.environment(tmp_path), "org/licensed")["path"])
    assert (path / "README.md").is_file() and (path / "LICENSE.md").is_file()
    found = origin_of(path)
    assert (found.repo, found.commit, found.license) == ("org/licensed", path.name, "mit")


def test_local_directories(tmp_path, monkeypatch):
    model = tiny("llama", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    for name in (str(model), "mine", "./mine"):
        found = hub.resolve(name)
        assert (found.origin, found.name, found.source) == ("local", "mine", str(model))
        assert found.path.resolve() == model


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ([], BadCheckpoint, "has no config.json (found: nothing)"),
        (["config.json"], BadCheckpoint, "has no weights: expected model.safetensors"),
        (
            ["config.json", "pytorch_model.bin"],
            BadCheckpoint,
            "only pytorch_model.bin: such files can run code",
        ),
        (["config.json", "model.safetensors.index.json"], BadCheckpoint, "lacks 1 of the files that its"),
    ],
)
def test_directories_that_are_no_model(tmp_path, files, error, words):
    for name in files:
        (tmp_path / name).write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(error) as caught:
        hub.resolve(str(tmp_path))
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["./nothing-here", "/no/such/place", "a/b/c", "~/nothing-here"])
def test_paths_that_do_not_exist(name):
    with pytest.raises(ModelNotFound, match="There is no directory"):
        hub.resolve(name)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelNotFound, match="is a file; expected a directory"):
        hub.resolve(str(tmp_path / "model.safetensors"))


def test_unknown_samples_are_refused():
    with pytest.raises(ModelNotFound, match="sample:lm"):
        hub.resolve("sample:nonsense")


def test_aliases_are_lower_case_and_lead_to_one_repository_each():
    assert all(name == name.lower() for name in ALIASES)
    repos = [alias.repo for alias in ALIASES.values()]
    assert len(set(repos)) == len(repos)
    assert all(repo.count("/") == 1 for repo in repos)


@pytest.mark.parametrize("folder", ["0_Transformer", "0_BERT"])
def test_a_transformer_in_a_folder_of_its_own(tmp_path: Path, folder: str) -> None:
    """The layout of sentence-transformers before version 2."""
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(BadCheckpoint, match=rf"keeps its transformer in {folder}/; move the files .* up beside"):
        hub.resolve(str(tmp_path))
