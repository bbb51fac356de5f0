"""A GPU where there is none: tensors that lie and compute in the CPU's memory, and are refused where a real GPU's are.

    with PretendGPU():
        weight = torch.ones(2, 2, device="cuda")    # weight.device is cuda:0
        weight @ torch.ones(2, 2)                   # RuntimeError, as on a real one
        weight @ torch.ones(2, 2).to("cuda")        # the CPU's own kernels, so the CPU's own bits

Which storage is the device's is kept beside torch, so views, parameters and `.data =` follow by themselves; every call
from Python goes through `__torch_function__`. What a real GPU does besides, other kernels and other roundings, is not
pretended: that is what tests/test_gpu.py is for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

_CROSSING = {Tensor.to, Tensor.cpu, Tensor.cuda}
# A getter or setter of a property has no name of its own.
_DEVICE, _IS_CUDA, _IS_CPU = (getattr(Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu"))
_COPYING = {Tensor.copy_, Tensor.data.__set__}  # type: ignore[attr-defined]
_HOST_ONLY = {Tensor.numpy, Tensor.__array__, Tensor.data_ptr}


class PretendGPU(TorchFunctionMode):
    """While it lasts, a GPU of this number is there.

    Attributes:
        calls: names of what was computed with floating tensors there. host: the same on the CPU.
    """

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.device = torch.device("cuda", number)
        self.calls: set[str] = set()
        self.host: set[str] = set()
        self._owned: dict[int, StorageWeakRef] = {}

    def holds(self, tensor: Tensor) -> bool:
        """Whether it lies on the device."""
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
        held = self._owned.get(tensor.untyped_storage()._cdata)
        return held is not None and not held.expired()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = list(_tensors((args, kwargs)))
        there = [one for one in given if self.holds(one)]
        if func in (_DEVICE, _IS_CUDA, _IS_CPU) and there:
            return {_DEVICE: self.device, _IS_CUDA: True, _IS_CPU: False}[func]
        if func in _HOST_ONLY and there:
            raise TypeError(f"can't call {func.__name__} on a tensor of {self.device}: copy it to host memory first")
        if func in _CROSSING:
            return self._moved(func, args, kwargs)
        if func not in _COPYING and there:
            self._refuse_mixtures(func, given)
        if any(one.is_floating_point() and not one.is_meta for one in given):
            (self.calls if there else self.host).add(func.__name__)
        wanted = kwargs.get("device")
        made_there = wanted is not None and torch.device(wanted).type == "cuda"
        if made_there:
            if kwargs.get("generator") is not None:
                raise RuntimeError(f"Expected a '{self.device.type}' device type for generator but found 'cpu'")
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        if made_there or (there and wanted is None and func not in _COPYING):
            self._own(result)
        return result

    def _refuse_mixtures(self, func: Callable[..., Any], given: list[Tensor]) -> None:
        """But for single numbers, which a real one takes from the CPU."""
        for one in given:
            if one.dim() and not self.holds(one) and (one.is_meta or not _is_abstract(one)):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but {func} met {self.device} and {one.device}, "
                    f"shape {list(one.shape)}"
                )

    def _moved(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """`.to` in all of its forms, `.cpu()`, `.cuda()`."""
        own, *rest = args
        was_there = self.holds(own)
        target = kwargs.pop("device", None)
        kept = []
        for one in rest:
            if isinstance(one, (torch.device, str)):
                target = one
            elif isinstance(one, Tensor):
                target, kept = self.device if self.holds(one) else one.device, [*kept, one.dtype]
            else:
                kept.append(one)
        target = {Tensor.cpu: "cpu", Tensor.cuda: self.device}.get(func, target)
        kind = None if target is None else torch.device(target).type
        if kind == "meta":
            return own.to("meta", *kept, **kwargs)
        there = was_there if kind is None else kind == "cuda"
        copied = own.to(*kept, **kwargs) if kept or kwargs else own
        if there != was_there and copied.untyped_storage()._cdata == own.untyped_storage()._cdata:
            copied = copied.clone()
        if there:
            self._own(copied)
        return copied

    def _own(self, result: Any) -> None:
        for one in _tensors(result):
            if not _is_abstract(one) and not self.holds(one):
                storage = one.untyped_storage()
                # The weak reference keeps the address from being given to another storage.
                self._owned[storage._cdata] = StorageWeakRef(storage)
        if len(self._owned) > 10_000:
            self._owned = {key: held for key, held in self._owned.items() if not held.expired()}


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those that a call was given, or gives; `tree_leaves` would take half of the time."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _is_abstract(tensor: Tensor) -> bool:
    """Without memory: on meta, or a stand-in of torch.func's transforms."""
    return tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@contextlib.contextmanager
def pretend_gpu(number: int = 0, count: int = 1) -> Iterator[PretendGPU]:
    """One of `count` such GPUs, which torch.cuda tells of, too; whoever writes files has to take tensors off it first,
    though safetensors would do so by itself."""
    flatten = safetensors.torch._flatten_as_ptr

    def refusing(tensors: dict[str, Tensor], *arguments: Any) -> Any:
        if held := [name for name, tensor in tensors.items() if gpu.holds(tensor)]:
            raise RuntimeError(f"{held[0]} is on {gpu.device} and was to be written: copy it to host memory first")
        return flatten(tensors, *arguments)

    with pytest.MonkeyPatch.context() as patch, PretendGPU(number) as gpu:
        patch.setattr(safetensors.torch, "_flatten_as_ptr", refusing)
        patch.setattr("llmcomp.devices._visible", lambda: count)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
        yield gpu
