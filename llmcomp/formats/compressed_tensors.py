"""compressed-tensors checkpoints that plain transformers loads: which of its layouts carries which weight.

What transformers 5.23 with compressed-tensors 0.20 reads (test_compressed_tensors.py measures it):

- nn.Linear, symmetric: `pack-quantized`, any mixture of schemes, one config group each.
- nn.Linear, asymmetric: the standard layout packs zero points, which the loader's skeleton does not, so it
  loads only with `"dequantize": true`. Then one scheme decodes everything, so it serves where one scheme
  covers all. In any other mixture zero points are stored as int8 of blocks [1, group], which the skeleton
  expects as they are.
- nn.Embedding: the skeleton of a packed embedding breaks transformers' weight initialization, which wants an
  attribute `weight`; `int-quantized` keeps one (int8, whatever the bits) and loads.
- Conv1D (GPT-2): skipped by the skeleton, so only `"dequantize": true` decodes it, transposed, in blocks of
  [group, 1], and again by one scheme for all: widths and group sizes that differ are brought to a common
  one (lower bits fit in wider words; a scale may be repeated), and what is no Conv1D is stored dense.
- A bare model: sentence-transformers calls its `forward` itself, past the hook that decodes at the first call
  of the model, so it is decoded at load, embeddings too, by one scheme for all as above. It does so with heads,
  too (CrossEncoder): encoders with one scheme for all linears are decoded at load.
- An encoder-decoder: `generate` calls the encoder alone, past that hook, so it is decoded at load in the same way.
- Experts, which transformers keeps as one 3-D parameter: decoded while they are merged, every one that a parameter
  is made of, by the scheme of the group that is first to name them; dense ones among them are lost, and zero
  points are not looked at. So all experts of a model are packed by one symmetric scheme, or none.
- Families whose weight initialization wants `weight` of every linear (ModernBERT) do not load packed ones:
  one scheme for all goes with `"dequantize": true`, a mixture as `int-quantized`.

Decoding is `(q - zero_point) * scale` in the scale's dtype in each of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcomp import packing
from llmcomp.errors import BadRecipe
from llmcomp.experts import expert_shares
from llmcomp.formats.base import (
    Entry,
    Quantized,
    Ref,
    blank_dense,
    blank_integers,
    dense_tensors,
    integers_only,
    linears_of,
    made_when_alone,
)
from llmcomp.formats.loading import check_widths, generates, initializes_weights, passes_the_hook
from llmcomp.kinds import Kind, integers_of
from llmcomp.schemes import INT8_DYNAMIC, INT8_STATIC, Scheme
from llmcomp.weights import INPUT_SCALE, CompressedWeight, QuantizedWeight

PACKED, PLAIN = "pack-quantized", "int-quantized"
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
# How inputs are rounded (`llmcomp.activations`).
_INPUTS = {
    INT8_DYNAMIC: {**_INT8, "strategy": "token", "dynamic": True},
    INT8_STATIC: {**_INT8, "strategy": "tensor", "dynamic": False},
}
SMALLEST_GROUP = 32  # repeating scales for smaller groups than this would cost more than it saves


@dataclass(frozen=True)
class Storage:
    """How one weight lies in the file; also the identity of a config group.

    Attributes:
        format: 'pack-quantized' or 'int-quantized'.
        bits: of the stored integers.
        strategy: 'channel', 'group' or 'block'.
        group: weights along the input that share a scale, None for the whole row.
        symmetric: no zero points.
        transposed: the file holds [in, out].
        activations: how the linear's inputs are rounded, of `llmcomp.schemes.ACTIVATIONS`, if they are.
    """

    format: str
    bits: int
    strategy: str
    group: int | None
    symmetric: bool
    transposed: bool = False
    activations: str | None = None

    @property
    def packs_zeros(self) -> bool:
        """Whether zero points are packed along the output, as compressed-tensors does except for blocks."""
        return not self.symmetric and self.format == PACKED and self.strategy != "block"

    def args(self) -> dict[str, Any]:
        """`weights` of the config group."""
        args: dict[str, Any] = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric}
        args |= {"strategy": self.strategy, "group_size": None, "dynamic": False}
        if self.strategy == "group":
            args["group_size"] = self.group
        if self.strategy == "block":
            args["block_structure"] = [self.group, 1] if self.transposed else [1, self.group]
        return args


@dataclass(frozen=True)
class PackedLayout:
    """`formats.base.Layout` of a compressed-tensors checkpoint. `dequantize`: the reader decodes at load."""

    storage: Mapping[str, Storage]
    dense: Mapping[str, str]
    notes: Sequence[str]
    dequantize: bool

    def tensors(self, ref: Ref, weight: CompressedWeight) -> dict[str, Tensor]:
        if ref.name in self.dense:
            return dense_tensors(ref, weight)
        assert isinstance(weight, QuantizedWeight)  # the plan packs nothing else so
        storage = self.storage[ref.name]
        values, scale, zero = weight.values, weight.scale, weight.zero_point
        repeats = self._groups(ref) // scale.shape[1]
        if not storage.symmetric and zero is None:
            zero = torch.zeros(scale.shape, dtype=torch.int8, device=scale.device)
        if repeats > 1:
            scale = scale.repeat_interleave(repeats, dim=1)
            zero = None if zero is None else zero.repeat_interleave(repeats, dim=1)
        if storage.transposed:
            values, scale, zero = values.t(), scale.t(), None if zero is None else zero.t()
        prefix = f"{ref.name}.weight"
        tensors = {f"{prefix}_scale": scale.contiguous()}
        if weight.input_scale is not None:
            tensors[f"{ref.name}.{INPUT_SCALE}"] = weight.input_scale
        if zero is not None:
            zero = packing.pack(zero, storage.bits, 0) if storage.packs_zeros else zero.contiguous()
            tensors[f"{prefix}_zero_point"] = zero
        if storage.format == PLAIN:
            return tensors | {prefix: values.contiguous()}
        shape = torch.tensor(values.shape, dtype=torch.int64)
        return tensors | {f"{prefix}_packed": packing.pack(values, storage.bits), f"{prefix}_shape": shape}

    def blank(self, ref: Ref, kind: Kind, dtype: torch.dtype) -> dict[str, Tensor]:
        scheme = integers_of(kind)
        if ref.name in self.dense or scheme is None:
            return blank_dense(ref, dtype)
        return self.tensors(ref, blank_integers(ref, scheme, dtype))

    def decode(self, ref: Ref, tensors: Mapping[str, Tensor]) -> Tensor:
        if ref.name in self.dense:
            return tensors[f"{ref.name}.weight"].clone()  # not mapped, see `dense`
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        storage = self.storage[ref.name]
        scheme = QuantizationScheme(targets=[ref.name], weights=QuantizationArgs(**storage.args()))
        own = {name.removeprefix(f"{ref.name}."): tensor for name, tensor in tensors.items()}
        reader = BaseCompressor.get_value_from_registry(storage.format)
        decoded: Tensor = reader.decompress(own, scheme)["weight"]
        return decoded

    def nbytes(self, ref: Ref, itemsize: int) -> int:
        rows, columns = ref.out_features, ref.in_features
        if ref.name in self.dense:
            return rows * columns * itemsize
        storage, scales = self.storage[ref.name], rows * self._groups(ref)
        zeros = 0 if storage.symmetric else scales
        inputs = itemsize if storage.activations == INT8_STATIC else 0
        if storage.packs_zeros:
            zeros = packing.words(rows, storage.bits) * 4 * self._groups(ref)
        if storage.transposed:
            rows, columns = columns, rows
        packed = rows * packing.words(columns, storage.bits) * 4 + 2 * 8  # and the int64 shape
        return scales * itemsize + inputs + zeros + (rows * columns if storage.format == PLAIN else packed)

    def config(self, model: nn.Module) -> dict[str, Any] | None:
        if not self.storage:
            return None
        groups: dict[Storage, list[str]] = {}
        for name, storage in self.storage.items():
            groups.setdefault(storage, []).append(name)
        routed = expert_shares(model).keys()
        groups = dict(sorted(groups.items(), key=lambda group: routed.isdisjoint(group[1])))
        targets, ignore = _targets(groups, model)
        formats = {storage.format for storage in groups}
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": {
                f"group_{n}": {
                    "targets": targets[storage],
                    "weights": storage.args(),
                    "input_activations": _INPUTS[storage.activations] if storage.activations else None,
                    "output_activations": None,
                    "format": storage.format,
                }
                for n, storage in enumerate(groups)
            },
            "ignore": ignore,
        }
        return config | ({"dequantize": True} if self.dequantize else {})

    def _groups(self, ref: Ref) -> int:
        group = self.storage[ref.name].group
        return 1 if group is None else ref.in_features // group


def layout(entries: Sequence[Entry], model: nn.Module | None = None) -> PackedLayout:
    """How each weight is stored, so that plain from_pretrained decodes it to `weight.dense()` exactly.

    Args:
        model: may lie on meta; without it, its initialization is taken to be the usual one.

    Raises:
        BadRecipe: sparse weights that are not quantized, activations that no reader of such a checkpoint would round,
            experts that are not all packed by one symmetric scheme, or weights whose dtype a reader would change.
    """
    check_widths(model)
    return _layout(integers_only(entries, "compressed-tensors"), model)


def _layout(entries: Sequence[Quantized], model: nn.Module | None) -> PackedLayout:
    transposed = any(ref.transposed for ref, _ in entries)
    passed = None if model is None else passes_the_hook(model)
    _check_experts(entries, model)
    if transposed or (passed and entries):
        kind = "Conv1D weights" if transposed else f"the weights of {passed}"
        _refuse_activations(entries, f"readers decode {kind} as they load them and forget about activations")
        return _one_storage(entries, transposed, 2 if model is None else next(model.parameters()).element_size())
    linears = [entry for entry in entries if entry[0].role != "embeddings"]
    schemes = {scheme for _, scheme in linears}
    bound = model is not None and initializes_weights(model, tuple(ref.name for ref, _ in linears))
    if any(scheme.activations for scheme in schemes):
        # The layout that kernels for 8-bit activations read.
        return PackedLayout({ref.name: _standard(scheme, PLAIN) for ref, scheme in entries}, {}, (), dequantize=False)
    at_load = bound or (model is not None and not generates(model)) or not all(one.symmetric for one in schemes)
    if len(schemes) == 1 and len(linears) == len(entries) and at_load:
        storage = {ref.name: _standard(scheme) for ref, scheme in linears}
        return PackedLayout(storage, {}, (), dequantize=True)
    storage, notes = {}, []
    for ref, scheme in entries:
        if bound or ref.role == "embeddings":
            storage[ref.name] = _standard(scheme, PLAIN)
            if scheme.bits < 8:
                notes.append(f"{ref.name} has {scheme.bits}-bit values but takes 8 bits each in the file.")
        elif scheme.symmetric:
            storage[ref.name] = _standard(scheme)
        else:
            group = scheme.group_size or ref.in_features
            storage[ref.name] = Storage(PACKED, scheme.bits, "block", group, symmetric=False)
    if any(kept.strategy == "block" for kept in storage.values()):
        notes.append("Zero points of mixed asymmetric schemes are stored as int8; vLLM may not read them.")
    return PackedLayout(storage, {}, tuple(notes), dequantize=False)


def _check_experts(entries: Sequence[Quantized], model: nn.Module | None) -> None:
    routed = set() if model is None else set(expert_shares(model))
    if routed:
        _refuse_activations(entries, "readers merge experts as they load them and forget about activations")
    schemes = {ref.name: scheme for ref, scheme in entries if ref.name in routed}
    kinds = sorted({scheme.label for scheme in schemes.values()})
    if len(schemes) < len(routed):
        problem = f"{len(routed) - len(schemes)} of {len(routed)} would stay as they are"
    elif len(kinds) > 1:
        problem = f"they would have {', '.join(kinds)}"
    elif not all(scheme.symmetric for scheme in schemes.values()):
        problem = "they would have zero points"
    else:
        return
    raise BadRecipe(
        "transformers decodes packed checkpoints of this model only where one symmetric scheme covers the linears of "
        f"all experts, but {problem}; give them one scheme, or use --format dense."
    )


def _standard(scheme: Scheme, form: str = PACKED) -> Storage:
    strategy = "channel" if scheme.group_size is None else "group"
    return Storage(form, scheme.bits, strategy, scheme.group_size, scheme.symmetric, activations=scheme.activations)


def _refuse_activations(entries: Sequence[Quantized], reason: str) -> None:
    if any(scheme.activations for _, scheme in entries):
        raise BadRecipe(f"--activations does not apply here: {reason}; leave it out.")


def _one_storage(entries: Sequence[Quantized], transposed: bool, itemsize: int) -> PackedLayout:
    """One storage for every weight, or every Conv1D where there are any, the one with the fewest bytes; the rest
    is dense. `itemsize`: bytes of a dense value."""
    packed = [entry for entry in entries if entry[0].transposed == transposed]
    alone = "transformers decodes packed Conv1D weights only where nothing else is packed"
    dense = {ref.name: alone for ref, _ in entries if ref.transposed != transposed}
    kind = "Conv1D weights" if transposed else "weights"
    candidates = []
    for bits in sorted({scheme.bits for _, scheme in packed}):
        fits = [(ref, scheme) for ref, scheme in packed if scheme.bits <= bits]
        if (storage := _common(fits, bits, transposed)) is not None:
            candidates.append(_with(storage, fits, packed, dense, kind))
    if not candidates:
        reason = f"its {kind} have no common group of at least {SMALLEST_GROUP}"
        return PackedLayout({}, dense | {ref.name: reason for ref, _ in packed}, (), dequantize=False)
    return min(candidates, key=lambda found: sum(found.nbytes(ref, itemsize) for ref, _ in packed))


def _common(fits: Sequence[Quantized], bits: int, transposed: bool) -> Storage | None:
    """The storage that all of these fit in, their scales repeated to a common group; None without such a group."""
    symmetric = all(scheme.symmetric for _, scheme in fits)
    if not transposed and all(scheme.group_size is None for _, scheme in fits):
        return Storage(PACKED, bits, "channel", None, symmetric)
    group = math.gcd(*(scheme.group_size or ref.in_features for ref, scheme in fits))
    if group < SMALLEST_GROUP:
        return None
    return Storage(PACKED, bits, "block" if transposed else "group", group, symmetric, transposed)


def _with(
    storage: Storage, fits: Sequence[Quantized], packed: Sequence[Quantized], dense: Mapping[str, str], kind: str
) -> PackedLayout:
    names = {ref.name for ref, _ in fits}
    reason = f"transformers decodes all {kind} of a checkpoint by one scheme, here int{storage.bits}"
    wider = sum(scheme.bits < storage.bits for _, scheme in fits)
    notes = []
    if storage.transposed:
        notes.append("Conv1D weights are packed in transposed blocks, which transformers reads; vLLM may not.")
    if wider:
        notes.append(f"{wider} {kind} of fewer bits take {storage.bits} bits each in the file.")
    left = {ref.name: reason for ref, _ in packed if ref.name not in names}
    kept = {ref.name: storage for ref, _ in fits}
    return PackedLayout(kept, {**dense, **left}, tuple(notes), dequantize=True)


def _targets(
    groups: Mapping[Storage, Iterable[str]], model: nn.Module
) -> tuple[dict[Storage, list[str]], list[str]]:
    """Targets of each group and the ignore list.

    Where one scheme covers the linears it is the class name, which other readers know best; else names. Both
    fit with and without the model's base prefix, because AutoModel loads a causal LM's checkpoint without it.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = {storage: list(group) for storage, group in groups.items()}
    routed = expert_shares(model).keys()
    targets = {storage: [_either(prefix, group, routed)] for storage, group in names.items()}
    linears = linears_of(model)
    whole = [storage for storage, group in names.items() if linears & set(group)]
    if len(whole) != 1 or not linears.issuperset(names[whole[0]]):
        return targets, []
    ignore = linears - set(names[whole[0]]) | made_when_alone(model)
    targets[whole[0]] = ["Linear"]
    return targets, sorted(ignore | {name.removeprefix(prefix) for name in ignore})


def _either(prefix: str, names: Iterable[str], routed: Collection[str]) -> str:
    """One pattern for all names, with the prefix optional; experts, who are all alike, by any number."""
    patterns = {name: re.escape(name.removeprefix(prefix)) for name in names}
    experts = {name: re.sub(r"(?<=\\.)\d+(?=\\.)", r"\\d+", patterns[name]) for name in patterns if name in routed}
    bare = "|".join(dict.fromkeys((patterns | experts).values()))
    optional = f"(?:{re.escape(prefix)})?" if prefix != "." else ""
    return f"re:{optional}(?:{bare})$"
