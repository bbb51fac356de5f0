"""Packed checkpoints inside transformers: importing this registers llmcomp's layout with its Auto classes.

    import llmcomp.hf
    model = AutoModelForCausalLM.from_pretrained(directory)

config.json of such a checkpoint names a model type that transformers does not know without this import, because a
quantizer that it does not know is only a warning to it, and it goes on with random weights.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmcomp import native, native_kinds
from llmcomp.errors import BadCheckpoint
from llmcomp.experts import SplitExperts, file_renaming, split_experts
from llmcomp.kinds import Kind, Sparse
from llmcomp.packed import Packed, PackedEmbedding, PackedLinear, looks_up, multiplies, shape_of
from llmcomp.packed_kinds import PackedLowRank, PackedSparse, PackedSparseIntegers
from llmcomp.schemes import Scheme
from llmcomp.shards import read_shard


class PackedConfig(PreTrainedConfig):  # type: ignore[misc]
    """What the model type 'llmcomp' leads to. Made of a config.json, it gives the model's own config class."""

    model_type = native.METHOD

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        own = native.unwrap(config_dict)
        if own["model_type"] not in CONFIG_MAPPING:
            raise BadCheckpoint(
                f"transformers knows no model type '{own['model_type']}', which this packed checkpoint holds; a "
                "newer one may."
            )
        quantization = config_dict.get("quantization_config")
        native.kinds_of(quantization)  # refused here rather than in the middle of loading
        kind = _packed_class(own["model_type"])
        return kind.from_dict({**own, "quantization_config": quantization}, **kwargs)


@functools.cache
def _packed_class(model_type: str) -> Any:
    """The model's config class, of the same name, which Auto classes look models up by; written to a file wrapped."""

    def to_json_file(self: Any, json_file_path: Any, use_diff: bool = True) -> None:
        content = json.loads(self.to_json_string(use_diff))
        wrapped = native.wrap(content, content["quantization_config"])
        Path(json_file_path).write_text(native.to_json(wrapped), encoding="utf-8")

    def reduce(self: Any) -> Any:  # pickle looks classes up by name, and would find the model's own
        return _restored, (model_type, self.__dict__)

    own: Any = CONFIG_MAPPING[model_type]
    added = {"to_json_file": to_json_file, "__reduce__": reduce, "is_packed": True, "__module__": own.__module__}
    return type(own.__name__, (own,), added)


def _restored(model_type: str, state: dict[str, Any]) -> Any:
    kind = _packed_class(model_type)
    config = kind.__new__(kind)
    config.__dict__.update(state)
    return config


@register_quantization_config(native.METHOD)
class LlmcompConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint (`llmcomp.native`)."""

    def __init__(self, version: int, weights: list[dict[str, Any]], **unused: Any) -> None:
        self.quant_method: Any = native.METHOD
        self.version = version
        self.weights = weights

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "version": self.version, "weights": self.weights}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(native.METHOD)
class LlmcompQuantizer(HfQuantizer):
    """Puts packed modules where the config names them, and lets them settle when they are loaded."""

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """What stands before and beside packed weights is: they let gradients pass."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **unused: Any
    ) -> None:
        if not getattr(type(model.config), "is_packed", False):
            raise BadCheckpoint(
                f"A packed checkpoint is opened by transformers' Auto classes or llmcomp.load, not by "
                f"{type(model).__name__}, which would read its config as another model's."
            )
        kinds = native.kinds_of(self.quantization_config.to_dict())
        if any(".experts." in name for name in kinds):
            split_experts(model)
        held = _held(model, checkpoint_files or ())
        for name, kind in _of_this_model(model, kinds).items():
            parts = native.PARTS if isinstance(kind, Scheme) else native_kinds.names_of(kind)
            expected = {part: held[f"{name}.{part}"] for part in parts if f"{name}.{part}" in held}
            main = native_kinds.floating_of(kind)
            if main not in expected:
                raise BadCheckpoint(f"This checkpoint lacks {name}.{main}, which its config.json promises.")
            model.set_submodule(name, _packed(model.get_submodule(name), name, kind, expected))

    def _process_model_after_weight_loading(self, model: Any, **unused: Any) -> None:
        for name, module in model.named_modules():
            if isinstance(module, Packed) and not module.kernel:
                try:
                    module.settle()
                except (BadCheckpoint, RuntimeError, ValueError) as error:
                    raise BadCheckpoint(f"The packed weight of {name} cannot be read: {error}.") from error

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Experts that were taken apart are loaded one by one, as files have them, and not merged."""
        if not any(isinstance(module, SplitExperts) for module in model.modules()):
            return weight_conversions
        return [step for step in weight_conversions if not isinstance(step, WeightConverter)]

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, Packed | PackedLowRank):
                raise BadCheckpoint(f"{name} stays packed; `llmcomp export --format dense` writes dense weights.")
        return model


def config_of(content: Mapping[str, Any]) -> Any:
    """The transformers config for a config.json in llmcomp's layout."""
    return PackedConfig.from_dict(dict(content))


def _place(model: Any) -> Callable[[str], str | None]:
    """The name in `model` of a module of the checkpoint, whose model may be the base of this one or have it as base;
    None for one that `model` does not have."""
    modules, prefix = {name for name, _ in model.named_modules()}, f"{model.base_model_prefix}."

    def place(name: str) -> str | None:
        return next((one for one in (name, prefix + name, name.removeprefix(prefix)) if one in modules), None)

    return place


def _of_this_model(model: Any, kinds: Mapping[str, Kind]) -> dict[str, Kind]:
    """The kinds by names in `model`.

    Raises:
        BadCheckpoint: the very model that was saved lacks one of the modules.
    """
    place, found = _place(model), {}
    for name, kind in kinds.items():
        here = place(name)
        if here is not None:
            found[here] = kind
        elif type(model).__name__ in (model.config.architectures or ()):
            raise BadCheckpoint(f"config.json names {name} as packed, which {type(model).__name__} does not have.")
    return found


def _held(model: Any, files: Sequence[str]) -> dict[str, Tensor]:
    """{tensor: itself on meta} of the files, by names in `model`."""
    place, held = _place(model), {}
    rename = functools.cache(lambda: file_renaming(model))  # takes its time, and most files have the model's names

    def here(key: str) -> str | None:
        module, _, part = key.rpartition(".")
        if (found := place(module)) is not None:
            return f"{found}.{part}"
        whole, _, factor = module.rpartition(".")  # of a low-rank weight, whose parts are not there yet
        found = place(whole) if factor in native_kinds.PARTS else None
        return None if found is None else f"{found}.{factor}.{part}"

    for file in files:
        for key, info in read_shard(Path(file)).tensors.items():
            if (name := here(key) or here(rename()(key))) is not None:
                held[name] = torch.empty(info.shape, dtype=info.dtype, device="meta")
    return held


def _packed(replaced: Any, name: str, kind: Kind, expected: Mapping[str, Tensor]) -> nn.Module:
    if looks_up(replaced):
        if isinstance(kind, Scheme):
            return PackedEmbedding(replaced, kind, expected)
        raise BadCheckpoint(f"config.json says {kind.label} of {name}, which looks rows up; only integers are read so.")
    if not multiplies(replaced):
        raise BadCheckpoint(
            f"config.json names {name} as packed, a {type(replaced).__name__}, which no packed module stands in for."
        )
    if isinstance(kind, Scheme):
        return PackedLinear(replaced, kind, expected)
    try:
        native_kinds.check_headers(expected, kind, shape_of(replaced)[1:])
    except BadCheckpoint as error:
        raise BadCheckpoint(f"The packed weight of {name} cannot be read: {error}.") from error
    if isinstance(kind, Sparse):
        return (PackedSparse if kind.values is None else PackedSparseIntegers)(replaced, kind, expected)
    return PackedLowRank(replaced, kind, expected)


AutoConfig.register(native.METHOD, PackedConfig)
