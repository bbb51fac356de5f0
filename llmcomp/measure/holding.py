"""What a loaded model holds in tensors: all of it, its blocks alone, and what one new token has to read.

Parameters and buffers are not all: kernels keep weights that they have laid out anew, and scales, as plain
attributes of a module or of a parameter (bitsandbytes' quant_state, gptqmodel after its first forward), and
tensor subclasses hold theirs inside. So tensors are looked for in whatever a module refers to. Each address
counts once, which makes tied weights one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 6  # the parameters → one → its quant_state → a nested one → tensor, and some more
# Config fields that tell of experts, of which a token reads only some.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Holding:
    """Bytes.

    Attributes:
        tensors: of all parameters and buffers, and of what modules keep beside them.
        blocks: of those in the model's blocks; None where a runtime does not tell.
        read: of the weights that one new token of a language model reads; None where that cannot be told.
    """

    tensors: int
    blocks: int | None
    read: int | None


def holding(model: nn.Module) -> Holding:
    """The bytes of a model in memory.

    Blocks are the outermost `nn.ModuleList`s, which is how transformers keep them. A new token reads all weights but
    those of tables that are only looked up in; a table that the head multiplies with, too, is read. Of a mixture of
    experts it reads a part, which depends on the token: None.
    """
    modules = dict(model.named_modules())
    blocks = [module for name, module in modules.items() if _is_outermost_list(name, module, modules)]
    tables = _tables(model)
    read = _bytes(tensor for module in modules.values() if module not in tables for tensor in _own(module))
    inside = (tensor for block in blocks for module in block.modules() for tensor in _own(module))
    everything = (tensor for module in modules.values() for tensor in _own(module))
    return Holding(_bytes(everything), _bytes(inside), None if _has_experts(model) else read)


def _is_outermost_list(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> bool:
    parts = name.split(".")
    above = (modules[".".join(parts[:end])] for end in range(len(parts)))
    return isinstance(module, nn.ModuleList) and not any(isinstance(one, nn.ModuleList) for one in above)


def _tables(model: nn.Module) -> set[nn.Module]:
    tables = {module for module in model.modules() if isinstance(module, nn.Embedding)}
    find = getattr(model, "get_input_embeddings", None)
    found = find() if find is not None else None
    return tables | ({found} if isinstance(found, nn.Module) else set())


def _has_experts(model: Any) -> bool:
    config = getattr(model, "config", None)
    if config is None:
        return False
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return any((getattr(text, name, None) or 0) > 1 for name in _EXPERTS)


def _own(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that a module refers to, without those of the modules in it."""
    seen: set[int] = set()
    for value in vars(module).values():
        yield from _reachable(value, _DEPTH, seen)


def _reachable(value: Any, depth: int, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, nn.Module | type) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        names = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
        for name in names:
            yield from _reachable(getattr(value, name), depth, seen)
        if not names:
            yield value
    if depth == 0:
        return
    for inner in _inside(value):
        yield from _reachable(inner, depth - 1, seen)


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple):
        return value
    return list(getattr(value, "__dict__", {}).values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Each address once, at the most that is seen of it."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_meta:
            continue
        address = tensor.data_ptr()
        sizes[address] = max(sizes.get(address, 0), tensor.numel() * tensor.element_size())
    return sum(sizes.values())
