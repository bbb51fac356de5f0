"""llmcomp's layout inside transformers: every architecture, saved again, opened wrongly, damaged."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, tiny
from torch import Tensor

import llmcomp
from llmcomp import native
from llmcomp.errors import BadCheckpoint
from llmcomp.experts import split_experts
from llmcomp.feeds import around
from llmcomp.formats.opening import open_checkpoint
from llmcomp.formats.reading import auto_class
from llmcomp.formats.witness import model_output
from llmcomp.packed import Packed, PackedEmbedding
from llmcomp.recipe import Calibration, Override, QuantizeStep, Recipe

# One of each kind of structure; the others are the same code on other names.
KINDS = (
    *("llama", "gemma3", "gpt2", "bert-classifier", "modernbert", "mixtral", "deepseek-v3", "t5"),
)


def packed(source: Path, output: Path, **step: Any) -> Path:
    options = llmcomp.RunOptions(output=output, verify=False, evaluate=False)
    given = {"method": "rtn", "bits": 4, **step}
    overrides = given.pop("overrides", ())
    recipe = Recipe((QuantizeStep(**given, overrides=overrides),), Calibration("default"), format="llmcomp")
    return llmcomp.quantize(str(source), recipe=recipe, options=options).output


def auto(directory: Path) -> Any:
    import transformers

    import llmcomp.hf  # noqa: F401 (registers)

    return auto_class(transformers.AutoConfig.from_pretrained(directory))


def opened(directory: Path) -> Any:
    return auto(directory).from_pretrained(directory, dtype="auto").eval()


@torch.no_grad()
def output(model: Any) -> Tensor:
    tokens = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    return model_output(model(**around(model, tokens))).float()


def decoded(directory: Path, source: Path) -> Any:
    """The source model with the checkpoint's decoded weights in it."""
    model = auto(directory).from_pretrained(source, dtype="auto").eval()
    split_experts(model)
    state = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in open_checkpoint(directory).dense():
        if name in state:
            state[name].data = tensor
    return model


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one in KINDS else pytest.mark.slow) for one in TINY]
)
def test_every_architecture_computes_packed_and_is_saved_to_the_byte(name: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if list(TINY).index(name) % 2 else torch.float32
    source = tiny(name, tmp_path / "source", dtype=dtype, tokenizer=True)
    directory = packed(source, tmp_path / "packed")
    schemes = open_checkpoint(directory).schemes
    model = opened(directory)
    kept = [module for module in model.modules() if isinstance(module, Packed)]
    assert len(kept) == len(schemes) > 0
    found, expected = output(model), output(decoded(directory, source))
    assert float((found - expected).norm() / expected.norm()) < 0.03
    model.save_pretrained(tmp_path / "one")
    again = opened(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert torch.equal(output(again), found)
    held = {key: one for file in directory.glob("*.safetensors") for key, one in load_file(file).items()}
    saved = load_file(tmp_path / "one" / "model.safetensors")
    assert len([key for key in saved if key.endswith(native.PACKED)]) == len(schemes)
    assert set(saved) == set(held)
    assert all(torch.equal(saved[key], tensor) for key, tensor in held.items())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama-untied", tmp_path_factory.mktemp("llama") / "source", tokenizer=True)


@pytest.fixture(scope="module")
def small(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(llama, tmp_path_factory.mktemp("small") / "packed")


MIXED = (
    Override("o_proj", bits=8, group_size="channel"),
    Override("up_proj", bits=3, group_size=64, symmetric=False),
    Override("down_proj", bits=2, group_size=32),
    Override("embeddings", bits=8, group_size="channel"),
    Override("head", bits=8, group_size="channel"),
)


def test_a_mixture_with_embeddings_and_head(llama: Path, tmp_path: Path) -> None:
    targets = ("attention", "mlp", "embeddings", "head")
    directory = packed(llama, tmp_path / "packed", targets=targets, overrides=MIXED)
    model = opened(directory)
    kernels = {name: module.kernel for name, module in model.named_modules() if isinstance(module, Packed)}
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    assert kernels["lm_head"] == kernels["model.layers.0.self_attn.o_proj"] == "int8"
    assert kernels["model.layers.1.mlp.down_proj"] == "int4"
    found, expected = output(model), output(decoded(directory, llama))
    assert float((found - expected).norm() / expected.norm()) < 0.03


def test_embeddings_that_are_scaled(tmp_path: Path) -> None:
    """Gemma's embeddings multiply by a factor that they keep in a buffer."""
    source = tiny("gemma3", tmp_path / "source", tokenizer=True, tie_word_embeddings=False)
    directory = packed(source, tmp_path / "packed", targets=("embeddings",), bits=8)
    model = opened(directory)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    found, expected = output(model), output(decoded(directory, source))
    assert float((found - expected).norm() / expected.norm()) < 1e-3
    nothing = model.get_input_embeddings()(torch.zeros(1, 0, dtype=torch.long))
    assert nothing.shape == (1, 0, 128)


def test_it_is_pickled_and_its_state_loaded(small: Path) -> None:
    model, expected = opened(small), output(opened(small))
    assert torch.equal(output(pickle.loads(pickle.dumps(model))), expected)
    state = {key: one.clone() for key, one in model.state_dict().items()}
    scales = "model.layers.0.mlp.up_proj.weight_scale"
    changed = {**state, scales: state[scales] * 2}
    model.load_state_dict(changed)
    assert torch.equal(model.state_dict()[scales], changed[scales])
    assert not torch.equal(output(model), expected)
    model.load_state_dict(state)
    assert torch.equal(output(model), expected)


def test_it_takes_a_quarter_of_the_memory(small: Path) -> None:
    model = opened(small)
    block = model.model.layers[0]
    weights = sum(module.in_features * module.out_features for module in block.modules() if isinstance(module, Packed))
    held = sum(one.nbytes for module in block.modules() if isinstance(module, Packed) for one in module.buffers())
    assert held / (2 * weights) < 0.32  # of bf16's; float32 scales of float32 models are twice bf16's


def test_generation_and_casts(small: Path) -> None:
    model = opened(small)
    ids = torch.tensor([[5, 6, 7]])
    written = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert written.shape == (1, 8)
    expected = output(model)
    assert float((output(model.to(torch.bfloat16)) - expected).norm() / expected.norm()) < 0.03
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    assert (module.weight.dtype, module.weight.shape) == (torch.bfloat16, (256, 128))
    assert torch.equal(module.weight * 1, module.dense())


@pytest.mark.parametrize("tokens", [3, 40])  # few rows, and tiles
def test_gradients_reach_what_comes_before(llama: Path, small: Path, tokens: int) -> None:
    model, plain = opened(small), decoded(small, llama)
    ids = torch.randint(5, 60, (1, tokens), generator=torch.Generator().manual_seed(0))
    found, expected = (
        torch.autograd.grad(one(input_ids=ids).logits.logsumexp(-1).sum(), one.get_input_embeddings().weight)[0]
        for one in (model, plain)
    )
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_it_compiles_into_one_graph(small: Path) -> None:
    """And computes there what it computes outside, gradients included."""
    model, ids = opened(small), torch.arange(3, 27).view(1, -1)
    expected = model(input_ids=ids).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    embedded = model.get_input_embeddings()(ids).detach()
    gradients = []
    for one in (model, compiled):
        x = embedded.clone().requires_grad_()
        logits = one(inputs_embeds=x).logits
        torch.testing.assert_close(logits, expected)
        logits.square().mean().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    torch._dynamo.reset()


def test_checkpoints_of_compressed_tensors_stay_packed(llama: Path, tmp_path: Path) -> None:
    options = llmcomp.RunOptions(output=tmp_path / "ct", verify=False, evaluate=False)
    llmcomp.quantize(str(llama), bits=4, method="rtn", symmetric=False, options=options)
    model = llmcomp.load(tmp_path / "ct")
    assert sum(isinstance(module, Packed) for module in model.modules()) == 14
    expected = output(decoded(tmp_path / "ct", llama))
    assert float((output(model) - expected).norm() / expected.norm()) < 0.03
    model.save_pretrained(tmp_path / "saved")
    assert native.is_native(json.loads((tmp_path / "saved" / "config.json").read_text()))
    assert torch.equal(output(opened(tmp_path / "saved")), output(model))


def test_names_of_older_files_are_the_models(tmp_path: Path) -> None:
    """GPT-NeoX's files call the head `embed_out`."""
    source = tiny("gpt-neox", tmp_path / "source", tokenizer=True)
    opened_one = open_checkpoint(packed(source, tmp_path / "packed"))
    assert {name for name, _ in opened_one.dense()} == set(opened_one.skeleton.state_dict())


def test_the_tokenizer_is_the_sources(tmp_path: Path) -> None:
    """transformers chooses a tokenizer's class by the model type where tokenizer_config.json names none."""
    from llmcomp.measure.load import load_tokenizer

    source = tiny("qwen2", tmp_path / "source", tokenizer=True)
    file = source / "tokenizer_config.json"
    content = json.loads(file.read_text())
    content.pop("tokenizer_class")
    file.write_text(json.dumps(content))
    directory = packed(source, tmp_path / "packed")
    before, after = load_tokenizer(source), load_tokenizer(directory)
    assert type(after) is type(before)
    assert after("Return the sine of x.").input_ids == before("Return the sine of x.").input_ids


def test_what_is_not_packed_is_loaded_as_transformers_does(llama: Path) -> None:
    assert not any(isinstance(module, Packed) for module in llmcomp.load(llama).modules())


WITHOUT_US = """
import sys, torch, transformers
for name in ("AutoModelForCausalLM", "LlamaForCausalLM", "BertModel"):
    for given in ({}, {"dtype": "auto"}, {"dtype": torch.bfloat16}):
        try:
            getattr(transformers, name).from_pretrained(sys.argv[1], **given)
            print("made a model:", name, given)
        except Exception as error:
            print("refused:", type(error).__name__)
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2])
print("made a model of the source")
"""


def test_without_llmcomp_no_class_makes_a_model_of_it(small: Path, llama: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_US, str(small), str(llama)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *said, last = done.stdout.splitlines()
    assert last == "made a model of the source"
    assert len(said) == 9
    assert all(line.startswith("refused: ") for line in said), said


def test_a_models_own_class_is_refused_with_llmcomp_too(small: Path) -> None:
    import transformers

    import llmcomp.hf  # noqa: F401 (registers)

    with pytest.raises((AttributeError, BadCheckpoint), match=r"llmcomp|packed"):
        transformers.LlamaForCausalLM.from_pretrained(small)


def edited(small: Path, output: Path, change: Callable[[dict], object]) -> Path:
    """A copy whose config.json is changed."""
    output.mkdir()
    for path in small.iterdir():
        (output / path.name).write_bytes(path.read_bytes())
    config = json.loads((output / "config.json").read_text())
    change(config)
    (output / "config.json").write_text(json.dumps(config))
    return output


BAD_CONFIGS: dict[str, tuple[Callable[[dict], object], str]] = {
    "version": (lambda c: c["quantization_config"].update(version=2), "version 2 of llmcomp's layout"),
    "no version": (lambda c: c["quantization_config"].pop("version"), "version None"),
    "kind": (lambda c: c["quantization_config"]["weights"][0].update(kind="2:4"), "weights of kind '2:4'"),
    "bits": (lambda c: c["quantization_config"]["weights"][0].update(bits=5), "a group that cannot be read"),
    "twice": (lambda c: c["quantization_config"]["weights"].append(c["quantization_config"]["weights"][0]), "twice"),
    "module": (lambda c: c["quantization_config"]["weights"][0]["modules"].append("model.nothing"), "model.nothing"),
    "no model": (lambda c: c.pop("model"), "the model's own config"),
    "type": (lambda c: c.update(packed_model_type="lama"), "no model type 'lama'"),
    "group": (lambda c: c["quantization_config"]["weights"][0].update(group_size=64), "expected"),
    "names": (lambda c: c["quantization_config"]["weights"][0].update(modules="abc"), "a list of names"),
    "flag": (lambda c: c["quantization_config"]["weights"][0].update(activations={}), "activations is"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_config_that_cannot_be_is_one_sentence(name: str, small: Path, tmp_path: Path) -> None:
    import transformers

    change, sentence = BAD_CONFIGS[name]
    directory = edited(small, tmp_path / "bad", change)
    for load in (llmcomp.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(BadCheckpoint, match=sentence):
            load(directory)


NAME = "model.layers.0.mlp.up_proj"
BAD_TENSORS: dict[str, tuple[Callable[[dict], object], str]] = {
    "scale missing": (lambda t: t.pop(f"{NAME}.weight_scale"), "weight_scale"),
    "words missing": (lambda t: t.pop(f"{NAME}.weight_packed"), "weight_packed|stored compressed"),
    "shape missing": (lambda t: t.pop(f"{NAME}.weight_shape"), "weight_shape"),
    "scale cut": (lambda t: t.update({f"{NAME}.weight_scale": t[f"{NAME}.weight_scale"][1:].clone()}), "weight_scale"),
    "words cut": (lambda t: t.update({f"{NAME}.weight_packed": t[f"{NAME}.weight_packed"][1:].clone()}), "expected"),
    "integer scales": (lambda t: t.update({f"{NAME}.weight_scale": t[f"{NAME}.weight_scale"].int()}), "floating"),
    "shape of it": (lambda t: t.update({f"{NAME}.weight_shape": torch.ones(2, 2, dtype=torch.int64)}), "weight_shape"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_are_not_what_config_says_are_one_sentence(name: str, small: Path, tmp_path: Path) -> None:
    change, sentence = BAD_TENSORS[name]
    directory = edited(small, tmp_path / "bad", lambda config: None)
    tensors = {key: one for file in directory.glob("*.safetensors") for key, one in load_file(file).items()}
    for path in directory.glob("model*"):
        path.unlink()
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    import transformers

    for load in (llmcomp.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(BadCheckpoint, match=sentence):
            load(directory)


def test_weights_that_are_missing_are_no_model(small: Path, tmp_path: Path) -> None:
    """transformers itself only warns."""
    directory = edited(small, tmp_path / "bad", lambda config: None)
    tensors = {key: one for file in directory.glob("*.safetensors") for key, one in load_file(file).items()}
    for path in directory.glob("model*"):
        path.unlink()
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"model\.norm\.weight"):
        llmcomp.load(directory)
