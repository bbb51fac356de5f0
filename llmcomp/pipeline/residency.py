"""Which parameters of the model are in memory: read from the source, replaced by compressed ones, let go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from llmcomp.adapters.base import Adapter, LinearRef
from llmcomp.devices import CPU
from llmcomp.errors import NumericalError


class Values(Protocol):
    """Dense values of a model's parameters and stored buffers; the keys of `key_of` are their names."""

    @property
    def key_of(self) -> dict[str, str]: ...

    def tensor(self, name: str) -> Tensor: ...


class Residency:
    """Puts values into a model whose parameters lie on meta, and takes them out again.

    Attributes:
        device: where the values of resident parameters and buffers lie.
    """

    def __init__(self, adapter: Adapter, values: Values, device: torch.device = CPU) -> None:
        self._model, self._values, self.device = adapter.model, values, device
        self._outside = [name for name in values.key_of if adapter.block_of(name) is None]

    @property
    def outside(self) -> list[str]:
        """Names of all parameters and stored buffers outside of the blocks."""
        return self._outside

    def inside(self, block: str) -> list[str]:
        """Names of those of a block."""
        return [name for name in self._values.key_of if name.startswith(block + ".")]

    def settle(self) -> None:
        """Bring the buffers that the model has computed for itself, and no file holds, to the device."""
        for name, value in self._model.named_buffers(remove_duplicate=False):
            if name not in self._values.key_of and not value.is_meta:
                self.put(name, value)

    def read(self, names: Iterable[str]) -> None:
        """Map the values of `names` from the source's files; on another device than the CPU, copy them there, those
        that are tied once.

        Raises:
            NumericalError: a value that is NaN or Inf.
        """
        copies: dict[tuple[str, torch.dtype], Tensor] = {}
        for name in names:
            value = self._values.tensor(name)
            if self.device.type != "cpu":
                key = self._values.key_of[name], value.dtype
                if key not in copies:
                    copies[key] = value.to(self.device)
                value = copies[key]
            check_finite(value, name)
            self.put(name, value)

    def release(self, names: Iterable[str]) -> None:
        """Forget the values of `names`."""
        for name in names:
            self._set(name, torch.empty_like(self.value(name), device="meta"))

    def value(self, name: str) -> Tensor:
        """The present value of a parameter or buffer."""
        module, leaf = self._place(name)
        value = getattr(module, leaf)
        assert isinstance(value, Tensor)
        return value.detach()

    def put(self, name: str, value: Tensor) -> None:
        """Set a parameter or buffer, whatever shared its storage before; its value goes to the device."""
        self._set(name, value.to(self.device))

    def _set(self, name: str, value: Tensor) -> None:
        module, leaf = self._place(name)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def weight(self, ref: LinearRef) -> Tensor:
        """The weight of a linear as methods see it, [out, in]."""
        value = self.value(f"{ref.name}.weight")
        return value.t() if ref.transposed else value

    def install(self, ref: LinearRef, dense: Tensor) -> None:
        """Replace a linear's weight by one given as [out, in]."""
        self.put(f"{ref.name}.weight", dense.t().contiguous() if ref.transposed else dense)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self._model.get_submodule(path), leaf


def check_finite(tensor: Tensor, name: str, chunk: int = 1 << 22) -> None:
    """Raise NumericalError where a floating tensor holds NaN or Inf."""
    if not tensor.is_floating_point():
        return
    for part in tensor.reshape(-1).split(chunk):
        if not all_finite(part.float() if part.itemsize == 1 else part):  # torch orders no float8
            raise NumericalError(f"{name} holds NaN or Inf; the checkpoint is damaged or was saved so.")


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or Inf; by the extremes, out of which NaN comes, too: found much faster than each
    number is looked at."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
