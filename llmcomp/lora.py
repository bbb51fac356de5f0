"""LoRA by peft on every linear that llmcomp knows, and adapters that lie beside packed weights.

    <checkpoint>/adapter/adapter_config.json, adapter_model.safetensors     as peft writes them

peft knows `nn.Linear` and Conv1D. Packed modules are named to it by its own facility for others' modules, which its
files do not hold, so whoever opens an adapter by peft itself gives it `adapter_config`:

    model = llmcomp.load(directory, adapter=False)
    PeftModel.from_pretrained(model, f"{directory}/adapter", config=llmcomp.lora.adapter_config(f"{directory}/adapter"))

`llmcomp.load(directory)` does the same. Where weights are removed by a mask M, the factors act under it,
(W + s B A) ∘ M, in training as when they are merged, so that a sparse checkpoint stays as sparse as it was and computes
what was trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from llmcomp.errors import BadCheckpoint
from llmcomp.packed import PackedLinear
from llmcomp.packed_kinds import PackedLowRank, PackedSparse
from llmcomp.shards import read_json_object

FOLDER = "adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of names in peft's files


def beside(directory: str | Path) -> Path | None:
    """The adapter that lies beside a checkpoint's weights."""
    folder = Path(directory) / FOLDER
    return folder if (folder / CONFIG).is_file() else None


def wrap(
    model: nn.Module, names: Sequence[str], *, rank: int, alpha: float, dropout: float, task: str | None,
    masks: Mapping[str, Tensor] | None = None,
) -> Any:
    """peft's model around `model`, factors beside the modules of these names; they alone are trained.

    Args:
        task: peft's name of the task, such as 'CAUSAL_LM'.
        masks: {name: bool of the weight's shape}, under which the factors act.
    """
    from peft import LoraConfig, get_peft_model

    scaled: Any = alpha  # peft divides it by the rank, so that it need not be whole, as its annotation says
    config = LoraConfig(r=rank, lora_alpha=scaled, lora_dropout=dropout, target_modules=list(names), task_type=task)
    _register(config)
    under = {model.get_submodule(name): mask for name, mask in (masks or {}).items() if name in set(names)}
    if under:
        custom: dict[Any, Any] = {kind: _masked(under) for kind in {type(module) for module in under}}
        config._register_custom_module(custom)
    with _unwarned():
        return get_peft_model(model, config)


def save(wrapped: Any, folder: Path) -> None:
    """Write the adapter of `wrap`'s model as peft does."""
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a model card without content
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors makes files of mode 0600


def adapter_config(directory: str | Path) -> Any:
    """peft's config of an adapter, with what peft must know of packed modules.

    Raises:
        BadCheckpoint: no adapter there.
    """
    from peft import PeftConfig

    if not (Path(directory) / CONFIG).is_file():
        raise BadCheckpoint(f"{directory} holds no {CONFIG}; expected the folder of an adapter.")
    read_json_object(Path(directory) / CONFIG)
    config = PeftConfig.from_pretrained(str(directory))
    config.inference_mode = True
    _register(config)
    return config


def attach(model: nn.Module, directory: Path) -> None:
    """Put an adapter on a model's modules, in place.

    Raises:
        BadCheckpoint: an adapter that is not whole, or of another model.
    """
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    if not (directory / WEIGHTS).is_file():
        raise BadCheckpoint(f"{directory} has no {WEIGHTS}; copy or download it again.")
    held = {name.removeprefix(_PREFIX): value for name, value in load_file(directory / WEIGHTS).items()}
    try:
        with _unwarned():
            inject_adapter_in_model(adapter_config(directory), model)
        for name, value in model.named_parameters():
            if ".lora_" in name:  # in the dtype that they were trained in, whatever that of the weights
                value.data = value.data.float()
        found: Any = set_peft_model_state_dict(model, held)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadCheckpoint(f"The adapter in {directory} does not fit the weights beside it: {reason}") from error
    lacking = [name for name in found.missing_keys if ".lora_" in name]
    if found.unexpected_keys or lacking:
        raise BadCheckpoint(
            f"The adapter in {directory} does not fit the weights beside it, such as at "
            f"{[*found.unexpected_keys, *lacking][0]}."
        )
    model.requires_grad_(False)
    model.eval()


def factors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors in a model that has one, by names that wrapping does not change."""
    found = {name.removeprefix(_PREFIX): value.detach() for name, value in model.named_parameters()}
    return {name: value for name, value in found.items() if ".lora_" in name}


@contextmanager
def _unwarned() -> Iterator[None]:
    """peft warns of layers that it does not know, which it has just been told of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")
        yield


def _register(config: Any) -> None:
    from peft.tuners.lora import Linear

    config._register_custom_module(dict.fromkeys((PackedLinear, PackedSparse, PackedLowRank), Linear))


def _masked(masks: Mapping[nn.Module, Tensor]) -> Callable[..., nn.Module]:
    """What peft calls for a module of a type that some of `masks` have."""
    from peft.tuners.lora import Linear

    class MaskedLinear(Linear):  # type: ignore[misc]
        """peft's, whose factors act under a mask."""

        mask: Tensor

        def get_delta_weight(self, adapter: str) -> Tensor:
            delta: Tensor = super().get_delta_weight(adapter)
            return delta * self.mask.to(delta)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters or self.merged:
                plain: Tensor = super().forward(x, *args, **kwargs)
                return plain
            out: Tensor = self.base_layer(x, *args, **kwargs)
            for adapter in self.active_adapters:
                read, delta = self.lora_dropout[adapter](x), self.get_delta_weight(adapter)
                out = out + F.linear(read, (delta.t() if self.fan_in_fan_out else delta).to(read.dtype))
            return out

    def make(target: nn.Module, adapter: str, config: Any, **settings: Any) -> nn.Module:
        turned = type(target).__name__ == "Conv1D"
        config.fan_in_fan_out = turned
        if target not in masks:
            return Linear(target, adapter, config=config, is_target_conv_1d_layer=turned, **settings)
        made = MaskedLinear(target, adapter, config=config, is_target_conv_1d_layer=turned, **settings)
        made.register_buffer("mask", masks[target], persistent=False)
        return made

    return make
