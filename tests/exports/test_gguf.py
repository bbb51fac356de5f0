"""The file as gguf's reader sees it: every tensor against float64, the metadata, what is refused and what is told."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from packed import mixed, packed
from reference.gguf_float64 import decode_row, neighbours
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, tiny
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmcomp.errors import BadCheckpoint, UnknownArchitecture, UserError, VerificationFailed
from llmcomp.exports import EXPORTS, gguf_blocks
from llmcomp.exports.gguf_models import FAMILIES
from llmcomp.formats.opening import Opened, open_checkpoint
from llmcomp.schemes import Scheme

BF16 = torch.bfloat16
KINDS = {
    "attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q4_0", "attn_output": "Q4_1", "ffn_gate": "Q4_0",
    "ffn_up": "16", "ffn_down": "Q8_0", "token_embd": "Q8_0", "output": "Q8_0", "attn_qkv": "Q4_0",
}  # fmt: skip


class Exported:
    """A checkpoint, its file, and what was said."""

    def __init__(self, checkpoint: Path, directory: Path) -> None:
        directory.mkdir()
        self.opened = open_checkpoint(checkpoint)
        self.notes = EXPORTS["gguf"](self.opened, directory)
        self.files = [path.name for path in directory.iterdir()]
        reader = gguf.GGUFReader(directory / "model.gguf")
        self.fields = {key: field.contents() for key, field in reader.fields.items()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-untied", {"attention_bias": True}),
    "llama bf16": ("llama-untied", {"dtype": BF16}),
    "mistral compressed-tensors": ("mistral", {"dtype": BF16, "form": "compressed-tensors"}),
    "qwen3 tied": ("qwen3", {"dtype": BF16}),
    "gemma3": ("gemma3", {}),
    "phi3": ("phi3", {"dtype": BF16}),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    made = {}
    for case, (name, more) in CASES.items():
        directory = tmp_path_factory.mktemp("gguf")
        made[case] = Exported(packed(name, directory / "checkpoint", mixed, **more), directory / "out")
    return made


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_the_checkpoints(exported: dict[str, Exported], case: str) -> None:
    one = exported[case]
    opened, config = one.opened, one.opened.skeleton.config
    arch = one.fields["general.architecture"]
    table = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), 2)
    expected = set()
    for full, parameter in opened.skeleton.named_parameters():
        module, _, leaf = full.rpartition(".")
        name = table.get_name(full, try_suffixes=(".weight", ".bias"))
        assert name is not None
        expected.add(name)
        found = decoded(one.tensors[name])
        if leaf == "weight" and module in opened.schemes:
            wanted, tolerance = exact(opened, module)
        else:
            assert parameter.dim() == 1
            shift = float(arch == "gemma3" and full.endswith("norm.weight"))
            wanted, tolerance = opened.tensor(full).double().numpy() + shift, shift * 2.0**-23
        if arch == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            wanted = np.array(neighbours(wanted.tolist(), heads))
            tolerance = tolerance if np.isscalar(tolerance) else np.array(neighbours(tolerance.tolist(), heads))
        assert found.shape == tuple(parameter.shape) == wanted.shape
        assert (np.abs(found - wanted) <= tolerance).all(), full
    assert set(one.tensors) == expected
    assert one.files == ["model.gguf"]


def decoded(tensor: Any) -> np.ndarray:
    """A tensor of the file in float64, its blocks by hand."""
    kind, shape = tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape))
    if kind in gguf_blocks.BLOCK_BYTES:
        rows = tensor.data.reshape(shape[0], -1)
        return np.array([decode_row(kind, row.tobytes()) for row in rows])
    if kind == "BF16":
        bits = tensor.data.view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64).reshape(shape)
    assert kind in ("F16", "F32")
    return tensor.data.astype(np.float64).reshape(shape)


def exact(opened: Opened, module: str) -> tuple[np.ndarray, np.ndarray]:
    """A packed weight in float64, and by how much each of its weights may differ in the file.

    float16 rounds a scale by 2^-11 of its value, an offset of at most 15 steps, too; bfloat16 scales fit.
    """
    weight = opened.weight(module)
    dense = replace(weight, scale=weight.scale.double()).dense()
    kind = gguf_blocks.kind_of(weight.scheme, weight.shape[1])
    if kind is None:  # dense, as the checkpoint's own readers decode it, rounded once more to float16
        rounding = 2.0**-8 if weight.scale.dtype == BF16 else 2.0**-11
        return dense.numpy(), (rounding * dense.abs()).numpy()
    step = weight.scale.double().repeat_interleave(weight.shape[1] // weight.scale.shape[1], dim=1)
    offset = 15 * 2.0**-11 * step if kind == "Q4_1" else torch.zeros_like(step)
    scaled = torch.zeros_like(step) if weight.scale.dtype == BF16 else 16 * 2.0**-11 * step
    if kind == "Q8_0":
        scaled = scaled * 8
    return dense.numpy(), (offset + scaled).numpy()


@pytest.mark.parametrize("case", CASES)
def test_every_matrix_is_of_its_kind(exported: dict[str, Exported], case: str) -> None:
    one = exported[case]
    for name, tensor in one.tensors.items():
        role, kind = name.split(".")[-2], tensor.tensor_type.name
        if len(tensor.shape) == 1:
            assert kind == "F32"
        elif KINDS[role] == "16" and one.fields["general.architecture"] != "phi3":
            assert kind == ("BF16" if "bf16" in case or case in ("qwen3 tied", "mistral compressed-tensors") else "F16")
        else:
            assert kind == (KINDS[role] if KINDS[role] != "16" else "Q4_0")
    assert ("output.weight" in one.tensors) == (not one.opened.skeleton.config.tie_word_embeddings)


@pytest.mark.parametrize("case", CASES)
def test_the_metadata_is_the_configs(exported: dict[str, Exported], case: str) -> None:
    one = exported[case]
    fields, config = one.fields, one.opened.skeleton.config
    arch = fields["general.architecture"]
    assert arch == case.split()[0].replace("mistral", "llama")
    wanted = {
        "block_count": 2, "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32,
        "vocab_size": VOCABULARY,
    }  # fmt: skip
    assert {key: fields[f"{arch}.{key}"] for key in wanted} == wanted
    assert fields[f"{arch}.attention.layer_norm_rms_epsilon"] == np.float32(config.rms_norm_eps)
    rope = config.rope_parameters
    theta = rope.get("full_attention", rope)["rope_theta"]
    assert fields[f"{arch}.rope.freq_base"] == np.float32(theta)
    assert fields["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    blocks = {"llama": "Q4_0", "phi3": "Q4_0"}.get(arch)
    assert blocks is None or fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{blocks}"]
    assert len(fields["tokenizer.ggml.tokens"]) == VOCABULARY
    if arch == "gemma3":
        assert fields["gemma3.attention.sliding_window"] == 8
        assert fields["gemma3.attention.sliding_window_pattern"] == [True, False]
        assert fields["gemma3.rope.freq_base_swa"] == 10_000


def test_what_is_told(exported: dict[str, Exported]) -> None:
    float32, bf16, mistral = (exported[case].notes for case in list(CASES)[:3])
    text = "\n".join(float32)
    assert "Matrices in model.gguf: 6 Q4_0, 4 Q8_0, 4 Q4_1, 2 F16." in text
    assert "exactly: they change by at most 0.00049 of their value." in text or "0.00048 of their value." in text
    assert "Weights of 2 and 3 bits (4 matrices) take 4.5 bits each" in text
    assert "No kind of GGUF holds int8 g32 asym weights in rows of 128: 2 matrices, such as model.layers.0.mlp" in text
    assert not any("exactly" in note for note in bf16) and any("Offsets" in note for note in bf16)
    assert any("this model 8 tokens: beyond that its outputs differ" in note for note in mistral)
    assert not any("looks back" in note for note in [*bf16, *exported["gemma3"].notes])


def test_inputs_that_the_checkpoint_rounds_are_told(tmp_path: Path) -> None:
    rounding = Scheme(8, None, True, "int8-dynamic")
    checkpoint = packed("llama", tmp_path / "m", lambda name: rounding if "proj" in name else None)
    one = Exported(checkpoint, tmp_path / "out")
    assert any("Inputs of linears are rounded as llama.cpp does it" in note for note in one.notes)
    assert any("float32 in the checkpoint and not quantized are rounded to F16" in note for note in one.notes)
    assert one.fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_a_dense_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    one = Exported(tiny("qwen2", tmp_path / "m", tokenizer=True, dtype=dtype), tmp_path / "out")
    kind = "BF16" if dtype == BF16 else "F16"
    rounded = ["Matrices that are float32 in the checkpoint and not quantized are rounded to F16."]
    assert one.notes == [f"Matrices in model.gguf: 15 {kind}.", *(rounded if dtype == torch.float32 else [])]
    assert one.fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    source = load_file(tmp_path / "m" / "model.safetensors")
    for name, ours in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj")):
        wanted = source[f"model.layers.1.{ours}.weight"].double().numpy()
        wanted = wanted if dtype == BF16 else wanted.astype(np.float16)
        assert (decoded(one.tensors[f"blk.1.{name}.weight"]) == wanted).all()


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    pack = gguf_blocks.pack

    def watched(weight: Any) -> Any:
        assert not any(one() is not None for one in alive)
        made = pack(weight)
        alive[:] = [weakref.ref(made[0]), weakref.ref(weight)]
        return made

    monkeypatch.setattr(gguf_blocks, "pack", watched)
    checkpoint = packed("llama", tmp_path / "m", lambda name: Scheme(4, 32) if "proj" in name else None)
    Exported(checkpoint, tmp_path / "out")
    assert len(alive) == 2


@pytest.mark.parametrize(("kind", "byte"), [(Scheme(4, 32), 5), (Scheme(8), 7), (Scheme(4, 32, False), 0)], ids=str)
def test_a_byte_that_is_not_what_was_meant_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Scheme, byte: int
) -> None:
    """Whatever wrote it: here, the last block of a matrix."""
    pack = gguf_blocks.pack

    def wrong(weight: Any) -> Any:
        blocks, rounding = pack(weight)
        blocks[-1, byte - gguf_blocks.BLOCK_BYTES[gguf_blocks.kind_of(kind, 128) or ""]] ^= 16
        return blocks, rounding

    monkeypatch.setattr(gguf_blocks, "pack", wrong)
    checkpoint = packed("llama", tmp_path / "m", lambda name: kind if name.endswith("1.self_attn.k_proj") else None)
    with pytest.raises(VerificationFailed, match=r"blk.1.attn_k.weight, which is not model.layers.1.self_attn.k_proj"):
        Exported(checkpoint, tmp_path / "out")


# --- rotary positions ---

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


def test_frequencies_of_llama_3(tmp_path: Path) -> None:
    one = Exported(tiny("llama", tmp_path / "m", tokenizer=True, rope_parameters=LLAMA3), tmp_path / "out")
    config = one.opened.skeleton.config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500.0 ** -(torch.arange(0, 32, 2).double() / 32)
    found = one.tensors["rope_freqs.weight"]
    assert found.tensor_type.name == "F32" and found.data.shape == (16,)
    assert np.allclose(found.data, plain.numpy() / scaled.double().numpy(), rtol=1e-5)
    assert found.data.min() == 1 and found.data.max() == 8 and len(set(found.data.tolist())) > 3


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (YARN, {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 32.0}),
    ],
    ids=["linear", "yarn"],
)
def test_scaled_positions(tmp_path: Path, rope: dict[str, Any], wanted: dict[str, Any]) -> None:
    one = Exported(tiny("qwen3", tmp_path / "m", tokenizer=True, rope_parameters=rope), tmp_path / "out")
    assert {key: one.fields[f"qwen3.rope.scaling.{key}"] for key in wanted} == wanted


# --- what is refused ---

_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("gpt2", {}, "GPT2LMHeadModel cannot be exported as GGUF; these can: Gemma2ForCausalLM, Gemma3"),
        ("bert", {}, "BertForMaskedLM cannot be exported as GGUF"),
        ("mixtral", {}, "MixtralForCausalLM cannot"),
        ("llama", {"hidden_act": "gelu"}, "This LlamaForCausalLM .*: its MLP computes gelu, not silu."),
        ("gemma2", {"query_pre_attn_scalar": 144}, "the root of 144, llama.cpp by that of 32"),
        ("gemma2", {"attn_logit_softcapping": None}, "does not cap logits"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "in each fourth block"),
        ("granite", {"head_dim": 64}, "its 4 heads of 64 are not 128 together"),
        ("phi3", {"rope_parameters": {**_LONG, "original_max_position_embeddings": 64}}, "positions: longrope"),
        ("qwen3", {"rope_parameters": LLAMA3}, "positions: llama3"),
        ("qwen3", {"rope_parameters": {**YARN, "attention_factor": 2.0}}, "positions: yarn with attention_factor"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "on 16 of 32 features"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    tmp_path: Path, name: str, overrides: dict[str, Any], words: str
) -> None:
    checkpoint = tiny(name, tmp_path / "m", tokenizer=True, **overrides)
    with pytest.raises(UnknownArchitecture, match=words):
        Exported(checkpoint, tmp_path / "out")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny("llama", tmp_path / "m")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'llmcomp\[gguf\]'"):
        Exported(checkpoint, tmp_path / "out")


def test_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="no tokenizer"):
        Exported(tiny("llama", tmp_path / "m"), tmp_path / "out")


@pytest.mark.parametrize("damage", ["missing", "shape", "dtype", "number", "scale"])
def test_broken_tensors(tmp_path: Path, damage: str) -> None:
    key = "model.layers.1.self_attn.o_proj"
    scheme = Scheme(4, 32) if damage == "scale" else None
    checkpoint = packed("llama", tmp_path / "m", lambda name: scheme if name == key else None)
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    if damage == "missing":
        del tensors[f"{key}.weight"]
    elif damage == "scale":
        tensors[f"{key}.weight_scale"] *= 1e9
    else:
        broken = {"shape": lambda w: w[:-1], "dtype": lambda w: w.to(torch.int8), "number": lambda w: w * 1e9}[damage]
        tensors[f"{key}.weight"] = broken(tensors[f"{key}.weight"])
    save_file(tensors, file)
    words = {
        "missing": "lacks the tensor", "shape": r"o_proj.weight as \[127, 128\], config.json says", "dtype": "as I8",
        "number": "cannot be written as GGUF: it holds numbers that float16 does not",
        "scale": "cannot be written as GGUF: it has a scale that float16 does not hold",
    }  # fmt: skip
    with pytest.raises(UserError, match=words[damage]):
        Exported(checkpoint, tmp_path / "out")


def test_families_are_documented() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    assert [name for name in FAMILIES if name.removesuffix("ForCausalLM") not in text] == []
