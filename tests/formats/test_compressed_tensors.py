"""Which layouts plain transformers decodes, measured: each kind is loaded and compared to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import INPUTS, Written, bare_bert, bert, gpt2, linears, llama, ref, write
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from llmcomp.activations import quantized
from llmcomp.errors import BadRecipe
from llmcomp.formats import FORMATS, broken_ties
from llmcomp.schemes import ACTIVATIONS, Scheme

G128, G64, CHANNEL = Scheme(4, 128), Scheme(3, 64), Scheme(8)
A8 = Scheme(8, activations="int8-dynamic")
ASYM, ASYM3, ASYM8 = Scheme(4, 128, False), Scheme(3, 64, False), Scheme(8, None, False)


def assert_loads(written: Written, auto: type = AutoModelForCausalLM) -> nn.Module:
    model, info = auto.from_pretrained(written.directory, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        model(**INPUTS)  # the first forward decompresses
    for name, tensor in written.dense.items():
        loaded = model.get_parameter(name)
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor), name
    return model


def quantization_config(written: Written) -> dict:
    return json.loads((written.directory / "config.json").read_text())["quantization_config"]


def sizes_agree(written: Written, model: nn.Module) -> bool:
    itemsize = model.dtype.itemsize
    return all(written.layout.nbytes(ref(model, n), itemsize) == size for n, size in written.sizes.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [G128, G64, CHANNEL, Scheme(2, 32), ASYM, ASYM3, ASYM8], ids=str)
def test_one_scheme_for_all_linears(tmp_path: Path, scheme: Scheme, dtype: torch.dtype) -> None:
    model = llama(dtype=dtype)
    written = write(tmp_path, model, dict.fromkeys(linears(model), scheme))
    assert_loads(written)
    assert sizes_agree(written, model)
    config = quantization_config(written)
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head"]
    assert config.get("dequantize", False) is not scheme.symmetric
    assert not written.layout.dense


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_mixed_schemes(tmp_path: Path, asymmetric: bool) -> None:
    model = llama()
    kinds = (ASYM, ASYM3, ASYM8, CHANNEL) if asymmetric else (G128, G64, CHANNEL)
    schemes = {name: kinds[n % len(kinds)] for n, name in enumerate(linears(model))}
    written = write(tmp_path, model, schemes)
    assert_loads(written)
    assert sizes_agree(written, model)
    assert not written.layout.dense
    assert any("vLLM" in note for note in written.layout.notes) is asymmetric


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "more",
    [
        {"model.embed_tokens": Scheme(8)},
        {"lm_head": Scheme(8)},
        {"model.embed_tokens": ASYM8, "lm_head": Scheme(8, 64)},
    ],
    ids=["embeddings", "head", "both"],
)
def test_embeddings_and_head(tmp_path: Path, tied: bool, more: dict[str, Scheme]) -> None:
    model = llama(tied)
    written = write(tmp_path, model, dict.fromkeys(linears(model), G128) | more)
    loaded = assert_loads(written)
    assert sizes_agree(written, model)
    assert loaded.config.tie_word_embeddings is False
    assert not written.layout.dense


def test_a_whole_tie_stays(tmp_path: Path) -> None:
    model = llama(tied=True)
    loaded = assert_loads(write(tmp_path, model, dict.fromkeys(linears(model), G128)))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_bert_with_its_tied_bias(tmp_path: Path) -> None:
    model = bert()
    schemes = dict.fromkeys(linears(model), ASYM) | {"bert.embeddings.word_embeddings": Scheme(8)}
    assert_loads(write(tmp_path, model, schemes), AutoModelForMaskedLM)


@pytest.mark.parametrize("way", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, bert])
def test_rounded_activations(tmp_path: Path, make: Callable, dtype: torch.dtype, way: str) -> None:
    """The reader rounds what every compressed linear reads, and nothing else."""
    model = make(dtype=dtype)
    skipped, *names = linears(model)
    written = write(tmp_path, model, dict.fromkeys(names, Scheme(8, activations=way)) | {skipped: CHANNEL})
    read = assert_loads(written, AutoModelForCausalLM if make is llama else AutoModelForMaskedLM)
    assert sizes_agree(written, model)
    groups = quantization_config(written)["config_groups"].values()
    assert {group["format"] for group in groups} == {"int-quantized"}
    assert sorted(bool(group["input_activations"]) for group in groups) == [False, True]
    seen: dict[str, torch.Tensor] = {}
    for name in (skipped, names[0]):
        linear = read.get_submodule(name)
        linear.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        linear.register_forward_hook(lambda _, args, out, name=name: seen.update({name + ".out": out}))
    with torch.no_grad():
        read(**INPUTS)
        scale = getattr(read.get_submodule(names[0]), "input_scale", None)
        assert (scale is None) == (way == "int8-dynamic") and not hasattr(read.get_submodule(skipped), "input_scale")
        for name, change in ((skipped, lambda x: x), (names[0], partial(quantized, scale=scale))):
            expected = read.get_submodule(name)
            wanted = nn.functional.linear(change(seen[name]), expected.weight, expected.bias)
            assert torch.equal(seen[name + ".out"], wanted), name


def test_activations_that_no_reader_would_round_are_refused(tmp_path: Path) -> None:
    model = gpt2()
    with pytest.raises(BadRecipe, match="Conv1D weights as they load them and forget about activations"):
        write(tmp_path, model, dict.fromkeys(linears(model), A8))
    with pytest.raises(BadRecipe, match="dense cannot say that activations are rounded"):
        write(tmp_path, llama(), dict.fromkeys(linears(llama()), A8), form="dense")


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("mixed", [False, True], ids=["one scheme", "mixed"])
def test_auto_model_loads_it_without_the_head(tmp_path: Path, make: Callable, mixed: bool) -> None:
    """The base model's modules lack the prefix that the names in config.json have."""
    model = make()
    names = linears(model)[1:]  # one inside the base model is left alone
    kinds = (G128, G64) if mixed else (G128,)
    written = write(tmp_path, model, {name: kinds[n % len(kinds)] for n, name in enumerate(names)})
    base, info = AutoModel.from_pretrained(written.directory, output_loading_info=True)
    assert not any("layer" in key for key in info["missing_keys"])
    with torch.no_grad():
        base(**INPUTS)
    for name in linears(model):
        weight = base.get_submodule(name.removeprefix(f"{model.base_model_prefix}.")).weight
        assert torch.equal(weight, written.dense[f"{name}.weight"])


def test_a_linear_that_only_the_bare_model_makes_is_not_taken_for_a_packed_one(tmp_path: Path) -> None:
    """BERT's pooler is in no checkpoint of a masked LM: decoded, it would be whatever memory held."""
    model = bert()
    written = write(tmp_path, model, dict.fromkeys(linears(model), G128))
    base, info = AutoModel.from_pretrained(written.directory, output_loading_info=True)
    assert "pooler.dense.weight" in info["missing_keys"]
    assert not [name for name in base.state_dict() if name.startswith("pooler.dense.weight_")]


def test_embeddings_below_8_bits_say_that_they_take_8(tmp_path: Path) -> None:
    written = write(tmp_path, llama(), {"model.embed_tokens": G128})
    assert_loads(written)
    assert "takes 8 bits" in written.layout.notes[0]


@pytest.mark.parametrize("scheme", [G128, CHANNEL, ASYM, ASYM8], ids=lambda s: s.label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv1d_is_packed_in_transposed_blocks(tmp_path: Path, scheme: Scheme, dtype: torch.dtype) -> None:
    model = gpt2(dtype)
    written = write(tmp_path, model, dict.fromkeys(linears(model), scheme))
    assert_loads(written)
    assert sizes_agree(written, model)
    assert not written.layout.dense
    dense = sum(model.get_submodule(name).weight.nbytes for name in linears(model))
    assert sum(written.sizes.values()) < dense * (scheme.bits + 1.5) / (8 * dtype.itemsize)


def test_conv1d_of_several_schemes_shares_one_storage(tmp_path: Path) -> None:
    model = gpt2()
    schemes = {name: (G64, ASYM, Scheme(4))[n % 3] for n, name in enumerate(linears(model))}
    written = write(tmp_path, model, schemes)
    assert_loads(written)
    assert sizes_agree(written, model)
    assert not written.layout.dense
    assert "fewer bits" in written.layout.notes[1]


def test_beside_conv1d_everything_else_is_dense_and_said(tmp_path: Path) -> None:
    model = gpt2()
    written = write(tmp_path, model, dict.fromkeys(linears(model), G128) | {"transformer.wte": Scheme(8)})
    assert_loads(written)
    assert list(written.layout.dense) == ["transformer.wte"]
    assert sizes_agree(written, model)


def test_conv1d_packed_like_a_linear_would_be_ignored(tmp_path: Path) -> None:
    """The claim behind the transposed blocks: without `dequantize`, transformers skips Conv1D silently."""
    model = gpt2()
    written = write(tmp_path, model, dict.fromkeys(linears(model), G128))
    path = written.directory / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["dequantize"]
    path.write_text(json.dumps(config))
    _, info = AutoModelForCausalLM.from_pretrained(written.directory, output_loading_info=True)
    assert f"{linears(model)[0]}.weight" in info["missing_keys"]


def test_conv1d_widths_without_a_common_group_are_dense() -> None:
    model = gpt2()
    name = linears(model)[0]
    odd = ref(model, name).__class__(name, "mlp", 0, 64, 100, True)
    layout = FORMATS["compressed-tensors"]([(odd, Scheme(4)), (ref(model, linears(model)[1]), Scheme(4))])
    assert set(layout.dense) == set(linears(model)[:2])
    assert layout.config(model) is None


DEEP = ("intermediate", "output")
BARE: dict[str, tuple[Scheme, dict[str, Scheme], int]] = {
    # scheme of the linears, what differs → bits that all of them take in the file
    "one scheme": (G128, {}, 4),
    "channel": (CHANNEL, {}, 8),
    "asymmetric": (ASYM, {}, 4),
    "groups differ": (G128, {"encoder.layer.0.output.dense": Scheme(4, 64)}, 4),
    "widths differ": (G64, {"encoder.layer.0.output.dense": Scheme(4, 32)}, 4),
    "mixed": (G128, {f"encoder.layer.{n}.{kind}.dense": CHANNEL for n in range(2) for kind in DEEP}, 8),
    "partly asymmetric": (G128, {"encoder.layer.1.output.dense": ASYM}, 4),
    "embeddings": (G128, {"embeddings.word_embeddings": Scheme(4, 32)}, 4),
}


@pytest.mark.parametrize("case", BARE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bare_model_is_decoded_before_anything_is_called(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    """sentence-transformers calls `model.forward`, past the hook that would decode at the first call."""
    scheme, more, bits = BARE[case]
    model = bare_bert(dtype)
    written = write(tmp_path, model, dict.fromkeys(linears(model), scheme) | more)
    loaded, info = AutoModel.from_pretrained(written.directory, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        found, expected = loaded.forward(**INPUTS), model(**INPUTS)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert all(torch.equal(loaded.get_parameter(name), tensor) for name, tensor in written.dense.items())
    assert sizes_agree(written, model) and not written.layout.dense
    (group,) = quantization_config(written)["config_groups"].values()
    assert group["weights"]["num_bits"] == bits


def test_few_wide_weights_of_a_bare_model_are_dense(tmp_path: Path) -> None:
    """Eight bits for all would take more bytes than one dense weight."""
    model = bare_bert()
    wide = "encoder.layer.0.attention.self.query"
    written = write(tmp_path, model, dict.fromkeys(linears(model), Scheme(2, 128)) | {wide: CHANNEL})
    assert written.layout.dense == {
        wide: "transformers decodes all weights of a checkpoint by one scheme, here int2"
    }
    assert_loads(written, AutoModel)
    assert sizes_agree(written, model)


def test_dense_writes_what_any_software_reads(tmp_path: Path) -> None:
    for model in (llama(), gpt2()):
        folder = tmp_path / type(model).__name__
        written = write(folder, model, dict.fromkeys(linears(model), ASYM), form="dense")
        assert_loads(written)
        assert sizes_agree(written, model)
        assert "quantization_config" not in (written.directory / "config.json").read_text()


def test_broken_ties() -> None:
    ties = {"decoder.weight": "embed.weight", "decoder.bias": "bias"}
    assert broken_ties(ties, ["layer.0.q"]) == {}
    assert broken_ties(ties, ["embed"]) == ties
    assert broken_ties(ties, ["decoder"]) == ties
