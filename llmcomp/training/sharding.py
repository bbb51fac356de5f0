"""Models whose parameters are shared out over the processes that train them: FSDP2, torch's `fully_shard`.

A launcher asks for it by accelerate's own environment (examples/accelerate/fsdp2.yaml). accelerate would leave a model
on CPUs whole and say nothing, so llmcomp shards it itself, on CPUs and GPUs alike, block by block, and looks whether it
is. Each process then holds its part of every weight, gradient and moment of the optimizer, and a block's weights are
whole while it computes. States hold whole tensors, as ever; the model is whole again when training ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from llmcomp.errors import BadRecipe, RunError
from llmcomp.pipeline.residency import all_finite
from llmcomp.training.course import process_count

_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
          "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
          "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")  # fmt: skip


def asked(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher asks for FSDP2.

    Raises:
        BadRecipe: another version of FSDP, weights that one process alone would load, or a launch that became one.
    """
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if (version := environment.get("FSDP_VERSION", "1")) != "2":
        raise BadRecipe(f"The launch asks for FSDP {version}, which is not done here; set fsdp_version: 2.")
    if environment.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise BadRecipe(
            "The launch asks that one process alone loads the weights (fsdp_cpu_ram_efficient_loading), which each "
            "needs here; set it to false."
        )
    if process_count() == 1:
        raise BadRecipe(
            "The launch asks for FSDP2 and became one process, which has nobody to share a model with; start several "
            "(num_processes, or torchrun --nproc_per_node)."
        )
    return True


@contextmanager
def by_us() -> Iterator[None]:
    """accelerate does not shard, and does not wrap, while this lasts."""
    said = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if said is not None:
            os.environ["ACCELERATE_USE_FSDP"] = said


@contextmanager
def sharded(model: nn.Module, device: str) -> Iterator[None]:
    """Shard a model's parameters over all processes; it is whole, and as it was, afterwards.

    Raises:
        BadRecipe: parameters of several dtypes, which FSDP2 does not put together.
        RunError: a model that is not sharded after all.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if len({value.dtype for value in parameters.values()}) > 1:
        raise BadRecipe("FSDP2 shards weights of one dtype, and an adapter has another; launch this without FSDP.")
    modules = [*_blocks(model), model]
    before = [(module, type(module), {name: getattr(module, name).copy() for name in _HOOKS}) for module in modules]
    mesh = init_device_mesh(device, (process_count(),))
    for module in modules:
        fully_shard(module, mesh=mesh)
    require_sharded(model)
    try:
        yield
    finally:
        _restore(model, parameters, before)


@contextmanager
def summed_later(model: Any) -> Iterator[None]:
    """Gradients of a sharded model are not summed over processes while this lasts, as in all but the last forward of a
    step."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def require_sharded(model: nn.Module) -> None:
    """Refuse a model of which a process holds more than its part.

    Raises:
        RunError: naming a parameter that is whole.
    """
    whole = [name for name, value in model.named_parameters() if not isinstance(value, DTensor)]
    if whole:
        raise RunError(
            f"FSDP2 was asked for, and {whole[0]} is not sharded ({len(whole)} such), so each process would hold the "
            "whole model."
        )


def _blocks(model: Any) -> list[nn.Module]:
    """What is gathered together: the blocks that transformers says must not be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names and module is not model]


def _restore(model: nn.Module, parameters: Mapping[str, nn.Parameter], before: list[tuple[Any, type, Any]]) -> None:
    found = dict(model.named_parameters(remove_duplicate=False))
    whole: dict[int, Tensor] = {}
    for name, original in parameters.items():
        held = found[name]
        if id(held) not in whole:  # a tie is gathered once
            whole[id(held)] = full(held.detach())
        original.data, original.grad = whole[id(held)], None
    for module, kind, hooks in before:
        module.__class__ = kind
        for name, kept in hooks.items():
            getattr(module, name).clear()
            getattr(module, name).update(kept)
    for name, original in parameters.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = original


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor; all processes ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process' part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which all processes hold, shared out as another one is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def whole_state(optimizer: Any) -> dict[str, Any]:
    """An optimizer's state_dict of whole tensors; all processes ask for it together."""
    state = optimizer.state_dict()
    held = {number: {name: full(value) if isinstance(value, Tensor) else value for name, value in one.items()}
            for number, one in state["state"].items()}  # fmt: skip
    return {**state, "state": held}


def share_out(optimizer: Any) -> None:
    """Make what `whole_state` has held, and an optimizer of sharded parameters has loaded, sharded as they are."""
    for parameter, held in optimizer.state.items():
        for name, value in held.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and not isinstance(value, DTensor):
                held[name] = like(value, parameter)


def finite(tensor: Tensor) -> bool:
    """Whether this process' part of it is."""
    return all_finite(local(tensor))
