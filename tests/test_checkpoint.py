"""Checkpoints: bound as from_pretrained would load them, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from spoiled import EMBEDDING, HEAD, assert_same_outputs, plain, rewrite, saved, set_config
from tiny import TINY, VOCABULARY, tiny
from torch import Tensor

from llmcomp.adapters.discover import discover, skeleton
from llmcomp.checkpoint import Checkpoint, bind
from llmcomp.errors import BadCheckpoint

AGAIN = "copy or download it again"


# --- what is read is what transformers reads ---


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_from_pretrained(name: str, tmp_path: Path) -> None:
    binding = assert_same_outputs(tiny(name, tmp_path))
    assert binding.unused == []
    assert set(binding.missing) == set(binding.ties)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "modernbert"])
def test_bfloat16_logits_too(name: str, tmp_path: Path) -> None:
    assert_same_outputs(tiny(name, tmp_path, dtype=torch.bfloat16))


def test_stored_in_another_dtype_than_the_config_says(tmp_path: Path) -> None:
    """from_pretrained casts to the config's dtype; so does a binding."""
    binding = assert_same_outputs(set_config(tiny("llama", tmp_path), dtype="bfloat16"))
    assert set(binding.dtypes.values()) == {torch.bfloat16}


def test_shards_and_index(tmp_path: Path) -> None:
    binding = assert_same_outputs(tiny("qwen3", tmp_path, shard="500KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert binding.checkpoint.nbytes == sum(t.nbytes for t in plain(tmp_path).parameters())


@pytest.mark.parametrize("folder", ["lm", "minilm-sst2"])
def test_trained_models(folder: str, assets: Path) -> None:
    assert assert_same_outputs(assets / "models" / folder).unused == []


# --- names as the Hub has them ---


def test_bert_as_google_stored_it(tmp_path: Path) -> None:
    """LayerNorm.gamma/beta, a decoder tied by absence, position_ids and the next-sentence head left over."""

    def old(state: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        renamed = {}
        for key, value in state.items():
            for new, legacy in names.items():
                key = key.replace(new, legacy)
            renamed[key] = value
        extra = {
            "bert.embeddings.position_ids": torch.arange(128)[None],
            "cls.seq_relationship.weight": torch.zeros(2, 128),
            "cls.seq_relationship.bias": torch.zeros(2),
        }
        return renamed | extra

    binding = assert_same_outputs(rewrite(tiny("bert", tmp_path), old))
    assert binding.key_of["bert.embeddings.LayerNorm.weight"] == "bert.embeddings.LayerNorm.gamma"
    assert binding.key_of["bert.embeddings.LayerNorm.bias"] == "bert.embeddings.LayerNorm.beta"
    assert sorted(binding.unused) == [
        "bert.embeddings.position_ids", "cls.seq_relationship.bias", "cls.seq_relationship.weight",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("gpt2", "transformer."), ("bert", "bert."), ("opt", "model."), ("mpnet", "mpnet.")],
)
def test_body_stored_without_the_base_prefix(name: str, prefix: str, tmp_path: Path) -> None:
    """As openai-community/gpt2 is: 'h.0.ln_1.weight' for 'transformer.h.0.ln_1.weight'."""
    rewrite(tiny(name, tmp_path), lambda s: {key.removeprefix(prefix): value for key, value in s.items()})
    binding = assert_same_outputs(tmp_path)
    body = [name for name in binding.key_of if name.startswith(prefix)]
    assert body and all(prefix + binding.key_of[name] == name for name in body)
    assert binding.unused == []


def test_bare_model_out_of_a_headed_checkpoint(tmp_path: Path) -> None:
    set_config(tiny("bert-classifier", tmp_path), architectures=["BertModel"])
    binding = assert_same_outputs(tmp_path)
    assert binding.key_of["encoder.layer.0.output.dense.weight"] == "bert.encoder.layer.0.output.dense.weight"
    assert binding.unused == ["classifier.bias", "classifier.weight"]


# --- ties ---



def test_tie_supplied_by_the_other_end(tmp_path: Path) -> None:
    rewrite(tiny("llama", tmp_path), lambda s: {HEAD if k == EMBEDDING else k: v for k, v in s.items()})
    binding = assert_same_outputs(tmp_path)
    assert binding.key_of[EMBEDDING] == binding.key_of[HEAD] == HEAD
    assert binding.missing == [EMBEDDING] and binding.ties == {HEAD: EMBEDDING}


def test_tie_stored_twice(tmp_path: Path) -> None:
    rewrite(tiny("llama", tmp_path), lambda s: s | {HEAD: s[EMBEDDING].clone()})
    binding = assert_same_outputs(tmp_path)
    assert binding.missing == [] and binding.ties == {HEAD: EMBEDDING}


def test_tie_that_the_weights_contradict(tmp_path: Path) -> None:
    rewrite(tiny("llama", tmp_path), lambda s: s | {HEAD: s[EMBEDDING].flip(0)})
    assert assert_same_outputs(tmp_path).ties == {}
    model = skeleton(tmp_path)
    bind(Checkpoint.open(tmp_path), model)
    assert discover(model).ties == {}


# --- reading, memory, identity ---


def mapped(file: Path) -> bool:
    return str(file) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see mapped files")
def test_tensors_are_mapped_and_released(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(saved(tmp_path))
    file = (tmp_path / "model" / "model.safetensors").resolve()
    assert not mapped(file)
    value = checkpoint.tensor(EMBEDDING)
    assert mapped(file)
    assert value.data_ptr() == checkpoint.tensor(EMBEDDING).data_ptr()
    checkpoint.release()
    assert mapped(file) and torch.isfinite(value).all()  # the tensor still holds its pages
    del value
    assert not mapped(file)
    assert checkpoint.tensor(EMBEDDING).shape == (VOCABULARY, 128)


def test_no_such_tensor(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="holds no tensor called nothing"):
        Checkpoint.open(saved(tmp_path)).tensor("nothing")


def test_hub_cache_links_its_files(tmp_path: Path) -> None:
    """snapshots/<commit>/model.safetensors → ../../blobs/<hash>: such links out of the folder are fine."""
    path = tiny("llama", tmp_path / "snapshots" / "abc", shard="500KB")
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(path.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    assert_same_outputs(path)


def test_fingerprint_tells_changes(tmp_path: Path) -> None:
    path = saved(tmp_path)
    first = Checkpoint.open(path).fingerprint()
    assert Checkpoint.open(path).fingerprint() == first
    moved = Path(shutil.copytree(path, tmp_path / "elsewhere", copy_function=shutil.copy2))
    assert Checkpoint.open(moved).fingerprint() == first
    stat = (path / "model.safetensors").stat()
    os.utime(path / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    later = Checkpoint.open(path).fingerprint()
    os.utime(path / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Checkpoint.open(path).fingerprint() == first
    rewrite(path, lambda s: dict(reversed(s.items())))
    set_config(moved, rms_norm_eps=1e-3)
    assert len({first, later, Checkpoint.open(path).fingerprint(), Checkpoint.open(moved).fingerprint()}) == 4


def test_files_that_travel(tmp_path: Path) -> None:
    path = tiny("bert", tmp_path / "model", tokenizer=True)
    travel = {
        "vocab.txt", "LICENSE", "sentence_bert_config.json", "modules.json", "1_Pooling/config.json",
        "2_Dense/config.json", "2_Dense/model.safetensors", "additional_chat_templates/tool.jinja",
    }  # fmt: skip
    stay = {
        "README.md", ".gitattributes", "pytorch_model.bin", "model.onnx", "tf_model.h5", "modeling_own.py",
        "model.safetensors.index.json", "2_Dense/pytorch_model.bin", "onnx/config.json", "training_args.bin",
    }  # fmt: skip
    for name in travel | stay:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    paths = ("", "1_Pooling", "2_Dense", "3_Normalize", "4_LayerNorm", "../outside")
    modules = [{"path": name} for name in paths]  # the Hub has no empty folders, so 4_LayerNorm may be absent
    (path / "3_Normalize").mkdir()
    (path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_text("{}")
    for name in ("huge.json", "2_Dense/large.safetensors"):
        with (path / name).open("wb") as stream:
            stream.truncate(65 * 2**20)
    found = Checkpoint.open(path).copied_files()
    expected = travel | {"tokenizer.json", "tokenizer_config.json", "2_Dense/large.safetensors", "3_Normalize"}
    assert [file.relative_to(path).as_posix() for file in found] == sorted(expected)


def test_modules_that_are_no_list(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "modules.json").write_text('{"a": 1}')
    with pytest.raises(BadCheckpoint, match=r"modules.json is not a list of modules with paths"):
        Checkpoint.open(path).copied_files()


def test_a_pickled_module_would_be_lost(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    (path / "2_Dense").mkdir()
    (path / "2_Dense/pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BadCheckpoint, match=r"2_Dense/pytorch_model.bin is a pickled module"):
        Checkpoint.open(path)
