"""Exports that are transformers checkpoints again: compressed-tensors, llmcomp's own layout, dense."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

from llmcomp.errors import BadRecipe, VerificationFailed
from llmcomp.formats import FORMATS, Layout
from llmcomp.formats.opening import Opened
from llmcomp.formats.reading import auto_class, decoded, model_config, stored_modules, stored_tensors
from llmcomp.formats.save import ShardWriter, checkpoint_config, require_room
from llmcomp.measure.cost import loaded_bytes
from llmcomp.measure.load import load
from llmcomp.native_kinds import floating_of
from llmcomp.shards import read_shard
from llmcomp.weights import INPUT_SCALE

_SHARD = 1 << 30  # bytes of a file, about: what is held while one is put together


def compressed_tensors(opened: Opened, target: Path) -> list[str]:
    return _write("compressed-tensors", opened, target)


def own(opened: Opened, target: Path) -> list[str]:
    return _write("llmcomp", opened, target)


def dense(opened: Opened, target: Path) -> list[str]:
    return _write("dense", opened, target)


def _write(form: str, opened: Opened, target: Path) -> list[str]:
    """Write one of `FORMATS`, then read every weight back by the format's own library and compare.

    Raises:
        BadRecipe: the format cannot hold these schemes, or there are none.
        UserError: the disk has no room for it.
        VerificationFailed: what was written decodes to something else, or transformers cannot load it.
    """
    if form != "dense" and not opened.kinds:
        raise BadRecipe(f"{opened.directory} holds no packed weights; `llmcomp quantize` makes some.")
    if form == "compressed-tensors":
        opened.require_integers(form)
    entries = [(opened.ref(module), kind) for module, kind in opened.kinds.items()]
    layout = FORMATS[form](entries, opened.skeleton)
    require_room(target, nbytes(opened, layout), f"The export to {form}")
    writer, order = ShardWriter(target.parent), list[str]()
    for tensors in _shards(opened, layout):
        order.append(f"part-{len(order):05d}")
        writer.write(order[-1], tensors)
    architecture = str((opened.config.get("architectures") or [type(opened.skeleton).__name__])[0])
    dtype = str(opened.config.get("dtype") or opened.config.get("torch_dtype") or "float32")
    writer.finish(order, checkpoint_config(opened.config, architecture, dtype, layout.config(opened.skeleton)))
    notes = [*layout.notes, *(f"{name} is stored dense: {reason}." for name, reason in layout.dense.items())]
    return [*notes, _compare(opened, target)]


def nbytes(opened: Opened, layout: Layout) -> int:
    """Bytes of the tensors that will be written, from the headers of those that are read."""
    files = {path: read_shard(path).tensors for path in {place.path for place in opened.tensors.values()}}
    stored = {name: files[place.path][place.key] for name, place in opened.tensors.items()}
    scales = {module: stored.get(f"{module}.{floating_of(kind)}") for module, kind in opened.kinds.items()}
    packed = sum(
        layout.nbytes(opened.ref(module), scale.dtype.itemsize)
        for module, scale in scales.items()
        if scale is not None  # `Opened.weight` will say so
    )
    return packed + sum(stored[name].nbytes for name in opened.plain)


def _shards(opened: Opened, layout: Layout) -> Iterator[dict[str, Tensor]]:
    """All tensors of the checkpoint, in files of about `_SHARD` bytes."""
    held, size = dict[str, Tensor](), 0
    for tensors in _tensors(opened, layout):
        held |= tensors
        size += sum(tensor.nbytes for tensor in tensors.values())
        if size >= _SHARD:
            yield held
            held, size = {}, 0
    if held:
        yield held


def _tensors(opened: Opened, layout: Layout) -> Iterator[dict[str, Tensor]]:
    for module in opened.kinds:
        yield layout.tensors(opened.ref(module), opened.weight(module))
    for name in opened.plain:
        yield {name: opened.tensor(name)}


def _compare(opened: Opened, target: Path) -> str:
    tensors = stored_tensors(target)
    source = {f"{module}.weight": module for module in opened.kinds}
    scales = {f"{module}.{INPUT_SCALE}" for module in opened.schemes} & opened.tensors.keys()
    missing = {*source, *opened.plain, *scales}
    for name, tensor in decoded(tensors, stored_modules(target, tensors)):
        if name not in missing:
            raise VerificationFailed(f"{name} is in the export, but not in {opened.directory}.")
        expected = _dense(opened, source[name]) if name in source else opened.tensor(name)
        if expected.dtype != tensor.dtype or not torch.equal(tensor, expected):
            raise VerificationFailed(f"{name} has other values in the export than in {opened.directory}.")
        missing.discard(name)
    if missing:
        raise VerificationFailed(f"{min(missing)} of {opened.directory} is not in the export ({len(missing)} such).")
    count = len(source) + len(opened.plain) + len(scales)
    if loaded_bytes(target) > 0.8 * psutil.virtual_memory().available:
        return f"{count} tensors read back equal to the bit; the model does not fit into memory to be loaded."
    load(target, auto=auto_class(model_config(target)))
    return f"{count} tensors read back equal to the bit, and transformers loads it with nothing missing."


def _dense(opened: Opened, module: str) -> Tensor:
    weight = opened.weight(module).dense()
    return weight.t() if opened.ref(module).transposed else weight
