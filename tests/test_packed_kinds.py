"""Sparse and low-rank weights as modules: against float64, and inside models by every way of opening them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import packed, random_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import llmcomp
from llmcomp import native, native_kinds
from llmcomp.activations import quantized
from llmcomp.errors import BadCheckpoint, BadRecipe
from llmcomp.experts import split_experts
from llmcomp.exports import EXPORTS
from llmcomp.formats.opening import open_checkpoint
from llmcomp.formats.reading import auto_class
from llmcomp.kinds import Kind, LowRank, Sparse
from llmcomp.measure.cost import loaded_bytes, size_of, sparsity_of, weights_of
from llmcomp.packed import Packed
from llmcomp.packed_kinds import PackedLowRank, PackedSparse, PackedSparseIntegers
from llmcomp.patterns import Pattern
from llmcomp.schemes import Scheme
from llmcomp.weights import SparseWeight

TWO_FOUR = Pattern(2, 4)
KINDS = (PackedSparse, PackedSparseIntegers, PackedLowRank)


def module_of(kind: Kind, weight: Any, transposed: bool = False, bias: Tensor | None = None) -> Any:
    """A settled module as `llmcomp.hf` makes one."""
    rows, columns = weight.shape
    replaced: Any = Conv1D(rows, columns) if transposed else nn.Linear(columns, rows)
    replaced = replaced.to(weight.dense().dtype)
    replaced.bias = None if bias is None else nn.Parameter(bias)
    tensors = native_kinds.to_tensors(weight, kind)
    if isinstance(kind, Sparse):
        sparse = (PackedSparse if kind.values is None else PackedSparseIntegers)(replaced, kind, tensors)
        sparse.settle()
        return sparse
    assert isinstance(kind, LowRank)
    low = PackedLowRank(replaced, kind, tensors)
    for name, part in low.named_children():
        if isinstance(part, Packed):
            part.settle()
        else:
            part.weight = nn.Parameter(tensors[f"{name}.weight"])
    return low


MODULES: dict[str, tuple[Kind, int, int]] = {
    "2:4": (Sparse(TWO_FOUR), 48, 100),
    "2:4 of a row": (Sparse(TWO_FOUR), 1, 36),
    "3:5 int4": (Sparse(Pattern(3, 5), Scheme(4, 32, False)), 33, 160),
    "2:4 int8": (Sparse(TWO_FOUR, Scheme(8)), 7, 44),
    "2:4 w8a8": (Sparse(TWO_FOUR, Scheme(8, activations="int8-dynamic")), 16, 64),
    "2:4 w8a8 static": (Sparse(TWO_FOUR, Scheme(8, activations="int8-static")), 16, 64),
    "rank": (LowRank(5), 33, 21),
    "rank 1": (LowRank(1), 1, 3),
    "rank of int4": (LowRank(32, Scheme(4), Scheme(4, 32)), 65, 96),
    "rank on int4": (LowRank(3, Scheme(8), None, Scheme(4, 32)), 40, 64),
}
CASES = [(name, dtype) for name in MODULES for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_product_is_that_of_the_decoded_weight(name: str, dtype: torch.dtype, tokens: int) -> None:
    kind, rows, columns = MODULES[name]
    weight = random_of(kind, (rows, columns), dtype)
    bias = torch.linspace(-1, 1, rows).to(dtype)
    x = torch.randn(2, tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    scheme = kind.values if isinstance(kind, Sparse) else None
    read = x if scheme is None or scheme.activations is None else quantized(x, getattr(weight, "input_scale", None))
    expected = read.double() @ weight.dense().double().t()
    whole = not (kind.values if isinstance(kind, Sparse) else kind.left or kind.right or kind.base)  # type: ignore[union-attr]
    allowed = (1e-5 if dtype == torch.float32 else 1e-2) if whole else 2e-2
    for transposed, extra in ((False, None), (True, bias)):
        module = module_of(kind, weight, transposed, extra)
        found = module(x).detach()
        assert (found.dtype, found.shape) == (dtype, (2, tokens, rows))
        wanted = expected if extra is None else expected + extra.double()
        assert float((found.double() - wanted).norm() / wanted.norm()) < allowed
        dense = weight.dense().t() if transposed else weight.dense()
        assert torch.equal(module.dense(), dense)
        assert module.weight.shape == dense.shape
        assert torch.equal(module.weight * 1, dense)
        assert module(x[:, :0]).shape == (2, 0, rows)


def test_a_kind_that_cannot_decode_is_never_made() -> None:
    class Forgetful(Packed):
        def settle(self) -> None: ...

        @property
        def floating(self) -> Tensor:
            return self.get_buffer("scale")

    made: Any = Forgetful
    with pytest.raises(TypeError, match="decoded"):
        made(nn.Linear(4, 4), (), {})


@pytest.mark.parametrize("name", MODULES)
def test_states_gradients_and_casts(name: str) -> None:
    kind, rows, columns = MODULES[name]
    weight, other = (random_of(kind, (rows, columns), torch.float32, seed) for seed in (0, 7))
    module = module_of(kind, weight)
    tensors = native_kinds.to_tensors(weight, kind)
    state = module.state_dict()
    assert set(state) == set(tensors)
    assert all(torch.equal(state[part], one) for part, one in tensors.items())
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(2)).requires_grad_()
    out = module(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    wanted = weight.dense().sum(0).expand(3, -1)
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-4
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), out)
    changed = copy.deepcopy(module)
    changed.load_state_dict(native_kinds.to_tensors(other, kind))
    assert torch.equal(changed.dense(), other.dense())
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half.dense().dtype == torch.bfloat16
    assert float((half(x.bfloat16()).float() - out).norm().detach() / out.norm().detach()) < 3e-2


def test_two_thin_products_and_never_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of(LowRank(4), random_of(LowRank(4), (96, 80)))
    sizes = []
    linear = nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        sizes.append(weight.shape)
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    module(torch.ones(2, 80))
    assert sizes == [(4, 80), (96, 4)]
    assert sum(parameter.numel() for parameter in module.parameters()) == 4 * (96 + 80)


def test_integers_are_computed_with_by_their_kernels() -> None:
    """And take the memory of integers, with the places of those that the file has."""
    kind = Sparse(TWO_FOUR, Scheme(4, 128))
    module = module_of(kind, random_of(kind, (256, 512)))
    assert module.kernel == "int4"
    held = sum(one.nbytes for one in module.buffers())
    assert held < 256 * 512 * (0.5 + 0.125) + 256 * 4 * 12  # scales twice: as they are, and as the operator reads them


def test_semi_structured_tensors_take_the_place_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way through torch's kernels with dense tensors in their place; tests/test_gpu.py has the kernels."""
    monkeypatch.setattr("llmcomp.packed_kinds.semi_structured", lambda pattern, dense: True)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", torch.clone)
    kind = Sparse(TWO_FOUR)
    weight: Any = random_of(kind, (8, 32), torch.bfloat16)
    module, x = module_of(kind, weight), torch.ones(2, 32, dtype=torch.bfloat16)
    assert module.kernel == "semi-structured" and module.get_buffer("weight_indices") is not None
    assert module._buffers["weight_values"] is None
    assert torch.equal(module(x), nn.functional.linear(x, weight.dense()))
    tensors = native_kinds.to_tensors(weight, kind)
    assert all(torch.equal(one, tensors[part]) for part, one in module.state_dict().items())
    half = copy.deepcopy(module).to(torch.float16)
    assert torch.equal(half.dense(), weight.dense().half())
    module.load_state_dict(native_kinds.to_tensors(random_of(kind, (8, 32), torch.bfloat16, 5), kind))
    assert not torch.equal(module.dense(), weight.dense())
    values = weight.values.clone()
    values[0, int(weight.mask[0].int().argmax())] = -0.0  # which a kernel may give back as 0.0
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda dense: dense + 0.0)
    kept = module_of(kind, SparseWeight(values, weight.mask, TWO_FOUR))
    assert kept.kernel == "dense"
    assert torch.equal(kept.dense().view(torch.int16), values.view(torch.int16))


# --- inside models ---

BY_NAME: dict[str, Kind] = {
    "q_proj": Sparse(TWO_FOUR), "k_proj": Sparse(Pattern(4, 8), Scheme(8, 32)), "v_proj": LowRank(24),
    "o_proj": Sparse(TWO_FOUR, Scheme(4, 32, False)), "gate_proj": LowRank(32, Scheme(4, 32), Scheme(8)),
    "up_proj": LowRank(8, None, None, Scheme(4, 64)), "down_proj": Scheme(4, 128), "embed_tokens": Scheme(8),
    "c_attn": Sparse(TWO_FOUR), "c_proj": LowRank(16, Scheme(8), Scheme(8)), "c_fc": Sparse(TWO_FOUR, Scheme(4, 32)),
    "query": Sparse(TWO_FOUR), "value": LowRank(12), "dense": LowRank(16, Scheme(8), Scheme(8), Scheme(4, 64)),
}  # fmt: skip


def kind_of(name: str) -> Kind | None:
    return BY_NAME.get(name.rpartition(".")[2])


@torch.no_grad()
def output(model: Any) -> Tensor:
    ids = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    return model(ids)[0].float()


def decoded(directory: Path, like: Any) -> Any:
    """A dense model with the checkpoint's weights."""
    opened = open_checkpoint(directory)
    config = type(like.config).from_dict(dict(opened.config))
    model = type(like)(config).to(like.dtype).eval()
    split_experts(model)
    missing = model.load_state_dict(dict(opened.dense()), strict=False)
    assert not missing.unexpected_keys
    return model


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama-untied", torch.bfloat16), ("gpt2", torch.float32), ("bert-classifier", torch.float32)]
)
def test_every_kind_in_a_model_by_both_ways_and_saved_to_the_byte(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    import transformers

    import llmcomp.hf

    directory = packed(name, tmp_path / "packed", kind_of, dtype=dtype)
    auto = auto_class(transformers.AutoConfig.from_pretrained(directory))
    model = auto.from_pretrained(directory, dtype="auto").eval()
    kinds = open_checkpoint(directory).kinds
    kept = {key: one for key, one in model.named_modules() if isinstance(one, KINDS)}
    assert {key for key, kind in kinds.items() if not isinstance(kind, Scheme)} == set(kept)
    assert {type(one) for one in kept.values()} >= {PackedSparse, PackedLowRank}
    found, expected = output(model), output(decoded(directory, model))
    assert float((found - expected).norm() / expected.norm()) < 0.03
    assert torch.equal(output(llmcomp.load(directory)), found)
    model.save_pretrained(tmp_path / "one")
    auto.from_pretrained(tmp_path / "one", dtype="auto").save_pretrained(tmp_path / "two")
    files = [{path.name: path.read_bytes() for path in (tmp_path / one).iterdir()} for one in ("one", "two")]
    assert files[0] == files[1]
    held, saved = (load_file(tmp_path / one / "model.safetensors") for one in ("packed", "one"))
    assert set(held) == set(saved)
    assert all(torch.equal(saved[key], tensor) for key, tensor in held.items())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed("llama-untied", tmp_path_factory.mktemp("kinds") / "packed", kind_of)


def test_sizes_and_zeros_are_counted(small: Path) -> None:
    opened = open_checkpoint(small)
    size = size_of(small, role=lambda name: "all")
    dense = sum(parameter.numel() for parameter in opened.skeleton.parameters())
    low = {key: kind for key, kind in opened.kinds.items() if isinstance(kind, LowRank)}
    for key, kind in low.items():
        ref = opened.ref(key)
        whole = ref.out_features * ref.in_features
        dense += kind.rank * (ref.out_features + ref.in_features) - (0 if kind.base is not None else whole)
    assert size.parameters == dense
    zeros_between = [opened.ref(key) for key, kind in opened.kinds.items() if kind == Sparse(TWO_FOUR)]
    spread = sum(ref.out_features * ref.in_features // 2 * 4 for ref in zeros_between)
    assert loaded_bytes(small) == size.bytes_on_disk + spread > size.bytes_on_disk
    model = llmcomp.load(small)
    zeros = sparsity_of(weights_of(model, small))
    assert 0.05 < zeros < 0.5  # a few linears of two blocks are half zero


def test_it_compiles_into_one_graph(small: Path) -> None:
    model, ids = llmcomp.load(small), torch.arange(3, 15).view(1, -1)
    expected = model(input_ids=ids).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids).logits, expected)
    torch._dynamo.reset()


def test_dense_holds_it_and_others_say_what_they_cannot(small: Path, tmp_path: Path) -> None:
    llmcomp.export(small, tmp_path / "dense", "dense")
    llmcomp.export(small, tmp_path / "again", "llmcomp")
    model = llmcomp.load(small)
    torch.testing.assert_close(output(llmcomp.load(tmp_path / "dense")), output(model), rtol=0.05, atol=0.05)
    assert torch.equal(output(llmcomp.load(tmp_path / "again")), output(model))
    sentence = r"has no form for (sparse|low-rank) weights.* such as model\.layers\.0"
    for form in sorted(set(EXPORTS) - {"dense", "llmcomp"}):
        with pytest.raises(BadRecipe, match=sentence) as said:
            llmcomp.export(small, tmp_path / form, form)
        assert "\n" not in str(said.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "dense"]


def test_integers_with_a_mask_go_on_as_integers(tmp_path: Path) -> None:
    sparse = BY_NAME["o_proj"]
    directory = packed("llama-untied", tmp_path / "packed", lambda name: sparse if "o_proj" in name else None)
    llmcomp.export(directory, tmp_path / "ct", "compressed-tensors")
    one, other = open_checkpoint(directory), open_checkpoint(tmp_path / "ct")
    assert other.kinds == one.schemes
    for module in one.kinds:
        assert torch.equal(other.quantized(module).values, one.quantized(module).values)
    written = llmcomp.export(directory, tmp_path / "gguf", "gguf").output
    assert (written / "model.gguf").is_file()


NAME = "model.layers.0.self_attn"
DAMAGED: dict[str, tuple[str, str]] = {
    f"{NAME}.q_proj.weight_values": ("cut", "q_proj"),
    f"{NAME}.q_proj.weight_indices": ("missing", "weight_indices is missing"),
    f"{NAME}.o_proj.weight_packed": ("missing", "weight_packed is missing|o_proj is compressed by config"),
    f"{NAME}.v_proj.left.weight": ("missing", "left.weight|v_proj is compressed by config"),
    f"{NAME}.v_proj.right.weight": ("cut", "right.weight is float32"),
    "model.layers.0.mlp.gate_proj.left.weight_scale": ("integers", "left.weight_scale"),
    "model.layers.0.mlp.up_proj.base.weight_packed": ("missing", "base.weight_packed is missing"),
    f"{NAME}.q_proj.weight_shape": ("zeroed", "weight_shape"),
}


@pytest.mark.parametrize("key", DAMAGED)
def test_damaged_files_are_one_sentence(key: str, small: Path, tmp_path: Path) -> None:
    import transformers

    how, sentence = DAMAGED[key]
    tensors = load_file(small / "model.safetensors")
    change = {
        "cut": lambda t: t[1:].clone(), "integers": lambda t: t.int(), "zeroed": torch.zeros_like, "missing": None,
    }[how]  # fmt: skip
    one = tensors.pop(key)
    if change is not None:
        tensors[key] = change(one)
    directory = tmp_path / "bad"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_bytes((small / "config.json").read_bytes())
    for load in (llmcomp.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(BadCheckpoint, match=sentence) as said:
            load(directory)
        assert "\n" not in str(said.value)


def test_embeddings_are_looked_up(small: Path, tmp_path: Path) -> None:
    directory = tmp_path / "bad"
    directory.mkdir()
    for path in small.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    text = (small / "config.json").read_text()
    at = '"model.layers.0.self_attn.q_proj"'
    assert at in text
    (directory / "config.json").write_text(text.replace(at, '"model.norm"'))
    with pytest.raises(BadCheckpoint, match=r"model\.norm"):
        llmcomp.load(directory)


def test_kinds_name_what_they_are() -> None:
    assert native.describe({"m": Sparse(TWO_FOUR)})["weights"] == [
        {"kind": "sparse", "kept": 2, "of": 4, "values": None, "modules": ["m"]}
    ]
    with pytest.raises(BadRecipe, match="packs N:M patterns, not unstructured 70%; take --format dense"):
        native.describe({"m": Sparse(Pattern(removed=0.7))})
