"""A shard that an earlier run has left: its weights decoded as a reader would, on all ranks of this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from llmcomp.adapters.base import LinearRef
from llmcomp.formats import Layout
from llmcomp.formats.base import PARTS
from llmcomp.ranks import World


@dataclass(frozen=True)
class EarlierShard:
    """An open shard; only rank 0 has the `file`, and tells the others what is in it."""

    file: Any
    layout: Layout
    file_name: Callable[[str], str]
    world: World

    def decoded(self, ref: LinearRef, room: Tensor) -> Tensor:
        """The weight of a linear. room: a tensor of its shape and dtype, which ranks without the file fill."""
        if self.file is None:
            return self.world.from_first(room)
        own: dict[str, Tensor] = {}
        for weight in (f"{ref.name}.{part}weight" for part in PARTS):
            prefix = self.file_name(weight)
            names = [name for name in self.file.keys() if name.startswith(prefix)]  # noqa: SIM118
            own |= {weight + name.removeprefix(prefix): self.file.get_tensor(name) for name in names}
        return self.world.from_first(self.layout.decode(ref, own))

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the model."""
        content = None if self.file is None else save({name: self.file.get_tensor(self.file_name(name))})
        return load(self.world.message(content))[name]


@contextmanager
def earlier_shard(
    path: Path, layout: Layout, file_name: Callable[[str], str], world: World
) -> Iterator[EarlierShard]:
    """Open a shard on the rank that holds it. file_name: from a parameter's name to that in the files."""
    if not world.first:
        yield EarlierShard(None, layout, file_name, world)
        return
    with safe_open(path, framework="pt") as file:
        yield EarlierShard(file, layout, file_name, world)
