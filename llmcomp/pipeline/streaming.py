"""A model too large for memory: each block is read when the forward comes to it and forgotten after it.

Evaluation runs such a model like any other. Every forward reads all blocks again, so it wants large batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmcomp.activations import quantize_inputs, quantized
from llmcomp.adapters.base import Adapter
from llmcomp.adapters.discover import discover, skeleton
from llmcomp.checkpoint import Checkpoint, bind
from llmcomp.formats.reading import decoded_weight, rounding, stored_modules, stored_tensor, stored_tensors
from llmcomp.pipeline.memory import return_freed_memory
from llmcomp.pipeline.residency import Residency, Values
from llmcomp.schemes import INT8_STATIC
from llmcomp.weights import INPUT_SCALE


class DecodedValues:
    """`Values` of a compressed checkpoint, decoded one at a time as a reader would.

    Raises:
        VerificationFailed: files and config.json do not agree.
    """

    def __init__(self, directory: Path, model: Any) -> None:
        self._tensors = stored_tensors(directory)
        self._stored = stored_modules(directory, self._tensors)
        ties = dict(model.all_tied_weights_keys)
        self.key_of: dict[str, str] = {}
        for name in model.state_dict():
            for key in (name, ties.get(name), *(target for target, source in ties.items() if source == name)):
                if key in self._tensors or (key or "").removesuffix(".weight") in self._stored:
                    self.key_of[name] = str(key)
                    break

    def rounding(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        """Names of the linears whose inputs are rounded, and how."""
        for name, way in rounding(self._stored).items():
            static = way == INT8_STATIC
            scale = stored_tensor(self._tensors[f"{name}.{INPUT_SCALE}"]) if static else None
            yield name, partial(quantized, scale=scale)

    def tensor(self, name: str) -> Tensor:
        key = self.key_of[name]
        module = key.removesuffix(".weight")
        if key.endswith(".weight") and module in self._stored:
            return decoded_weight(module, self._tensors, self._stored)
        return stored_tensor(self._tensors[key])


def open_streamed(directory: Path) -> tuple[nn.Module, Callable[[], Iterator[Tensor]]]:
    """The model in `directory`, dense or compressed, and a walk through its parameters.

    Its parameters outside of the blocks are in memory (mapped, where they are stored dense), a block's only
    while its forward runs.

    Raises:
        BadCheckpoint, UnknownArchitecture, VerificationFailed: what cannot be opened.
    """
    checkpoint = Checkpoint.open(directory)
    model: Any = skeleton(directory)
    values: Values = bind(checkpoint, model) if checkpoint.quantization is None else DecodedValues(directory, model)
    _stream(discover(model), values, checkpoint.release)
    if isinstance(values, DecodedValues):
        for name, rounded in values.rounding():
            quantize_inputs(model.get_submodule(name), rounded)

    def parameters() -> Iterator[Tensor]:
        named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        once = {key: name for name, key in values.key_of.items() if name in named}  # of those that share a tensor
        for name in once.values():
            yield values.tensor(name)

    return model, parameters


@contextmanager
def streamed(adapter: Adapter, values: Values, release: Callable[[], None]) -> Iterator[None]:
    """While it lasts, the adapter's model computes with `values`, of its blocks one at a time.

    Args:
        release: called when a block has been forgotten.
    """
    params, handles = _stream(adapter, values, release)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        params.release(params.outside)


def _stream(
    adapter: Adapter, values: Values, release: Callable[[], None]
) -> tuple[Residency, list[RemovableHandle]]:
    params, handles = Residency(adapter, values), list[RemovableHandle]()
    params.read(params.outside)
    for block in adapter.blocks:
        module, names = adapter.model.get_submodule(block.name), params.inside(block.name)
        handles.append(module.register_forward_pre_hook(_reading(params, names)))
        handles.append(module.register_forward_hook(_forgetting(params, names, release), always_call=True))
    return params, handles


def _reading(params: Residency, names: list[str]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        params.read(names)

    return hook


def _forgetting(params: Residency, names: list[str], release: Callable[[], None]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        params.release(names)
        release()
        return_freed_memory()

    return hook
