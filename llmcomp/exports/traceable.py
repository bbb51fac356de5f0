"""A checkpoint as a model that torch can trace: packed weights as `packed_modules`, everything else in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from llmcomp.errors import BadCheckpoint, UnknownArchitecture
from llmcomp.exports.packed_modules import NBitsEmbedding, NBitsLinear, Read, RoundedLinear
from llmcomp.feeds import IDS, composite, encoder_decoder, main_input
from llmcomp.formats.opening import Opened
from llmcomp.formats.reading import auto_class, model_config
from llmcomp.schemes import Scheme

Choose = Callable[[Scheme], Callable[[Read, Tensor | None], nn.Module]]


def require_known(opened: Opened, target: str) -> None:
    """Refuse models that `target` ('ONNX') is not written for here.

    Raises:
        UnknownArchitecture: an encoder-decoder, a model of several, one that reads no text, or a mixture of experts.
        BadRecipe: weights that are no integers on a grid.
    """
    opened.require_integers(target)
    model, problem = opened.skeleton, None
    if encoder_decoder(model):
        problem = "is an encoder-decoder"
    elif composite(model) or main_input(model) != IDS:
        problem = f"reads {'images as well as text' if composite(model) else main_input(model)}"
    elif any(".experts." in name for name in opened.tensors):
        problem = "is a mixture of experts, whose routing is no graph of fixed products"
    if problem:
        raise UnknownArchitecture(
            f"{type(model).__name__} {problem}; llmcomp writes {target} of encoders such as BERT and decoders such as "
            "Llama."
        )


@torch.no_grad()
def traceable(opened: Opened, choose: Choose) -> tuple[nn.Module, list[str]]:
    """The model on the CPU in eval mode, attention as plain products, and the packed modules that had to be dense.

    Args:
        choose: the packed module for linears of a scheme.

    Raises:
        BadCheckpoint: the files lack a parameter of the model.
    """
    model = _empty(opened)
    dense = []
    for name in opened.schemes:
        if (packed := _packed(opened, name, model.get_submodule(name), choose)) is None:
            dense.append(name)
            ref, weight = opened.ref(name), opened.weight(name).dense()
            _put(model, f"{name}.weight", weight.t().contiguous() if ref.transposed else weight)
        else:
            model.set_submodule(name, packed)
    for name in opened.plain:
        _put(model, name, opened.tensor(name))
    ties = model.all_tied_weights_keys if getattr(model.config, "tie_word_embeddings", False) else {}
    for target, source in ties.items():
        _tie(model, target, source)
    _require_whole(model, opened)
    return model.requires_grad_(False).eval(), dense


def _empty(opened: Opened) -> Any:
    """The model without parameters; buffers, which no file holds (rotary frequencies), are computed."""
    config = model_config(opened.directory)
    auto: Any = auto_class(config)
    make = auto.from_config if hasattr(auto, "from_config") else auto._from_config
    with init_empty_weights(include_buffers=False):
        return make(config, dtype=torch.float32, attn_implementation="eager")


def _packed(opened: Opened, name: str, module: nn.Module, choose: Choose) -> nn.Module | None:
    """What stands for a packed module, None for one that computes more than a product or a look-up."""

    def read() -> Any:
        return opened.quantized(name)

    if type(module) is nn.Embedding:
        return NBitsEmbedding(read)
    if type(module) is not nn.Linear and type(module).__name__ != "Conv1D":
        return None
    key = f"{name}.bias"
    bias = opened.tensor(key).float() if key in opened.tensors else None
    return choose(opened.schemes[name])(read, bias)


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer; names that the model has no place for (old position ids) are left out."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return
    value = value.float() if value.is_floating_point() else value
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    elif leaf in module._buffers:
        module._buffers[leaf] = value


def _tie(model: nn.Module, target: str, source: str) -> None:
    """Give `target`, a parameter that the files do not hold, the value of `source`."""
    to, leaf = target.rpartition(".")[::2]
    held = model.get_submodule(source.rpartition(".")[0])
    module = model.get_submodule(to)
    if isinstance(held, NBitsEmbedding):
        if isinstance(module, nn.Linear):
            bias = None if module.bias is None else module.bias.detach()
            model.set_submodule(to, NBitsLinear(held.read, bias, held.blocks))
    elif leaf in module._parameters:
        module._parameters[leaf] = held._parameters[source.rpartition(".")[2]]


def _require_whole(model: Any, opened: Opened) -> None:
    pooler = getattr(model.base_model, "pooler", None)
    if model.base_model is model and pooler is not None and any(p.is_meta for p in pooler.parameters()):
        model.pooler = None  # hidden states, which are what a bare encoder is for, come before it
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing:
        raise BadCheckpoint(
            f"{opened.directory} lacks {len(missing)} weights that {type(model).__name__} has, such as {missing[0]}."
        )


def choose_fastest(encoder: bool) -> Choose:
    """Products of integers for 8-bit weights of one scale a row, where inputs are rounded anyway or come in many rows
    (encoders); there they are faster than MatMulNBits, which is faster for one token (evals/onnx_check.py)."""

    def choose(scheme: Scheme) -> Callable[[Read, Tensor | None], nn.Module]:
        rows = scheme.bits == 8 and scheme.group_size is None
        return RoundedLinear if rows and (encoder or scheme.activations is not None) else NBitsLinear

    return choose
