"""Where the chains of blocks are: one in most models, two in an encoder-decoder, one of several in a model of parts.

A chain is the outermost list of modules of one class that holds the most linear weights, in the model as a whole, in
its encoder and in its decoder, or, where the language model is one part beside a vision tower, in that part.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmcomp.adapters.base import LinearRef
from llmcomp.adapters.trace import linears
from llmcomp.errors import UnknownArchitecture
from llmcomp.feeds import IDS, composite, encoder_decoder, main_input

_SHARED = "shared by parts of an encoder-decoder, so it stays as it is"


def chains_of(model: Any) -> tuple[str, dict[str, nn.ModuleList]]:
    """(the part of the model that is looked at, '' for all of it; {name of a list of blocks: the list}, in the order
    of computation).

    Raises:
        UnknownArchitecture: no such list; the message shows which there are.
    """
    if not encoder_decoder(model):
        part = _language_part(model) if composite(model) else ""
        return part, dict([_block_list(model, part)])
    sides = [name_of(model, side()) for side in (model.get_encoder, model.get_decoder)]
    return "", dict(_block_list(model, side) for side in sides)


def ends(model: Any, ties: dict[str, str]) -> tuple[LinearRef | None, LinearRef | None, dict[str, str]]:
    """The token embedding, the head, and {module: why it is neither} where encoder and decoder share them.

    Raises:
        UnknownArchitecture: a model that reads token ids without an embedding for them.
    """
    module, out = _embedding(model), model.get_output_embeddings()
    head = ref_of(name_of(model, out), out, "head", None) if isinstance(out, (nn.Linear, Conv1D)) else None
    if module is None:
        return None, head, {}
    name = name_of(model, module)
    if not encoder_decoder(model):
        return LinearRef(name, "embeddings", None, module.num_embeddings, module.embedding_dim), head, {}
    shared = {name: _SHARED}
    if head is not None and {f"{head.name}.weight"} & (ties.keys() | set(ties.values())):
        return None, None, shared | {head.name: _SHARED}
    return None, head, shared


def ref_of(name: str, module: Any, role: str, block: int | None) -> LinearRef:
    """The reference to a linear layer."""
    transposed = isinstance(module, Conv1D)
    rows, columns = module.weight.shape[::-1] if transposed else module.weight.shape
    return LinearRef(name, role, block, rows, columns, transposed)


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """The name of a module in the model."""
    return next(name for name, module in model.named_modules() if module is wanted)


def _embedding(model: Any) -> nn.Embedding | None:
    try:
        module = model.get_input_embeddings()
    except NotImplementedError:
        module = None
    if isinstance(module, nn.Embedding):
        return module
    if main_input(model) == IDS:
        raise UnknownArchitecture(
            f"{type(model).__name__} has no token embedding that llmcomp can read: expected an nn.Embedding, "
            f"found {type(module).__name__}."
        )
    return None


def _language_part(model: Any) -> str:
    """The smallest module around the token embedding that has blocks."""
    embedding = _embedding(model)
    assert embedding is not None, "a model of parts reads token ids"
    part = name_of(model, embedding)
    while part:
        part = part.rpartition(".")[0]
        if _candidates(model, part):
            break
    return part


def _block_list(model: nn.Module, part: str) -> tuple[str, nn.ModuleList]:
    """The heaviest of the candidates in the submodule `part`."""
    found = _candidates(model, part)
    if not found:
        lists = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList)]
        said = ", ".join(f"{name} ({_describe(one)})" for name, one in lists) or "none at all"
        raise UnknownArchitecture(
            f"The blocks of {type(model).__name__} could not be found: expected a list of like modules that "
            f"contain linear layers, found these lists: {said}."
        )
    _, name, module = max(found, key=lambda one: one[0])  # of equals the first
    return name, module


def _candidates(model: nn.Module, part: str) -> list[tuple[int, str, nn.ModuleList]]:
    """(linear weights, name, list) of the outermost lists of modules of one class with linears in them."""
    found: list[tuple[int, str, nn.ModuleList]] = []
    for name, module in model.get_submodule(part).named_modules(prefix=part):  # outer lists come before inner ones
        if not isinstance(module, nn.ModuleList) or len({type(child) for child in module}) != 1:
            continue
        if any(name.startswith(f"{outer}.") for _, outer, _ in found):
            continue
        if weights := sum(linear.weight.numel() for _, linear in linears(module)):
            found.append((weights, name, module))
    return found


def _describe(modules: nn.ModuleList) -> str:
    kinds = sorted({type(child).__name__ for child in modules})
    return f"{len(modules)} x {'/'.join(kinds)}" if len(modules) else "empty"
