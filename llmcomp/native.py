"""llmcomp's own checkpoint layout, version 1: what config.json says and how a weight's tensors are named and packed.

config.json of such a checkpoint:

    {"model_type": "llmcomp",                  Auto classes know it only after `import llmcomp.hf`
     "dtype": "packed: …", "id2label": …,      and a model's own class stops at fields that cannot be text
     "architectures": ["LlamaForCausalLM"],
     "packed_model_type": "llama",
     "model": {…},                             the model's own config, without its model_type
     "quantization_config": {
       "quant_method": "llmcomp", "version": 1,
       "weights": [{"kind": "quantized", "bits": 4, "group_size": 128, "symmetric": true, "activations": null,
                    "modules": ["model.layers.0.self_attn.q_proj", …]}, …]}}

Every compressed module is named once. A further kind of weight is a further `kind` with fields and tensor names of
its own, which may hold kinds in its fields; a reader that does not know a kind or a field refuses the checkpoint, so
kinds come without a new version. A new version is a change in what is said here. The other two kinds:

    {"kind": "sparse", "kept": 2, "of": 4, "values": null, "modules": […]}
    {"kind": "low_rank", "rank": 64, "left": null, "right": null, "base": null, "modules": […]}

where in the place of each null a quantized kind may stand, without its modules.

A quantized weight [out, in] of the module `m`, always as [out, in], whatever the module itself holds (Conv1D):

    m.weight_packed      the integers, in one of three forms that its dtype tells (`llmcomp.packing`):
                         uint8 [out / 32, in, 16]   4 bits in blocks: linears where 64 divides out and 32 divides in
                         int8  [out, in]            8 bits, as they are
                         int32 [out, words(in, bits)]  all others
    m.weight_scale       [out, groups], in the dtype of the dense weight
    m.weight_zero_point  int32 [words(out, bits), groups], packed along the output; asymmetric weights only
    m.weight_shape       int64 [2]: out, in
    m.input_scale        [1]; linears that round their inputs by a fixed scale only

CPU kernels compute with the first two forms, so files are mapped and not laid out anew; the third is that of
compressed-tensors' `pack-quantized`, as are the other tensors. Decoding is `(q - zero_point) * scale`, in the
scale's dtype.

A sparse weight keeps the same `kept` of every `of` columns' places in each row, kept = in / of * kept of them in all:

    m.weight_values      [out, kept], floating; or the kept integers instead, with scales and zero points as above, of
                         groups of the whole weight's columns:
    m.weight_packed      int8 [out, kept] (8 bits), int32 [out, words(kept, bits)]
    m.weight_indices     uint8 [out, ⌈kept * b / 8⌉]: the place of each in its group, ascending, in b bits, those of
                         of - 1 (2 for 2:4, 3 for 4:8); least significant first, each row in bytes of its own
    m.weight_shape       int64 [2]: out, in

A removed weight is zero. A low-rank weight is three modules in the place of one, `left @ right`, added to `base`:

    m.left.weight        [out, rank], floating, or the tensors of a quantized weight m.left
    m.right.weight       [rank, in], likewise
    m.base.…             the tensors of a quantized weight m.base [out, in], where there is a base

docs/layout.md says the same to writers of other readers. Tensors of the last two kinds: `llmcomp.native_kinds`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from llmcomp import packing
from llmcomp.errors import BadCheckpoint, BadRecipe
from llmcomp.kinds import Kind, LowRank, Sparse
from llmcomp.patterns import Pattern
from llmcomp.schemes import INT8_STATIC, Scheme
from llmcomp.weights import INPUT_SCALE, QuantizedWeight

METHOD, VERSION = "llmcomp", 1
QUANTIZED, SPARSE, LOW_RANK = "quantized", "sparse", "low_rank"
# Without a guard `LlamaForCausalLM.from_pretrained` takes a config of another type with a warning, drops a quantizer
# that it does not know, and fills in random weights. These two are no text in any config; the first can be overridden
# by an argument, the second's error says less.
_GUARDS = ("dtype", "id2label")
_SENTENCE = "packed: import llmcomp.hf, then open this with an Auto class, or with llmcomp.load"
PACKED, SCALE, ZERO_POINT, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
TENSORS = (PACKED, SCALE, ZERO_POINT, SHAPE, INPUT_SCALE)
PARTS = ("weight", *TENSORS)  # with what compressed-tensors' `int-quantized` holds


def describe(kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """`quantization_config` for these modules, in their order.

    Raises:
        BadRecipe: an unstructured pattern, which nothing packs.
    """
    groups: dict[Kind, list[str]] = {}
    for name, kind in kinds.items():
        groups.setdefault(kind, []).append(name)
    weights = [{**_described(kind), "modules": names} for kind, names in groups.items()]
    return {"quant_method": METHOD, "version": VERSION, "weights": weights}


def _described(kind: Kind) -> dict[str, Any]:
    if isinstance(kind, Scheme):
        return {"kind": QUANTIZED, **{field: getattr(kind, field) for field in _SCHEME}}
    if isinstance(kind, LowRank):
        parts = {part: _described_or_none(getattr(kind, part)) for part in ("left", "right", "base")}
        return {"kind": LOW_RANK, "rank": kind.rank, **parts}
    if kind.pattern.group is None:
        raise BadRecipe(f"llmcomp's layout packs N:M patterns, not {kind.pattern.label}; take --format dense.")
    kept, of = kind.pattern.kept, kind.pattern.of
    return {"kind": SPARSE, "kept": kept, "of": of, "values": _described_or_none(kind.values)}


def _described_or_none(scheme: Scheme | None) -> dict[str, Any] | None:
    return None if scheme is None else _described(scheme)


def wrap(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a checkpoint in this layout, from the model's own config."""
    apart = ("quantization_config", "architectures", "model_type")
    return {
        "model_type": METHOD,
        **dict.fromkeys(_GUARDS, _SENTENCE),
        "architectures": config.get("architectures"),
        "packed_model_type": config["model_type"],
        "model": {key: value for key, value in config.items() if key not in apart},
        "quantization_config": dict(quantization),
    }


def to_json(wrapped: Mapping[str, Any]) -> str:
    """The text of config.json; one content has one text, so that what is saved again is the same to the byte."""
    return json.dumps(wrapped, indent=2, sort_keys=True) + "\n"


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a checkpoint in this layout, of whatever version."""
    return config.get("model_type") == METHOD


def register(config: Mapping[str, Any]) -> None:
    """Make transformers know the model type, if config.json is in this layout."""
    if is_native(config):
        import_module("llmcomp.hf")  # which is above all that open checkpoints, and cannot be below them


def unwrap(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own config, with `architectures`, without `quantization_config`; another config as it is.

    Raises:
        BadCheckpoint: it holds none.
    """
    if not is_native(config):
        return dict(config)
    inner, model_type = config.get("model"), config.get("packed_model_type")
    if not isinstance(inner, Mapping) or not isinstance(model_type, str):
        raise BadCheckpoint('config.json of a packed checkpoint needs the model\'s own config under "model".')
    return {**inner, "model_type": model_type, "architectures": config.get("architectures")}


def kinds_of(quantization: Any) -> dict[str, Kind]:
    """{module: kind} of a `quantization_config` in this layout.

    Raises:
        BadCheckpoint: a version, kind or field that this release does not read, or a module that is named twice.
    """
    version = quantization.get("version") if isinstance(quantization, Mapping) else None
    if version != VERSION:
        raise BadCheckpoint(
            f"This checkpoint is in version {version} of llmcomp's layout, and this release reads version {VERSION}; "
            "update llmcomp, or export the checkpoint again with the release that wrote it."
        )
    found: dict[str, Kind] = {}
    groups = quantization.get("weights")
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise BadCheckpoint('quantization_config of a packed checkpoint needs a list of groups under "weights".')
    for group in groups:
        kind = _kind({field: value for field, value in group.items() if field != "modules"}, _KINDS)
        names = group.get("modules")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadCheckpoint('A group of quantization_config needs a list of names under "modules".')
        for name in names:
            if name in found:
                raise BadCheckpoint(f"quantization_config names {name} twice.")
            found[name] = kind
    return found


def _kind(group: Mapping[str, Any], known: Mapping[str, tuple[Mapping[str, Any], Callable[..., Any]]]) -> Any:
    said = group.get("kind")
    if not isinstance(said, str) or said not in known:
        raise BadCheckpoint(
            f"This checkpoint holds weights of kind '{said}' where this release reads {' or '.join(known)}; "
            "update llmcomp."
        )
    fields, make = known[said]
    problem = next((f"it lacks {field}" for field in fields if field not in group), None)
    problem = problem or next((f"{one} is no field of {said}" for one in group if one not in {"kind", *fields}), None)
    wrong = [one for one, kinds in fields.items() if one in group and not _is(group[one], kinds)]
    if problem is None and wrong:
        problem = f"{wrong[0]} is {group[wrong[0]]!r}"
    if problem is not None:
        raise BadCheckpoint(f"quantization_config holds a group that cannot be read: {problem}.")
    given = {one: _kind(group[one], _NESTED) if isinstance(group[one], Mapping) else group[one] for one in fields}
    try:
        return make(**given)
    except BadRecipe as error:
        raise BadCheckpoint(f"quantization_config holds a group that cannot be read: {error}") from error


def _is(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not (isinstance(value, bool) and kinds is not bool)


def _sparse(kept: int, of: int, values: Scheme | None) -> Sparse:
    return Sparse(Pattern(kept, of), values)


_SCHEME = {"bits": int, "group_size": int | None, "symmetric": bool, "activations": str | None}
_NESTED: dict[str, tuple[Mapping[str, Any], Callable[..., Any]]] = {QUANTIZED: (_SCHEME, Scheme)}
_INSIDE = Mapping | None  # a kind within another; without one, numbers stay floating
_KINDS: dict[str, tuple[Mapping[str, Any], Callable[..., Any]]] = {
    **_NESTED,
    SPARSE: ({"kept": int, "of": int, "values": _INSIDE}, _sparse),
    LOW_RANK: ({"rank": int, "left": _INSIDE, "right": _INSIDE, "base": _INSIDE}, LowRank),
}


def to_tensors(weight: QuantizedWeight, looked_up: bool) -> dict[str, Tensor]:
    """What a file holds for a weight, by name within its module; every tensor contiguous.

    Args:
        looked_up: row by row (embeddings), rather than multiplied with.
    """
    bits = weight.scheme.bits
    tensors = {
        PACKED: stored(weight, looked_up),
        SCALE: weight.scale.contiguous(),
        SHAPE: torch.tensor(weight.values.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        tensors[ZERO_POINT] = packing.pack(weight.zero_point, bits, 0)
    if weight.input_scale is not None:
        tensors[INPUT_SCALE] = weight.input_scale
    return tensors


def stored(weight: QuantizedWeight, looked_up: bool) -> Tensor:
    """`weight_packed` of a weight."""
    values, bits = weight.values, weight.scheme.bits
    if bits == 8:
        return values.contiguous()
    # Rows that are looked up must not lie in blocks.
    if bits == 4 and not looked_up and values.shape[0] % 64 == 0 and values.shape[1] % 32 == 0:
        return packing.pack_blocks(values)
    return packing.pack(values, bits)


def integers(held: Tensor, bits: int, columns: int) -> Tensor:
    """int8 [rows, columns] of `weight_packed` in any of its forms; of words and int8, any rows may be given."""
    if held.dtype == torch.int8:
        return held
    return packing.unpack_blocks(held) if held.dtype == torch.uint8 else packing.unpack(held, bits, columns)


def zero_points(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor | None:
    """int8 [rows, groups] of a weight in this layout, None where it is symmetric."""
    if scheme.symmetric:
        return None
    return packing.unpack(tensors[ZERO_POINT], scheme.bits, int(tensors[SHAPE][0]), 0)


def from_tensors(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `to_tensors`.

    Raises:
        BadCheckpoint: a tensor that is missing, or of another shape or dtype than the scheme asks for.
    """
    _, columns = check(tensors, scheme)
    values, zero = integers(tensors[PACKED], scheme.bits, columns), zero_points(tensors, scheme)
    return QuantizedWeight(values, tensors[SCALE], zero, scheme, tensors.get(INPUT_SCALE))


def check(tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[int, int]:
    """The shape [out, in] of a weight in this layout.

    Raises:
        BadCheckpoint: a tensor that is missing, or of another shape or dtype than the scheme asks for.
    """
    shape = tensors[SHAPE].flatten().tolist() if SHAPE in tensors else []
    form = tensors[PACKED].dtype if PACKED in tensors else torch.int32
    require(tensors, shapes_of(shape, scheme, form))
    rows, columns = shape
    return rows, columns


Shapes = dict[str, tuple[torch.dtype | None, tuple[int, ...]]]


def require(tensors: Mapping[str, Tensor], shapes: Shapes) -> None:
    """Refuse tensors that are not of these dtypes and shapes.

    Args:
        shapes: {tensor: its dtype, None for any floating one, and shape}.

    Raises:
        BadCheckpoint: the first that is missing, or of another shape or dtype.
    """
    for name, (dtype, expected) in shapes.items():
        if name not in tensors:
            raise BadCheckpoint(f"{name} is missing")
        fits = tensors[name].is_floating_point() if dtype is None else tensors[name].dtype == dtype
        if tuple(tensors[name].shape) != expected or not fits:
            found = f"{tensors[name].dtype} {list(tensors[name].shape)}".removeprefix("torch.")
            wanted = f"{dtype or 'a floating type'} {list(expected)}".removeprefix("torch.")
            raise BadCheckpoint(f"{name} is {found}, expected {wanted}")


def read(state: Mapping[str, Tensor], scheme: Scheme, transposed: bool) -> QuantizedWeight:
    """A weight [out, in] as this layout holds it, or any of compressed-tensors' for integers.

    Args:
        state: by name within the module.
        transposed: the module holds [in, out] (Conv1D), which compressed-tensors packs as it is.

    Raises:
        BadCheckpoint: tensors that are missing, or of the wrong shape or dtype.
    """
    if absent := [name for name in (SCALE, *(() if scheme.symmetric else (ZERO_POINT,))) if name not in state]:
        raise BadCheckpoint(f"{absent[0]} is missing")
    if is_own(state, scheme, transposed):
        return from_tensors(state, scheme)
    scale, zero = state[SCALE], None if scheme.symmetric else state[ZERO_POINT]
    packs_zeros = zero is None or _packs_zeros(zero)
    turned = _turned(state, transposed)
    if PACKED in state and SHAPE in state:
        values = integers(state[PACKED], scheme.bits, int(state[SHAPE][1]))
    elif state.get("weight", scale).dtype == torch.int8:
        values = state["weight"]
    else:
        raise BadCheckpoint(f"{PACKED} is missing")
    if turned:
        values, scale, zero = values.t(), scale.t(), None if zero is None else zero.t()
    shape = (len(values), scheme.groups(values.shape[1]))
    if zero is not None:
        zero = packing.unpack(zero, scheme.bits, shape[0], 0) if packs_zeros else zero.to(torch.int8)
        zero = zero.expand(shape).contiguous()
    return QuantizedWeight(
        values.contiguous(), scale.expand(shape).contiguous(), zero, scheme, state.get(INPUT_SCALE)
    )


def is_own(state: Mapping[str, Tensor], scheme: Scheme, transposed: bool) -> bool:
    """Whether the tensors of a module are those of this layout, rather than another of compressed-tensors'."""
    if PACKED not in state or SCALE not in state or not (scheme.symmetric or ZERO_POINT in state):
        return False
    if _turned(state, transposed) or state[SCALE].numel() <= 1 < state[PACKED].shape[0]:  # one for all
        return False
    return scheme.symmetric or _packs_zeros(state[ZERO_POINT])


def _turned(state: Mapping[str, Tensor], transposed: bool) -> bool:
    """Whether a Conv1D's weight lies as the module holds it, [in, out]."""
    return transposed and (SHAPE not in state or len(state[SCALE]) != int(state[SHAPE][0]))


def _packs_zeros(zero: Tensor) -> bool:
    return zero.dtype == torch.int32  # others are int8, one each


def shapes_of(shape: Any, scheme: Scheme, form: torch.dtype) -> Shapes:
    """{tensor within its module: its dtype, None for any floating one, and shape} of a weight of `shape` [out, in].

    Args:
        form: the dtype of its integers.

    Raises:
        BadCheckpoint: no such shape, or one that the groups do not divide.
    """
    if len(shape) != 2 or min(shape) < 1 or not scheme.fits(shape[1]):
        raise BadCheckpoint(f"{SHAPE} {list(shape)} is not that of a weight of {scheme.label}")
    rows, columns = (int(size) for size in shape)
    groups = scheme.groups(columns)
    shapes: Shapes = {
        PACKED: (torch.int32, (rows, packing.words(columns, scheme.bits))),
        SCALE: (None, (rows, groups)),
        SHAPE: (torch.int64, (2,)),
    }
    if form == torch.int8 and scheme.bits == 8:
        shapes[PACKED] = (form, (rows, columns))
    if form == torch.uint8 and scheme.bits == 4 and rows % packing.BLOCK == 0:
        shapes[PACKED] = (form, (rows // packing.BLOCK, columns, packing.BLOCK // 2))
    if not scheme.symmetric:
        shapes[ZERO_POINT] = (torch.int32, (packing.words(rows, scheme.bits), groups))
    if scheme.activations == INT8_STATIC:
        shapes[INPUT_SCALE] = (None, (1,))
    return shapes
