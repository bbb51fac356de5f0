"""Checkpoints that are refused, each in one sentence; code and pickles only where they are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from spoiled import EMBEDDING, HEAD, assert_same_outputs, rewrite, saved, set_config
from tiny import tiny

from llmcomp.adapters.discover import skeleton
from llmcomp.checkpoint import Checkpoint, bind
from llmcomp.errors import BadCheckpoint, UnknownArchitecture

AGAIN = "copy or download it again"


# --- what does not belong together ---


def refuse(directory: Path, kind: type[Exception] = BadCheckpoint) -> str:
    with pytest.raises(kind) as caught:
        bind(Checkpoint.open(directory), skeleton(directory))
    return str(caught.value)


def test_no_trained_head(tmp_path: Path) -> None:
    drop = ("classifier.weight", "classifier.bias")
    rewrite(tiny("bert-classifier", tmp_path), lambda s: {k: v for k, v in s.items() if k not in drop})
    assert refuse(tmp_path) == (
        f"{tmp_path} has no trained head: BertForSequenceClassification needs classifier.weight, "
        "classifier.bias; fine-tune it first, or correct 'architectures' in config.json to the class that "
        "these weights are of."
    )


def test_masked_lm_given_as_classifier(tmp_path: Path) -> None:
    """Pooler and classifier are missing: both are the head's."""
    set_config(tiny("bert", tmp_path), architectures=["BertForSequenceClassification"])
    expected = "has no trained head: BertForSequenceClassification needs bert.pooler.dense.weight"
    assert expected in refuse(tmp_path)


def test_untied_head_missing(tmp_path: Path) -> None:
    rewrite(tiny("llama-untied", tmp_path), lambda s: {k: v for k, v in s.items() if k != HEAD})
    assert "has no trained head: LlamaForCausalLM needs lm_head.weight;" in refuse(tmp_path)


def test_tie_with_neither_end(tmp_path: Path) -> None:
    rewrite(tiny("llama", tmp_path), lambda s: {k: v for k, v in s.items() if k != EMBEDDING})
    expected = f"{tmp_path} lacks {EMBEDDING}, {HEAD}, which LlamaForCausalLM needs; {AGAIN}."
    assert refuse(tmp_path) == expected


def test_block_missing(tmp_path: Path) -> None:
    rewrite(tiny("gpt2", tmp_path), lambda s: {k: v for k, v in s.items() if ".h.1." not in k})
    assert refuse(tmp_path) == (
        f"{tmp_path} lacks transformer.h.1.ln_1.weight, transformer.h.1.ln_1.bias, "
        f"transformer.h.1.attn.c_attn.weight and 9 more, which GPT2LMHeadModel needs; {AGAIN}."
    )


def test_wrong_shape(tmp_path: Path) -> None:
    set_config(tiny("llama", tmp_path), intermediate_size=320)
    assert refuse(tmp_path) == (
        f"{tmp_path}: model.layers.0.mlp.down_proj.weight has the shape [128, 256], but LlamaForCausalLM has "
        "[128, 320] for model.layers.0.mlp.down_proj.weight; config.json and weights do not belong together."
    )


def test_integers_where_weights_should_be(tmp_path: Path) -> None:
    key = "model.layers.0.mlp.down_proj.weight"
    rewrite(tiny("llama", tmp_path), lambda s: s | {key: s[key].to(torch.int8)})
    assert refuse(tmp_path) == (
        f"{tmp_path}: {key} holds torch.int8, not floating-point weights; give the full-precision checkpoint "
        "instead."
    )


def test_weights_that_need_merging(tmp_path: Path) -> None:
    config = transformers.HrmTextConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, head_dim=16,
        num_key_value_heads=2,
    )  # fmt: skip
    transformers.HrmTextForCausalLM(config).save_pretrained(tmp_path)
    message = refuse(tmp_path, UnknownArchitecture)
    assert message.startswith("HrmTextForCausalLM needs the tensor conversion Chunk that makes ")
    assert message.endswith(", which llmcomp cannot do yet.")


# --- bad directories, each with its sentence ---


def make_empty(directory: Path) -> Path:
    (directory / "model").mkdir()
    return directory / "model"


def make_file(directory: Path) -> Path:
    (directory / "model").write_text("x")
    return directory / "model"


def make_without(name: str) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        (saved(directory) / name).unlink()
        return directory / "model"

    return make


def make_with(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        data = content.encode() if isinstance(content, str) else content
        (saved(directory) / name).write_bytes(data)
        return directory / "model"

    return make


def make_pickled(directory: Path) -> Path:
    make_without("model.safetensors")(directory)
    torch.save({}, directory / "model" / "pytorch_model.bin")
    return directory / "model"


def make_adapter(directory: Path) -> Path:
    path = saved(directory)
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    return path


def make_indexed(weight_map: Any) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        path = saved(directory)
        (path / "model.safetensors").rename(path / "one.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return path

    return make


INDEX = "{path}/model.safetensors.index.json"
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absent": (
        lambda directory: directory / "model",
        "{path} is not a directory; expected a folder with config.json and safetensors.",
    ),
    "a file": (make_file, "{path} is not a directory; expected a folder with config.json and safetensors."),
    "empty": (make_empty, "{path} is an empty directory; expected config.json and safetensors in it."),
    "no config": (
        make_without("config.json"),
        "{path} has no config.json; give the folder that save_pretrained wrote.",
    ),
    "config not JSON": (
        make_with("config.json", "{"),
        "{path}/config.json is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1)); copy or download it again.",
    ),
    "config not text": (
        make_with("config.json", b"\xff\xfe{"),
        "{path}/config.json is not JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start "
        "byte); copy or download it again.",
    ),
    "config a list": (
        make_with("config.json", "[]"),
        "{path}/config.json must hold a JSON object, not a list; copy or download it again.",
    ),
    "no weights": (
        make_without("model.safetensors"),
        "{path} has config.json but no weights; expected model.safetensors or model.safetensors.index.json.",
    ),
    "only an adapter": (
        make_adapter,
        "{path} has config.json but no weights; expected model.safetensors or model.safetensors.index.json "
        "(found only adapter_model.safetensors).",
    ),
    "pickled": (
        make_pickled,
        "{path} holds only pickled weights (pytorch_model.bin), which can run code when opened and are never "
        "loaded; where you trust them, convert: AutoModel.from_pretrained(...).save_pretrained(...).",
    ),
    "no header": (
        make_with("model.safetensors", b"abc"),
        "{path}/model.safetensors is truncated or corrupt (its header should take 6513249 bytes, the file "
        "has 3); copy or download it again.",
    ),
    **{
        f"index leads to {target}": (
            make_indexed({"a": target}),
            INDEX + f" points at '{target}'; expected the name of a .safetensors file in the directory.",
        )
        for target in ("../one.safetensors", "/one.safetensors", "pytorch_model.bin")
    },
    "shard missing": (
        make_indexed({"a": "two.safetensors"}),
        INDEX + " names two.safetensors, which is not there; copy or download it again.",
    ),
    "key not in its shard": (
        make_indexed({"a": "one.safetensors"}),
        "{path}: the index places a in one.safetensors, which lacks it; copy or download it again.",
    ),
    **{
        f"index whose map is {listed}": (
            make_indexed(listed), INDEX + " has no weight_map from tensor names to files; copy or download it again."
        )
        for listed in (None, {"a": 3})
    },
}


@pytest.mark.parametrize("case", BAD)
def test_bad_directories(case: str, tmp_path: Path) -> None:
    make, sentence = BAD[case]
    path = make(tmp_path)
    with pytest.raises(BadCheckpoint) as caught:
        Checkpoint.open(path)
    assert str(caught.value) == sentence.replace("{path}", str(path))


@pytest.mark.parametrize("kept", [0.999, 0.5])
def test_truncated_shard(kept: float, tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    size = file.stat().st_size
    left = int(size * kept)
    os.truncate(file, left)
    with pytest.raises(BadCheckpoint) as caught:
        Checkpoint.open(file.parent)
    assert str(caught.value) == (
        f"{file} is truncated or corrupt (its header promises {size} bytes, the file has {left}); {AGAIN}."
    )


# --- code, quantization, pickles ---


def test_remote_code_is_wanted(tmp_path: Path) -> None:
    path = saved(tmp_path)
    auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    set_config(path, auto_map=auto_map, architectures=["OwnForCausalLM"])
    with pytest.raises(BadCheckpoint) as caught:
        Checkpoint.open(path)
    assert str(caught.value) == (
        f"{path} needs Python code that it brings along for OwnForCausalLM, which could do anything here; "
        "read that code, then pass --trust-remote-code."
    )
    assert Checkpoint.open(path, trust_remote_code=True).keys


def test_remote_code_that_is_not_needed(tmp_path: Path) -> None:
    path = set_config(saved(tmp_path), auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    (path / "modeling_llama.py").write_text("raise SystemExit('executed')")
    assert_same_outputs(path)


def test_remote_code_runs_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = set_config(
        saved(tmp_path),
        architectures=["OwnForCausalLM"], auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    )  # fmt: skip
    code = "from transformers import LlamaForCausalLM\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    (path / "modeling_own.py").write_text(code)
    model = skeleton(path, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    checkpoint = Checkpoint.open(path, trust_remote_code=True)
    assert set(bind(checkpoint, model).key_of) == set(model.state_dict())
    assert path / "modeling_own.py" in checkpoint.copied_files()


def test_already_quantized(tmp_path: Path) -> None:
    path = saved(tmp_path)
    Checkpoint.open(path).require_dense()
    assert Checkpoint.open(path).quantization is None
    set_config(path, quantization_config={"quant_method": "gptq", "bits": 4})
    checkpoint = Checkpoint.open(path)
    assert checkpoint.quantization == {"quant_method": "gptq", "bits": 4}
    with pytest.raises(BadCheckpoint) as caught:
        checkpoint.require_dense()
    expected = f"{path} is already quantized (gptq); give the full-precision checkpoint instead."
    assert str(caught.value) == expected


def pickled(directory: Path, state: object, **options: Any) -> Path:
    (directory / "model.safetensors").unlink(missing_ok=True)
    torch.save(state, directory / "pytorch_model.bin", **options)
    return directory


def test_pickles_on_request(tmp_path: Path) -> None:
    path = saved(tmp_path)
    state = load_file(path / "model.safetensors")
    first = Checkpoint.open(path)
    checkpoint = Checkpoint.open(pickled(path, state), allow_pickle=True)
    assert {k: (i.dtype, i.shape, i.nbytes) for k, i in checkpoint.keys.items()} == {
        k: (i.dtype, i.shape, i.nbytes) for k, i in first.keys.items()
    }
    assert all(torch.equal(checkpoint.tensor(key), value) for key, value in state.items())


class Bomb:
    """A pickle that would make a directory when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_pickled_code_never_runs(tmp_path: Path) -> None:
    path = pickled(saved(tmp_path), {"w": Bomb(tmp_path / "boom")})
    for allow in (False, True):
        with pytest.raises(BadCheckpoint):
            Checkpoint.open(path, allow_pickle=allow)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x02]."])
def test_broken_pickles(content: bytes, tmp_path: Path) -> None:
    path = pickled(saved(tmp_path), {})
    (path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=r"pytorch_model.bin is truncated or corrupt"):
        Checkpoint.open(path, allow_pickle=True)
