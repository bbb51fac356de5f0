"""A written checkpoint as its readers see it: which tensors, which of them compressed, each decoded on demand.

Nothing of llmcomp decodes here: schemes are resolved and weights decompressed by compressed-tensors itself, or by
bitsandbytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llmcomp import bnb, native, native_kinds
from llmcomp.errors import BadCheckpoint, LlmcompError, VerificationFailed
from llmcomp.experts import file_renaming, split_experts
from llmcomp.formats.save import INDEX
from llmcomp.kinds import Kind, LowRank, integers_of, without_inputs
from llmcomp.schemes import INT8_DYNAMIC, INT8_STATIC
from llmcomp.weights import INPUT_SCALE

_AUTO = (
    "ForCausalLM",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForSeq2SeqLM",
    "ForSpeechSeq2Seq",
    "ForImageClassification",
    "ForImageTextToText",
    "",
)
_PARTS = ("", "_packed", "_scale", "_shape", "_zero_point")
# Of input activations, by what a scale is for and whether it is made when the input is there.
_ROUNDING = {("token", True): INT8_DYNAMIC, ("tensor", False): INT8_STATIC}


class Stored(Protocol):
    """How one weight lies in the files, and the way back.

    Attributes:
        tolerance: by how much the reader's own kernels may differ from products with the decoded weight, root
            mean square over the outputs' standard deviation; 0 where it computes with the decoded weight.
    """

    @property
    def tolerance(self) -> float: ...

    def names(self, module: str) -> list[str]:
        """Full names of the tensors that it may have."""

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The dense weight as the module holds it; `tensors` by their names within the module."""


@dataclass(frozen=True)
class Packed:
    """`Stored` of compressed-tensors: the scheme and format that it resolves for a module."""

    scheme: Any
    format: Any
    tolerance: float = 0.0

    def names(self, module: str) -> list[str]:
        return [f"{module}.weight{part}" for part in _PARTS]

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        from compressed_tensors.compressors import BaseCompressor

        decoder = BaseCompressor.get_value_from_registry(getattr(self.format, "value", self.format))
        dense: Tensor = decoder.decompress(dict(tensors), self.scheme)["weight"]
        return dense


@dataclass(frozen=True)
class Native:
    """`Stored` of llmcomp's own layout, whose readers compute with what is packed (`llmcomp.packed`)."""

    kind: Kind
    transposed: bool

    @property
    def tolerance(self) -> float:
        """Of integers: scales are rounded to bf16, inputs to bf16 or int8, and on a CPU with units for bf16 the result
        of each part, too: what a checkpoint in bf16 is allowed. Of floating numbers hardly any, since two products come
        in another order than one."""
        kind = self.kind
        parts = (kind.left, kind.right, kind.base) if isinstance(kind, LowRank) else (integers_of(kind),)
        return 1e-5 if all(part is None for part in parts) else 5e-2

    def names(self, module: str) -> list[str]:
        return [f"{module}.{part}" for part in native_kinds.names_of(self.kind) if part != INPUT_SCALE]

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        dense = native_kinds.from_tensors(tensors, without_inputs(self.kind)).dense()
        return dense.t().contiguous() if self.transposed else dense


class Place(NamedTuple):
    """Where a tensor lies: its file, and what it is called there."""

    path: Path
    key: str


def stored_tensors(directory: Path) -> dict[str, Place]:
    """{tensor name in the model: its place}, after comparing the index with what the files hold."""
    held = _held(directory)
    # Files of other models have the model's own names; but transformers, which writes those of bitsandbytes, may write
    # a model's older ones (ViT).
    if not any(".experts." in key for key in held) and not bnb.is_bnb(config_of(directory)):
        return {key: Place(path, key) for key, path in held.items()}
    rename = file_renaming(skeleton_of(directory))
    return {rename(key): Place(path, key) for key, path in held.items()}


def _held(directory: Path) -> dict[str, Path]:
    present = sorted(directory.glob("*.safetensors"))
    held: dict[str, Path] = {}
    for path in present:
        try:
            with safe_open(path, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118 (not a dict)
                    if key in held:
                        raise VerificationFailed(f"{key} stands in both {held[key].name} and {path.name}.")
                    held[key] = path
        except (SafetensorError, OSError) as error:
            raise VerificationFailed(f"{path.name} is not a whole safetensors file: {error}.") from error
    index = directory / INDEX
    if not index.is_file():
        if [path.name for path in present] != ["model.safetensors"]:
            raise VerificationFailed(f"{directory} has no {INDEX} and not exactly one model.safetensors.")
        return held
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise VerificationFailed(f"{INDEX} is not an index: {error}.") from error
    for key, name in sorted(listed.items()):
        if not (directory / name).is_file():
            raise VerificationFailed(f"Shard {name}, which should hold {key}, is missing.")
        if key not in held or held[key].name != name:
            where = held[key].name if key in held else "no file"
            raise VerificationFailed(f"The index places {key} in {name}, but {where} holds it.")
    if extra := sorted(set(held) - set(listed)):
        raise VerificationFailed(f"{extra[0]} in {held[extra[0]].name} is not in the index.")
    return held


def stored_modules(directory: Path, tensors: Iterable[str]) -> dict[str, Stored]:
    """The modules stored compressed, as the reader resolves them."""
    if bnb.is_bnb(config_of(directory)):
        return _stored_by_bnb(directory, tensors)
    if native.is_native(config_of(directory)):
        return _stored_by_us(directory, tensors)
    scaled = sorted(key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale"))
    config = config_of(directory).get("quantization_config")
    if not scaled and config is None:
        return {}
    if config is None:
        raise VerificationFailed(f"config.json has no quantization_config, but {scaled[0]} is compressed.")
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_targets

    try:
        parsed = QuantizationConfig.model_validate(config)
        modules = dict(skeleton_of(directory).named_modules())
        groups = list(parsed.config_groups.values())
    except (ValueError, KeyError, AttributeError) as error:
        raise VerificationFailed(f"config.json cannot be read: {first_line(error)}") from error
    by_target = {target: group for group in groups for target in group.targets}
    found: dict[str, Any] = {}
    for name, module in modules.items():
        targets = match_targets(name, module, list(by_target))
        if targets and not match_targets(name, module, parsed.ignore or []):
            found[name] = groups[0] if config.get("dequantize") else by_target[targets[0]]
    require_same(set(found), set(scaled), "compressed by config.json", "stored compressed")
    return {name: Packed(scheme, scheme.format or parsed.format) for name, scheme in found.items()}


def _stored_by_bnb(directory: Path, tensors: Iterable[str]) -> dict[str, Stored]:
    """The modules that transformers fills with weights of bitsandbytes, compared with those that are stored so."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = config_of(directory)
    settings = config["quantization_config"]
    kind = bnb.NF4 if settings.get("load_in_4bit") else bnb.INT8
    held = {name for name, one in bnb.modules(tensors).items() if one is kind}
    skip = settings.get("llm_int8_skip_modules") or []
    plain = bnb.convertible(skeleton_of(directory))
    quantized = {name for name in plain if should_convert_module(name, skip)}
    require_same(quantized, held, "compressed by config.json", f"stored as {kind.name}")
    dtype = getattr(torch, str(config.get("dtype") or "float32"))
    return {name: bnb.Stored(kind, dtype, plain[name]) for name in sorted(held)}


def _stored_by_us(directory: Path, tensors: Iterable[str]) -> dict[str, Stored]:
    """The modules that config.json names, compared with those that have packed tensors."""
    kinds, held = native.kinds_of(config_of(directory).get("quantization_config")), set(tensors)
    packed = {name for name, kind in kinds.items() if f"{name}.{native_kinds.main_of(kind)}" in held}
    promised = {f"{name}.{part}" for name, kind in kinds.items() for part in native_kinds.names_of(kind)}
    packed |= {key.rpartition(".")[0] for key in held - promised if key.endswith(native_kinds.MARKS)}
    require_same(set(kinds), packed, "compressed by config.json", "stored compressed")
    modules = dict(skeleton_of(directory).named_modules())
    require_same(packed, packed & set(modules), "stored compressed", "a module of the model")
    return {name: Native(kind, type(modules[name]).__name__ == "Conv1D") for name, kind in kinds.items()}


def rounding(stored: Mapping[str, Stored]) -> dict[str, str]:
    """{module whose inputs the reader rounds: how}, as in `llmcomp.schemes.ACTIVATIONS`.

    Raises:
        VerificationFailed: inputs that are rounded in another way.
    """
    found = {}
    for name, one in stored.items():
        if isinstance(one, Native) and (scheme := integers_of(one.kind)) is not None and scheme.activations is not None:
            found[name] = scheme.activations
        args = one.scheme.input_activations if isinstance(one, Packed) else None
        if args is None:
            continue
        way = _ROUNDING.get((args.strategy, args.dynamic))
        if way is None or not args.symmetric or (args.num_bits, args.type) != (8, "int"):
            raise VerificationFailed(f"{name} reads inputs that are rounded in a way llmcomp does not compute: {args}.")
        found[name] = way
    return found


def config_of(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VerificationFailed(f"config.json cannot be read: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise VerificationFailed("config.json is not an object.")
    return config


def auto_class(config: Any) -> Any:
    """The Auto class whose table leads from this config to its architecture, else the class itself."""
    import transformers

    architecture = (config.architectures or [""])[0]
    for task in _AUTO:
        auto = getattr(transformers, f"AutoModel{task}")
        found = auto._model_mapping.get(type(config), None)
        if found is not None and getattr(found, "__name__", "") == architecture:
            return auto
    found = getattr(transformers, str(architecture), None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise VerificationFailed(f"transformers has no model class for architecture '{architecture}'.")
    return found


def model_config(directory: Path) -> Any:
    """The transformers config of the model in a directory, of one in llmcomp's own layout the model's own."""
    from transformers import CONFIG_MAPPING, AutoConfig

    config = config_of(directory)
    if not native.is_native(config):
        return AutoConfig.from_pretrained(directory)
    own = native.unwrap(config)
    if own["model_type"] not in CONFIG_MAPPING:
        raise BadCheckpoint(f"transformers knows no model type '{own['model_type']}', which {directory} holds.")
    return CONFIG_MAPPING[own["model_type"]].from_dict(own)


def skeleton_of(directory: Path) -> nn.Module:
    """The model without weights, experts apart, as files have them."""
    try:
        config = model_config(directory)
        auto = auto_class(config)
        with torch.device("meta"):
            model = auto.from_config(config) if hasattr(auto, "from_config") else auto(config)
    except LlmcompError:
        raise
    except Exception as error:  # a config may hold anything, and its class raise anything
        raise VerificationFailed(f"config.json makes no model: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise VerificationFailed(f"{auto.__name__} made no model from config.json.")
    split_experts(model)
    return model


def decoded_weight(name: str, tensors: dict[str, Place], stored: Mapping[str, Stored]) -> Tensor:
    """The dense weight of a module that is stored compressed."""
    parts = [full for full in stored[name].names(name) if full in tensors]
    state = {full.removeprefix(f"{name}."): stored_tensor(tensors[full]) for full in parts}
    try:
        return stored[name].decode(state)
    except (RuntimeError, ValueError, KeyError, AssertionError, IndexError) as error:
        raise VerificationFailed(f"{name}.weight cannot be decoded: {first_line(error)}") from error


def decoded(tensors: dict[str, Place], stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the files, dense, one at a time."""
    for name in stored:
        yield f"{name}.weight", decoded_weight(name, tensors, stored)
    packed = {full for name, one in stored.items() for full in one.names(name)}
    for name, place in tensors.items():
        if name not in packed:
            yield name, stored_tensor(place)


def stored_tensor(place: Place) -> Tensor:
    with safe_open(place.path, framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(place.key)
    return tensor


def require_same(found: set[str], wanted: set[str], here: str, there: str) -> None:
    if extra := sorted(found - wanted):
        raise VerificationFailed(f"{extra[0]} is {here}, but not {there} ({len(extra)} such).")
    if absent := sorted(wanted - found):
        raise VerificationFailed(f"{absent[0]} is {there}, but not {here} ({len(absent)} such).")


def first_line(error: BaseException) -> str:
    """The first telling line of an exception's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
