"""How much the loss would change if a unit or a block were gone, to first order: Taylor scores, by one pass backward.

For a gate z on what a unit contributes, dL/dz at 1 is what taking it away changes to first order (Molchanov et al.
2019, arXiv:1906.10771; for heads Michel et al. 2019, arXiv:1905.10650). A unit is a set of columns of an output
projection W, so with x its input that is

    sum over the unit's weights of w * dL/dw  =  sum over tokens and the unit's channels of x * dL/dx,

and needs the gradient of activations only. A block's contribution is what it adds, its output minus its input. The
score is the mean over samples of the square; a sample's loss is the sum over what is right in it, the tokens that
follow or its label. With single samples for batches it is `methods.structured.taylor_importance` of the gradients.

The model is computed once as it is, forward and backward. Blocks are read when they are computed and forgotten behind,
and computed again on the way back, so memory holds one block, its graph for one batch, and what all blocks read of
that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from llmcomp.adapters.base import Adapter
from llmcomp.adapters.units import Part
from llmcomp.calibration.capture import first_tensor
from llmcomp.devices import computing_on, repeatable_attention
from llmcomp.errors import NumericalError, RunError
from llmcomp.losses import IGNORED
from llmcomp.matmul import WideProducts
from llmcomp.pipeline.memory import return_freed_memory
from llmcomp.pipeline.residency import Residency, Values

TASKS = ("causal-lm", "sequence-classification")  # that have a loss here

Scores = dict[str, list[float]]


def sensitivities(
    adapter: Adapter, values: Values, batches: Sequence[Mapping[str, Tensor]], labels: Sequence[Tensor] | None,
    parts: Sequence[Part], device: torch.device, release: Callable[[], None],
) -> Scores:
    """The scores of all units and blocks.

    Args:
        adapter: whose model's parameters are on meta, before and after. values: what they are.
        batches: keyword arguments of the model. labels: of a classifier, [rows] for each batch.
        parts: whose units are scored.
        release: called when a block has been forgotten.

    Returns:
        {name of a part's output projection: [units]; name of a block: [1]}.

    Raises:
        NumericalError: NaN or Inf in weights, activations or gradients.
        RunError: something that no gradient has reached.
    """
    params, sums = Residency(adapter, values, device), _Sums()
    with computing_on(device), repeatable_attention(device), _noting(adapter, parts, params, sums, release):
        params.settle()
        try:
            params.read(params.outside)
            for number, batch in enumerate(batches):
                here = {name: value.to(device) for name, value in batch.items()}
                sums.begin(len(next(iter(here.values()))))
                with torch.enable_grad(), WideProducts():
                    logits = adapter.model(**here).logits
                    _loss(logits, here, None if labels is None else labels[number].to(device)).backward()
                del logits
                return_freed_memory()
        finally:
            params.release(params.outside)
    return {name: sums.mean(name) for name in (*(part.output.name for part in parts), *_names(adapter))}


def _names(adapter: Adapter) -> list[str]:
    return [block.name for block in adapter.blocks]


class _Sums:
    """Squares of the samples' changes, summed, by name."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}
        self._rows, self._samples = 0, 0

    def begin(self, rows: int) -> None:
        """A batch of so many samples."""
        self._rows, self._samples = rows, self._samples + rows

    def add(self, name: str, size: int | None, products: Tensor) -> None:
        """products: x * dL/dx of the batch, float64 [..., channels], of which `size` are a unit, None for all."""
        width, rows = products.shape[-1], self._rows
        if products.numel() % (rows * width):  # padding was dropped, so nothing says where a sample ends
            rows = 1
        changes = products.reshape(rows, -1, width // (size or width), size or width).sum((1, 3))  # [rows, units]
        found = changes.square().sum(0).cpu()
        self._found[name] = self._found[name] + found if name in self._found else found

    def mean(self, name: str) -> list[float]:
        """Raises RunError where nothing was added, NumericalError for what is no number."""
        if name not in self._found:
            raise RunError(f"No gradient reached {name}; prune by another --method.")
        found = self._found[name] / self._samples
        if not bool(torch.isfinite(found).all()):
            raise NumericalError(f"The gradients at {name} hold NaN or Inf.")
        scores: list[float] = found.tolist()
        return scores


def _loss(logits: Tensor, batch: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
    """The sum over samples; of a language model over the tokens that follow, else of their labels."""
    if labels is None:
        answers = batch["input_ids"][:, 1:]
        if "attention_mask" in batch:
            answers = answers.masked_fill(batch["attention_mask"][:, 1:] == 0, IGNORED)
        flat = logits[:, :-1].float().flatten(0, 1)
        return F.cross_entropy(flat, answers.flatten(), ignore_index=IGNORED, reduction="sum")
    if labels.is_floating_point():
        return (logits.float().flatten() - labels).square().sum()
    return F.cross_entropy(logits.float(), labels, reduction="sum")


@contextmanager
def _noting(
    adapter: Adapter, parts: Sequence[Part], params: Residency, sums: _Sums, release: Callable[[], None]
) -> Iterator[None]:
    """While it lasts, blocks are computed twice, each time with values read for it, and backward passes are noted."""
    model: Any = adapter.model
    handles, blocks = [], {name: model.get_submodule(name) for name in _names(adapter)}
    config = model.config.get_text_config()
    caching = getattr(config, "use_cache", None)
    for part in parts:
        handles.append(model.get_submodule(part.output.name).register_forward_pre_hook(
            _watched_input(partial(sums.add, part.output.name, part.size)), with_kwargs=True
        ))  # fmt: skip
    for name, module in blocks.items():
        note = partial(sums.add, name, None)
        module.forward = _twice(module.forward, params, params.inside(name), note, release)
    if caching:
        config.use_cache = False
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in blocks.values():
            del module.forward  # what the class has shows again
        if caching:
            config.use_cache = True


def _watched_input(note: Callable[[Tensor], None]) -> Callable[..., Any]:
    def hook(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        read = first_tensor(positional, keywords)
        made = _Watched.apply(read, None, note)
        swap = lambda value: made if value is read else value  # noqa: E731
        return tuple(map(swap, positional)), {name: swap(value) for name, value in keywords.items()}

    return hook


def _twice(
    forward: Callable[..., Any], params: Residency, names: list[str], note: Callable[[Tensor], None],
    release: Callable[[], None],
) -> Callable[..., Any]:
    """The forward of a block that keeps nothing but what it reads for the way back."""

    def once(*positional: Any, **keywords: Any) -> Any:
        params.read(names)
        try:
            return forward(*positional, **keywords)
        finally:
            params.release(names)
            release()

    def computed(*positional: Any, **keywords: Any) -> Any:
        read = first_tensor(positional, keywords)
        assert read is not None  # blocks read hidden states
        if not read.requires_grad:  # the first block: nothing before it is asked for gradients
            start = read.detach().requires_grad_()
            positional = tuple(start if value is read else value for value in positional)
            keywords = {name: start if value is read else value for name, value in keywords.items()}
            read = start
        output = checkpoint(once, *positional, use_reentrant=False, preserve_rng_state=False, **keywords)
        leaves, shape = tree_flatten(output)
        place = next(n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        leaves[place] = _Watched.apply(leaves[place], read, note)
        return tree_unflatten(leaves, shape)

    return computed


class _Watched(torch.autograd.Function):
    """A tensor as it is, x; on the way back `note` hears (x - base) * dL/dx in float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor | None, note: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(x, *(() if base is None else (base,)))
        ctx.note = note
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        x, *base = ctx.saved_tensors
        value = x.double() - base[0].double() if base else x.double()
        ctx.note(value * gradient.double())
        return gradient, None, None
