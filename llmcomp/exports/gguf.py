"""GGUF: one file with the model and its tokenizer, which llama.cpp runs.

Packed weights go over as they are: the integers that the checkpoint holds, its scales as float16, one for each block of
32 (`gguf_blocks`). What no block holds is written dense, in the dtype of its scales, and said. Tensors are made one at
a time, when the file has come to them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from llmcomp.errors import BadCheckpoint, UserError, VerificationFailed
from llmcomp.exports import gguf_blocks, gguf_models
from llmcomp.exports.gguf_blocks import Rounding
from llmcomp.exports.gguf_models import Family
from llmcomp.exports.gguf_tokenizer import add_tokenizer
from llmcomp.formats.opening import Opened
from llmcomp.formats.reading import Place, require_same
from llmcomp.formats.save import writing
from llmcomp.weights import dequantize

FILE = "model.gguf"
_ROWS = 4096  # of a matrix that are decoded at a time when the file is read back
_FLOAT32 = 2.0**-22  # what float32 products and sums may differ by
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Written:
    """One tensor of the file.

    Attributes:
        name: in GGUF.
        source: in the checkpoint: a packed module, or a tensor.
        kind: of `gguf.GGMLQuantizationType`.
        shape: [out, in] or [features], as in transformers.
        packed: whether its source is a packed module.
    """

    name: str
    source: str
    kind: str
    shape: tuple[int, ...]
    packed: bool

    @property
    def nbytes(self) -> int:
        if self.kind in _ITEM_BYTES:
            return int(np.prod(self.shape)) * _ITEM_BYTES[self.kind]
        return self.shape[0] * gguf_blocks.row_bytes(self.kind, self.shape[1])


@dataclass
class Said:
    """What the user is told when the file is written."""

    rounding: Rounding = field(default_factory=Rounding)
    notes: list[str] = field(default_factory=list)


def export(opened: Opened, directory: Path) -> list[str]:
    """Write `model.gguf` into `directory` (`llmcomp.exports.Export`); returns sentences for the user.

    Raises:
        UserError: gguf is not installed; or an architecture, a tokenizer or a number that the file has no place for.
        BadCheckpoint: tensors that are missing or of other shapes than config.json says.
        VerificationFailed: what was written decodes to something else.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("Exporting GGUF needs the package gguf: pip install 'llmcomp[gguf]'.") from error
    config: Any = opened.skeleton.config
    architecture = (opened.config.get("architectures") or ["This model"])[0]
    family = gguf_models.family_of(architecture, config)
    opened.require_integers("GGUF")
    written = plan(opened, family)
    said = Said()
    writer = gguf.GGUFWriter(directory / FILE, family.arch)
    extra = _write_metadata(writer, opened, family, written, said)
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for one in written:
        kind = gguf.GGMLQuantizationType[one.kind]
        # 16 bits of no type that gguf knows, so that only `kind` is looked at, and the shape counts weights.
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.uint16), one.nbytes, kind)
    with writing(directory), contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in extra.values():
            writer.write_tensor_data(values)
        for one in written:
            writer.write_tensor_data(_data(opened, family, one, said))
    _compare(opened, family, written, said.rounding, directory / FILE)
    return [*_told(opened, family, config, written, said), *said.notes]


def plan(opened: Opened, family: Family) -> list[Written]:
    """Every tensor that the file will hold, from headers only.

    Raises:
        BadCheckpoint: one that is missing, or of a dtype that is none of weights.
        UserError: one that GGUF has no name for.
    """
    config: Any = opened.skeleton.config
    name_of = gguf_models.names_of(family, config)
    found = []
    for full, parameter in opened.skeleton.named_parameters():
        module, _, leaf = full.rpartition(".")
        packed = leaf == "weight" and module in opened.schemes
        if not packed and full not in opened.tensors:
            raise BadCheckpoint(f"{opened.directory} lacks the tensor {full}.")
        name = name_of(full)
        if name is None:
            raise UserError(f"GGUF has no name for {full} in a model of the kind '{family.arch}'.")
        shape = tuple(parameter.shape)
        if packed:
            kind = gguf_blocks.kind_of(opened.schemes[module], shape[1])
            dtype = _dtype(opened.tensors[f"{module}.weight_scale"])
        else:
            kind, dtype = None, _dtype(opened.tensors[full])
        if dtype not in ("F32", "F16", "BF16"):
            raise BadCheckpoint(f"{opened.directory} holds {full} as {dtype}, which is no dtype of weights.")
        dense = "F32" if len(shape) == 1 else "BF16" if dtype == "BF16" else "F16"
        found.append(Written(name, module if packed else full, kind or dense, shape, packed))
    return found


def _dtype(place: Place) -> str:
    with safe_open(place.path, framework="pt") as shard:
        return str(shard.get_slice(place.key).get_dtype())


def _write_metadata(
    writer: Any, opened: Opened, family: Family, written: list[Written], said: Said
) -> dict[str, np.ndarray]:
    """All keys of the file; returns tensors that only GGUF has."""
    import gguf

    from llmcomp.measure.load import load_tokenizer

    config: Any = opened.skeleton.config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_quantized_by("llmcomp")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(int(gguf.LlamaFileType[_file_type(written)]))
    extra = gguf_models.write_config(writer, family, config)
    tokenizer = load_tokenizer(opened.directory, config)
    said.notes += add_tokenizer(writer, tokenizer, config.vocab_size, opened.directory)
    return extra


def _file_type(written: list[Written]) -> str:
    """What most weights of the blocks are, by `gguf.LlamaFileType`."""
    matrices: Counter[str] = Counter()
    for one in written:
        if len(one.shape) == 2 and one.name.startswith("blk."):
            matrices[one.kind] += int(np.prod(one.shape))
    most = matrices.most_common(1)[0][0]
    return "ALL_F32" if most == "F32" else f"MOSTLY_{most}"


def _data(opened: Opened, family: Family, one: Written, said: Said) -> np.ndarray:
    """A tensor's data as the file holds it.

    Raises:
        UserError: numbers that the file has no place for.
    """
    module = one.source if one.packed else one.source.rpartition(".")[0]
    order = gguf_models.row_order(module, family, opened.skeleton.config)
    try:
        if not one.packed:
            tensor = opened.tensor(one.source)
            if tuple(tensor.shape) != one.shape:
                shapes = f"{list(tensor.shape)}, config.json says {list(one.shape)}"
                raise BadCheckpoint(f"{opened.directory} holds {one.source} as {shapes}.")
            data = gguf_models.as_dense(tensor, one.source, family)
        else:
            weight = opened.quantized(module)
            if one.kind in gguf_blocks.BLOCK_BYTES:
                data, rounding = gguf_blocks.pack(weight)
                said.rounding += rounding
            else:
                data = gguf_models.as_dense(weight.dense(), f"{module}.weight", family)
    except ValueError as error:
        raise UserError(f"{one.source} cannot be written as GGUF: {error}.") from error
    return data if order is None else data[order]


def _compare(opened: Opened, family: Family, written: list[Written], rounding: Rounding, path: Path) -> None:
    """Read the file back with gguf's own reader and decoders and compare every packed weight with the checkpoint's.

    Raises:
        VerificationFailed: a tensor that is missing, or that differs by more than scales were rounded.
    """
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    require_same({one.name for one in written}, set(found) - {gguf_models.ROPE_FREQS}, "meant for the file", "in it")
    for one in written:
        tensor = found[one.name]
        if tuple(reversed(tensor.shape.tolist())) != one.shape or tensor.tensor_type.name != one.kind:
            raise VerificationFailed(f"{path.name} holds {one.name} as {tensor.tensor_type.name}{tensor.shape}.")
        if one.kind not in gguf_blocks.BLOCK_BYTES:
            continue
        weight = opened.quantized(one.source)
        order = gguf_models.row_order(one.source, family, opened.skeleton.config)
        rows = np.arange(one.shape[0]) if order is None else order
        for start in range(0, len(rows), _ROWS):
            part = torch.from_numpy(rows[start : start + _ROWS])
            scale = weight.scale[part].float()
            zero = None if weight.zero_point is None else weight.zero_point[part]
            wanted = dequantize(weight.values[part], scale, zero)
            steps = scale.abs().repeat_interleave(one.shape[1] // scale.shape[1], dim=1)
            decoded = gguf.dequantize(tensor.data[start : start + _ROWS], tensor.tensor_type)
            allowed = (rounding.largest + _FLOAT32) * wanted.abs() + (rounding.offset + 32 * _FLOAT32) * steps
            if ((torch.from_numpy(decoded) - wanted).abs() > allowed).any():
                raise VerificationFailed(f"{path.name} holds {one.name}, which is not {one.source} as it was read.")


# --- what the user is told ---


def _told(opened: Opened, family: Family, config: Any, written: list[Written], said: Said) -> list[str]:
    return [
        *_kinds(written),
        *_rounded(said.rounding),
        *_wider(opened, written),
        *_dense(opened, written),
        *_computed(opened, family, config),
    ]


def _kinds(written: list[Written]) -> Iterator[str]:
    """What the matrices are stored as."""
    counts = Counter(one.kind for one in written if len(one.shape) == 2)
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    yield f"Matrices in {FILE}: {listed}."
    if any(one.kind in gguf_blocks.BLOCK_BYTES for one in written):
        yield "Quantized ones read back as they are in the checkpoint, but for what scales lose as float16."


def _rounded(rounding: Rounding) -> Iterator[str]:
    if rounding.changed:
        yield (
            f"GGUF keeps scales as float16, which does not hold {rounding.changed:,} of {rounding.scales:,} exactly: "
            f"they change by at most {rounding.largest:.2g} of their value."
        )
    if rounding.offset:
        yield f"Offsets of asymmetric weights change by at most {rounding.offset:.2g} steps in float16."


def _wider(opened: Opened, written: list[Written]) -> Iterator[str]:
    """Weights of 2 and 3 bits, for which GGUF has no kind that they fit into as they are."""
    narrow = [one for one in written if one.packed and one.kind == "Q4_0" and opened.schemes[one.source].bits < 4]
    if narrow:
        bits = sorted({opened.schemes[one.source].bits for one in narrow})
        widths = " and ".join(f"{width}" for width in bits)
        yield f"Weights of {widths} bits ({len(narrow)} matrices) take 4.5 bits each in {FILE}, unchanged."


def _dense(opened: Opened, written: list[Written]) -> Iterator[str]:
    """Packed weights that no block holds, and float32 that becomes float16."""
    loose = [one for one in written if one.packed and one.kind in _ITEM_BYTES]
    for label, columns in sorted({(opened.schemes[one.source].label, one.shape[1]) for one in loose}):
        these = [one for one in loose if (opened.schemes[one.source].label, one.shape[1]) == (label, columns)]
        size = sum(one.nbytes for one in these) / 1e6
        yield (
            f"No kind of GGUF holds {label} weights in rows of {columns}: {len(these)} matrices, such as "
            f"{these[0].source}, are {these[0].kind} ({size:.1f} MB)."
        )
    if any(not one.packed and one.kind == "F16" and _dtype(opened.tensors[one.source]) == "F32" for one in written):
        yield "Matrices that are float32 in the checkpoint and not quantized are rounded to F16."


def _computed(opened: Opened, family: Family, config: Any) -> Iterator[str]:
    """Where llama.cpp computes otherwise."""
    if any(scheme.activations for scheme in opened.schemes.values()):
        yield "Inputs of linears are rounded as llama.cpp does it (8 bits in blocks of 32), not as the checkpoint says."
    if (window := gguf_models.beyond_window(family, config)) is not None:
        yield f"llama.cpp looks back at everything, this model {window} tokens: beyond that its outputs differ."
