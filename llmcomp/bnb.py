"""What bitsandbytes keeps for one weight [out, in] in a checkpoint of transformers: names, bytes, and the way back.

nf4 (Dettmers et al., 2023, arXiv:2305.14314): the flattened matrix in blocks of 64, each divided by its largest
absolute value (float32), each quotient the nearest of 16 quantiles of a normal distribution; no double
quantization. int8 (Dettmers et al., 2022, arXiv:2208.07339): each row, in float16, over its largest absolute value
(float32, `SCB`) times 127. bitsandbytes itself is imported only where something is encoded or decoded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

QUANT_METHOD = "bitsandbytes"
_STATE = ".weight.quant_state.bitsandbytes__"
# What is stored beside a weight; ends of tensor names.
BESIDE = (
    ".weight.absmax",
    ".weight.quant_map",
    ".weight.nested_absmax",
    ".weight.nested_quant_map",
    *(_STATE + kind for kind in ("nf4", "fp4")),
    ".SCB",
    ".weight_format",
)
_NF4_PARTS = ("weight", *(end[1:] for end in BESIDE if end.startswith(".weight.")))
_INT8_PARTS = ("weight", "SCB", "weight_format")
BLOCK = 64


@dataclass(frozen=True)
class Kind:
    """One of the grids that bitsandbytes has.

    Attributes:
        name: 'nf4' or 'int8'; label: as the report shows it.
        tolerance: of outputs, root mean square over their standard deviation, between bitsandbytes' own kernels
            and products with the decoded weight. int8 rounds each row of the input to 8 bits as well (0.01–0.03
            on models of two blocks); nf4 may be computed in bfloat16 (on a CPU with AVX512-BF16).
    """

    name: str
    label: str
    tolerance: float


NF4 = Kind("nf4", "nf4 g64", 5e-2)
INT8 = Kind("int8", "int8 row", 0.2)


@dataclass(frozen=True)
class Stored:
    """One weight as it lies in a file; decodes to [out, in], or [in, out] for a Conv1D.

    Attributes:
        kind: its grid. dtype: of the dense weight. transposed: the module is a Conv1D.
    """

    kind: Kind
    dtype: torch.dtype
    transposed: bool = False

    @property
    def tolerance(self) -> float:
        return self.kind.tolerance

    def names(self, module: str) -> list[str]:
        """Full names of the tensors that it may have."""
        parts = _INT8_PARTS if self.kind.name == "int8" else _NF4_PARTS
        return [f"{module}.{part}" for part in parts]

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The dense weight, by bitsandbytes; `tensors` by their names within the module."""
        from bitsandbytes import functional

        weight = tensors["weight"]
        if self.kind.name == "int8":
            dense = functional.int8_vectorwise_dequant(weight, tensors["SCB"])
        else:
            beside = {name: tensor for name, tensor in tensors.items() if name != "weight"}
            state = functional.QuantState.from_dict(beside, device=weight.device)
            # As one row: bitsandbytes 0.50 decodes others wrongly with AVX512, if blocks run on over rows; and a weight
            # of one or two elements comes out transposed, since its one byte looks like a packed row.
            shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
            dense = functional.dequantize_4bit(weight, state).reshape(shape)
        return _turned(dense.to(self.dtype), self.transposed)


def encode(kind: Kind, weight: Tensor) -> dict[str, Tensor]:
    """What is stored of a weight [out, in], by names within the module."""
    from bitsandbytes import functional

    if kind.name == "int8":
        values, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return {"weight": values, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    packed, state = functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return {"weight": packed, **{f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}}


def is_bnb(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a bitsandbytes checkpoint."""
    found = config.get("quantization_config")
    return isinstance(found, Mapping) and found.get("quant_method") == QUANT_METHOD


def placement(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of from_pretrained that keep a bitsandbytes model on the CPU; other models stay there anyway."""
    return {"device_map": {"": "cpu"}} if is_bnb(config) else {}


def modules(names: Iterable[str]) -> dict[str, Kind]:
    """The quantized modules among a checkpoint's tensor names."""
    found = {}
    for name in names:
        if name.endswith(".SCB"):
            found[name.removesuffix(".SCB")] = INT8
        elif name.endswith(f"{_STATE}nf4"):
            found[name.removesuffix(f"{_STATE}nf4")] = NF4
    return found


def weight_shape(name: str, names: Iterable[str], read: Callable[[str], Tensor]) -> list[int] | None:
    """The shape of the 4-bit weight behind the tensor `name`, None where it is no such weight.

    Args:
        names: of all tensors. read: a tensor by its name.
    """
    states = [name.removesuffix(".weight") + _STATE + kind for kind in ("nf4", "fp4")]
    state = next((one for one in states if one in names), None)
    if state is None or not name.endswith(".weight"):
        return None
    shape: list[int] = json.loads(bytes(read(state).tolist()))["shape"]
    return shape


def holds(module: nn.Module) -> bool:
    """Whether a loaded model's module computes with a weight of bitsandbytes."""
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def dense_of(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a loaded module as its dense original holds it. Before any forward: on some CPUs that lays
    4-bit weights out anew."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight
    from transformers.pytorch_utils import Conv1D

    dense: Tensor = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).detach()
    return _turned(dense.to(dtype), issubclass(getattr(module, "source_cls", nn.Linear), Conv1D))


def convertible(model: nn.Module) -> dict[str, bool]:
    """{name of a module that transformers would quantize: whether it is a Conv1D, which holds [in, out]}; without
    those that it keeps in float32 (T5's `wo`)."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = list(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }


def silence() -> None:
    """Keep bitsandbytes from saying in each forward of each int8 layer that it casts the input, for the process."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _turned(weight: Tensor, transposed: bool) -> Tensor:
    return weight.t().contiguous() if transposed else weight
