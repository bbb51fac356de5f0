"""Checkpoints: bound as from_pretrained would load them, bit for bit, or refused in one sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import MASK, PAD, TINY, VOCABULARY, tiny
from torch import Tensor, nn

from llmcomp.adapters.discover import discover, skeleton
from llmcomp.checkpoint import Binding, Checkpoint, bind
from llmcomp.errors import BadCheckpoint, UnknownArchitecture

AGAIN = "copy or download it again"


def plain(directory: Path) -> Any:
    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(directory)


def fill(model: nn.Module, binding: Binding) -> Any:
    """Every bound tensor put in the skeleton's place; both ends of a tie get one object."""
    for name in binding.key_of:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = binding.tensor(name)
        else:
            module.register_parameter(leaf, nn.Parameter(binding.tensor(name), requires_grad=False))
    for target, source in binding.ties.items():
        owner, _, leaf = target.rpartition(".")
        model.get_submodule(owner).register_parameter(leaf, model.get_parameter(source))
    return model


def batch() -> dict[str, Tensor]:
    """Two rows of 24 ids, longer than the tiny models' windows; the second has eight of padding."""
    ids = torch.randint(MASK + 1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 16:], mask[1, 16:] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def same_outputs(directory: Path) -> Binding:
    """Assert that skeleton + bind is from_pretrained to the bit; return the binding."""
    checkpoint = Checkpoint.open(directory)
    model = skeleton(directory)
    binding = bind(checkpoint, model)
    with torch.no_grad():
        mine = fill(model, binding)(**batch())[0]
        theirs = plain(directory)(**batch())[0]
    assert torch.equal(mine, theirs)
    assert mine.float().std() > 0.01
    return binding


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    state = {key: value.clone() for key, value in load_file(directory / "model.safetensors").items()}
    save_file(change(state), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def set_config(directory: Path, **values: Any) -> Path:
    config = json.loads((directory / "config.json").read_text()) | values
    (directory / "config.json").write_text(json.dumps(config))
    return directory


# --- what is read is what transformers reads ---


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_from_pretrained(name: str, tmp_path: Path) -> None:
    binding = same_outputs(tiny(name, tmp_path))
    assert binding.unused == []
    assert set(binding.missing) == set(binding.ties)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "modernbert"])
def test_bfloat16_logits_too(name: str, tmp_path: Path) -> None:
    same_outputs(tiny(name, tmp_path, dtype=torch.bfloat16))


def test_stored_in_another_dtype_than_the_config_says(tmp_path: Path) -> None:
    """from_pretrained casts to the config's dtype; so does a binding."""
    binding = same_outputs(set_config(tiny("llama", tmp_path), dtype="bfloat16"))
    assert set(binding.dtypes.values()) == {torch.bfloat16}


def test_shards_and_index(tmp_path: Path) -> None:
    binding = same_outputs(tiny("qwen3", tmp_path, shard="500KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert binding.checkpoint.nbytes == sum(t.nbytes for t in plain(tmp_path).parameters())


@pytest.mark.parametrize("folder", ["lm", "minilm-sst2"])
def test_trained_models(folder: str, assets: Path) -> None:
    assert same_outputs(assets / "models" / folder).unused == []


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

    binding = same_outputs(rewrite(tiny("bert", tmp_path), old))
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
    binding = same_outputs(tmp_path)
    body = [name for name in binding.key_of if name.startswith(prefix)]
    assert body and all(prefix + binding.key_of[name] == name for name in body)
    assert binding.unused == []


def test_bare_model_out_of_a_headed_checkpoint(tmp_path: Path) -> None:
    set_config(tiny("bert-classifier", tmp_path), architectures=["BertModel"])
    binding = same_outputs(tmp_path)
    assert binding.key_of["encoder.layer.0.output.dense.weight"] == "bert.encoder.layer.0.output.dense.weight"
    assert binding.unused == ["classifier.bias", "classifier.weight"]


# --- ties ---

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_tie_supplied_by_the_other_end(tmp_path: Path) -> None:
    rewrite(tiny("llama", tmp_path), lambda s: {HEAD if k == EMBEDDING else k: v for k, v in s.items()})
    binding = same_outputs(tmp_path)
    assert binding.key_of[EMBEDDING] == binding.key_of[HEAD] == HEAD
    assert binding.missing == [EMBEDDING] and binding.ties == {HEAD: EMBEDDING}


def test_tie_stored_twice(tmp_path: Path) -> None:
    rewrite(tiny("llama", tmp_path), lambda s: s | {HEAD: s[EMBEDDING].clone()})
    binding = same_outputs(tmp_path)
    assert binding.missing == [] and binding.ties == {HEAD: EMBEDDING}


def test_tie_that_the_weights_contradict(tmp_path: Path) -> None:
    rewrite(tiny("llama", tmp_path), lambda s: s | {HEAD: s[EMBEDDING].flip(0)})
    assert same_outputs(tmp_path).ties == {}
    model = skeleton(tmp_path)
    bind(Checkpoint.open(tmp_path), model)
    assert discover(model).ties == {}


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
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32, num_local_experts=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    message = refuse(tmp_path, UnknownArchitecture)
    assert message.startswith("MixtralForCausalLM needs the tensor conversion MergeModulelist")
    assert message.endswith(", which llmcomp cannot do yet.")


# --- bad directories, each with its sentence ---


def saved(directory: Path) -> Path:
    return tiny("llama", directory / "model")


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
    "index leaves upwards": (
        make_indexed({"a": "../one.safetensors"}),
        INDEX + " points at '../one.safetensors'; expected the name of a .safetensors file in the directory.",
    ),
    "index leaves absolutely": (
        make_indexed({"a": "/one.safetensors"}),
        INDEX + " points at '/one.safetensors'; expected the name of a .safetensors file in the directory.",
    ),
    "index names a pickle": (
        make_indexed({"a": "pytorch_model.bin"}),
        INDEX + " points at 'pytorch_model.bin'; expected the name of a .safetensors file in the directory.",
    ),
    "shard missing": (
        make_indexed({"a": "two.safetensors"}),
        INDEX + " names two.safetensors, which is not there; copy or download it again.",
    ),
    "key not in its shard": (
        make_indexed({"a": "one.safetensors"}),
        "{path}: the index places a in one.safetensors, which lacks it; copy or download it again.",
    ),
    "index without map": (
        make_indexed(None),
        INDEX + " has no weight_map from tensor names to files; copy or download it again.",
    ),
    "index of numbers": (
        make_indexed({"a": 3}),
        INDEX + " has no weight_map from tensor names to files; copy or download it again.",
    ),
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
    same_outputs(path)


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
    same_outputs(path)


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
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../outside"}]
    (path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_text("{}")
    with (path / "huge.json").open("wb") as stream:
        stream.truncate(65 * 2**20)
    found = Checkpoint.open(path).copied_files()
    expected = travel | {"tokenizer.json", "tokenizer_config.json"}
    assert [file.relative_to(path).as_posix() for file in found] == sorted(expected)


def test_modules_that_are_no_list(tmp_path: Path) -> None:
    path = make_with("modules.json", '{"a": 1}')(tmp_path)
    with pytest.raises(BadCheckpoint, match=r"modules.json is not a list of modules with paths"):
        Checkpoint.open(path).copied_files()
