"""Ways to damage a written checkpoint, each with what verification must say of it.

Every entry of `DAMAGES` takes the directory of a tiny Llama in three shards (checkpoints.llama) and changes
it in place; `kind` says which checkpoint it needs, `said` is a pattern for the sentence.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmcomp.formats.save import INDEX

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
UP, GATE = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"
EMBEDDINGS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Damage:
    kind: str
    said: str
    apply: Callable[[Path], Any]


DAMAGES: dict[str, Damage] = {}


def damage(said: str, kind: str = "symmetric") -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
    def register(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
        DAMAGES[function.__name__] = Damage(kind, said, function)
        return function

    return register


def edit(directory: Path, key: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite the shard that holds `key`; the index stays as it is."""
    path = directory / json.loads((directory / INDEX).read_text())["weight_map"][key]
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def flip(directory: Path, key: str, byte: int = 0, bit: int = 0) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(-1).view(torch.uint8)[byte] ^= 1 << bit

    edit(directory, key, change)


def edit_json(path: Path, change: Callable[[dict], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_config(directory: Path, change: Callable[[dict], Any]) -> None:
    edit_json(directory / "config.json", change)


def group_of(config: dict) -> dict:
    """The one config group."""
    return config["quantization_config"]["config_groups"]["group_0"]


def edit_args(directory: Path, **changes: Any) -> None:
    """Change the quantization arguments of the weights."""
    edit_config(directory, lambda config: group_of(config)["weights"].update(changes))


def edit_index(directory: Path, change: Callable[[dict], Any]) -> None:
    edit_json(directory / INDEX, lambda data: change(data["weight_map"]))


@damage(said=f"{Q}.weight has other values")
def a_bit_of_a_scale(directory: Path) -> None:
    flip(directory, f"{Q}.weight_scale")


@damage(said=f"{K}.weight has other values")
def a_packed_nibble(directory: Path) -> None:
    flip(directory, f"{K}.weight_packed", byte=7, bit=5)


@damage(said=f"{UP}.weight has other values", kind="asymmetric")
def a_zero_point(directory: Path) -> None:
    flip(directory, f"{UP}.weight_zero_point")


@damage(said=f"{GATE}.weight has other values")
def two_tensors_swapped(directory: Path) -> None:
    one, other = f"{UP}.weight_packed", f"{GATE}.weight_packed"
    edit(directory, one, lambda t: t.update({one: t[other], other: t[one]}))


@damage(said=f"{NORM} has other values")
def a_norm_weight(directory: Path) -> None:
    flip(directory, NORM)


@damage(said=f"{EMBEDDINGS} has other values", kind="asymmetric")
def an_embedding_row(directory: Path) -> None:
    edit(directory, EMBEDDINGS, lambda t: t[EMBEDDINGS][150].mul_(2))


@damage(said=r"model-00002-of-00003\.safetensors.* is missing")
def a_missing_shard(directory: Path) -> None:
    (directory / "model-00002-of-00003.safetensors").unlink()


@damage(said=r"model-00002-of-00003\.safetensors is not a whole safetensors file")
def a_truncated_file(directory: Path) -> None:
    path = directory / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@damage(said=r"model\.nor[mn]\.weight")
def a_renamed_key(directory: Path) -> None:
    """In the file and in the index alike, so that only the model's own names can tell."""
    renamed = "model.norn.weight"
    edit(directory, NORM, lambda t: t.update({renamed: t.pop(NORM)}))
    edit_index(directory, lambda files: files.update({renamed: files.pop(NORM)}))


@damage(said=rf"places {HEAD} in model-00001")
def an_index_that_points_wrong(directory: Path) -> None:
    edit_index(directory, lambda files: files.update({HEAD: "model-00001-of-00003.safetensors"}))


@damage(said=rf"{HEAD} .* is not in the index")
def an_index_that_forgets(directory: Path) -> None:
    edit_index(directory, lambda files: files.pop(HEAD))


@damage(said=r"has no model\.safetensors\.index\.json")
def no_index(directory: Path) -> None:
    (directory / INDEX).unlink()


@damage(said=f"{Q}.weight (has other values|is float16)")
def scales_of_another_dtype(directory: Path) -> None:
    key = f"{Q}.weight_scale"
    edit(directory, key, lambda t: t.update({key: t[key].half()}))


@damage(said="from_pretrained fails|cannot be decoded", kind="asymmetric")
def another_group_size(directory: Path) -> None:
    edit_args(directory, group_size=32)


@damage(said=f"from_pretrained (fails|reports)|{Q}.weight has other values")
def other_bits(directory: Path) -> None:
    edit_args(directory, num_bits=8)


@damage(said="from_pretrained (fails|reports)|cannot be decoded", kind="asymmetric")
def another_symmetry(directory: Path) -> None:
    edit_args(directory, symmetric=True)


@damage(said="config.json has no quantization_config, but model.* is compressed")
def no_quantization_config(directory: Path) -> None:
    edit_config(directory, lambda config: config.pop("quantization_config"))


@damage(said=f"{Q} is stored compressed, but not compressed by config.json")
def a_module_ignored(directory: Path) -> None:
    edit_config(directory, lambda config: config["quantization_config"]["ignore"].append(Q))


@damage(said=f"{Q} is planned to be, but not stored compressed")
def a_module_left_dense(directory: Path) -> None:
    """In file, index and config.json alike, so that only the plan can tell."""
    packed, dense = [f"{Q}.weight{part}" for part in ("_packed", "_scale", "_shape")], f"{Q}.weight"

    def change(tensors: dict[str, Any], value: Any) -> None:
        for key in packed:
            del tensors[key]
        tensors[dense] = value

    edit(directory, packed[0], lambda tensors: change(tensors, torch.zeros(128, 128)))
    edit_index(directory, lambda files: change(files, files[packed[0]]))
    a_module_ignored(directory)


@damage(said="config.json says float16", kind="asymmetric")
def another_model_dtype(directory: Path) -> None:
    edit_config(directory, lambda config: config.update(dtype="float16"))


@damage(said="config.json cannot be read")
def a_damaged_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


@damage(said=r"\w+_proj is planned to be, but not read with inputs rounded by int8-dynamic", kind="activations")
def activations_forgotten(directory: Path) -> None:
    edit_config(directory, lambda config: group_of(config).update(input_activations=None))


@damage(said="reads inputs that are rounded in a way llmcomp does not compute", kind="activations")
def activations_of_fewer_bits(directory: Path) -> None:
    edit_config(directory, lambda config: group_of(config)["input_activations"].update(num_bits=4))


@damage(said="reads inputs that are rounded in a way llmcomp does not compute", kind="activations")
def activations_of_unsigned_integers(directory: Path) -> None:
    edit_config(directory, lambda config: group_of(config)["input_activations"].update(symmetric=False))


@damage(said=f"{Q}.input_scale has other values", kind="static")
def an_input_scale(directory: Path) -> None:
    flip(directory, f"{Q}.input_scale")


@damage(said=f"{Q}.input_scale (has other values|is float16)", kind="static")
def an_input_scale_of_another_dtype(directory: Path) -> None:
    key = f"{Q}.input_scale"
    edit(directory, key, lambda t: t.update({key: t[key].half()}))


@damage(said=f"(missing keys: )?{Q}.input_scale(.$| is in the compressed model, but not in the files)", kind="static")
def no_input_scale(directory: Path) -> None:
    key = f"{Q}.input_scale"
    edit(directory, key, lambda t: t.pop(key))
    edit_index(directory, lambda files: files.pop(key))


@damage(said=r"\w+_proj is read with inputs rounded by int8-dynamic, but not planned to be", kind="static")
def static_ranges_made_dynamic(directory: Path) -> None:
    args = {"strategy": "token", "dynamic": True}
    edit_config(directory, lambda config: group_of(config)["input_activations"].update(args))
