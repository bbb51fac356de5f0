"""Packed experts: what plain transformers decodes while it merges them, and what it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import GPT_OSS, build, tiny

from llmcomp import api
from llmcomp.adapters.base import LinearRef
from llmcomp.adapters.discover import discover, skeleton
from llmcomp.errors import BadRecipe
from llmcomp.experts import split_experts
from llmcomp.formats import compressed_tensors
from llmcomp.pipeline.job import plan_recipe
from llmcomp.recipe import Override, QuantizeStep, Recipe, step_of
from llmcomp.schemes import Scheme
from llmcomp.weights import QuantizedWeight

INT4 = Scheme(4, 32)
ADVICE = "; give them one scheme, or use --format dense."


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("mixtral", tmp_path_factory.mktemp("experts") / "mixtral", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ({"targets": ("attention",)}, "12 of 12 would stay as they are"),
        ({"overrides": (Override("re:.*experts.2.*", skip=True),)}, "3 of 12 would stay as they are"),
        ({"overrides": (Override("w2", bits=8),)}, "they would have int4 g128, int8 g128"),
        ({"symmetric": False}, "they would have zero points"),
    ],
)
def test_what_no_packed_checkpoint_can_hold_is_refused(mixtral: Path, step: dict[str, Any], problem: str) -> None:
    adapter = discover(skeleton(mixtral))
    with pytest.raises(BadRecipe) as caught:
        plan_recipe(Recipe((QuantizeStep(**step),)), adapter)
    assert problem in str(caught.value) and str(caught.value).endswith(ADVICE)
    plan_recipe(Recipe((QuantizeStep(**step),), format="dense"), adapter)


def test_rounded_inputs_would_be_forgotten(mixtral: Path) -> None:
    recipe = Recipe((QuantizeStep(bits=8, group_size="channel", activations="int8-dynamic"),))
    with pytest.raises(BadRecipe, match="--activations does not apply here: readers merge experts as they load them"):
        plan_recipe(recipe, discover(skeleton(mixtral)))


@pytest.mark.parametrize("form", ["bnb-nf4", "bnb-int8"])
def test_bitsandbytes_would_leave_experts_as_they_are(mixtral: Path, form: str) -> None:
    with pytest.raises(BadRecipe, match="transformers keeps this model's experts fused, which it would leave"):
        plan_recipe(Recipe((step_of(form),), format=form), discover(skeleton(mixtral)))


def test_dense_experts_beside_packed_attention_do_not_load(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should this fail one day, transformers has learned it and the refusal can go."""
    monkeypatch.setattr(compressed_tensors, "_check_experts", lambda *_: None)
    recipe = Recipe((QuantizeStep(method="rtn", targets=("attention",)),))
    made = api.quantize(str(mixtral), recipe=recipe, output=tmp_path / "q", evaluate=False, verify=False)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        type(build("mixtral")).from_pretrained(made.output)


def packed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight [out, in] as llmcomp's files hold one of 4 bits."""
    rows, columns = weight.shape
    ref, scale = LinearRef(name, "mlp", 0, rows, columns), torch.full((rows, columns // 32), 0.01)
    values = (weight.reshape(rows, -1, 32) / scale[..., None]).round().clamp(-8, 7).reshape(rows, columns)
    weight = QuantizedWeight(values.to(torch.int8), scale, None, INT4)
    return compressed_tensors.layout([(ref, INT4)]).tensors(ref, weight)


@pytest.mark.parametrize("dequantize", [True, False])
@pytest.mark.parametrize("apart", [True, False], ids=["one by one", "merged"])
def test_packed_experts_of_gpt_oss_do_not_load(apart: bool, dequantize: bool, tmp_path: Path) -> None:
    """Which is why llmcomp refuses it. Should this fail one day, transformers has learned it."""
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**GPT_OSS)).eval()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(names) == 4, "files hold all experts of a block as one tensor"
    for name in names:
        experts = stored.pop(name).transpose(1, 2)  # [experts, out, in]
        where, _, leaf = name.rpartition(".")
        for number, weight in enumerate(experts):
            parts = {"gate_proj": weight[::2], "up_proj": weight[1::2]} if leaf == "gate_up_proj" else {leaf: weight}
            for part, dense in parts.items() if apart else ():
                stored |= packed(f"{where}.{number}.{part}", dense)
        if not apart:
            whole = packed(name, experts.flatten(0, 1))
            stored |= {key.replace(".weight", "", 1): value for key, value in whole.items()}
    save_file({name: value.contiguous() for name, value in stored.items()}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": [r"re:.*experts.*"], "weights": args, "format": "pack-quantized"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "format": "pack-quantized",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "dequantize": dequantize,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, account = transformers.GptOssForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(names) <= account["missing_keys"]


def test_the_experts_group_comes_first_and_names_them_in_one_pattern() -> None:
    """transformers takes the first group whose target says 'experts', and shared ones say so too."""
    model = build("deepseek-v3").to("meta")
    split_experts(model)
    adapter = discover(model)
    override = (Override("attention", bits=8), Override("re:.*shared.*", bits=8))
    plan = plan_recipe(Recipe((QuantizeStep(overrides=override),)), adapter)
    config = plan.layout.config(model)
    assert config is not None
    first, second = config["config_groups"].values()
    assert (first["weights"]["num_bits"], second["weights"]["num_bits"]) == (4, 8)
    assert r"layers\.\d+\.mlp\.experts\.\d+\.gate_proj" in first["targets"][0]
    assert len(first["targets"][0]) < 400 and "shared_experts" in second["targets"][0]
