"""Tiny models whose weights are random integers on a grid, written as a checkpoint of packed weights.

    packed("llama", tmp_path / "m", lambda name: Scheme(4, 32) if "proj" in name else None)

Integers reach both ends of their range and scales differ by group, so that whoever mistakes a row, a group or a sign
gives other weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import build, write_tokenizer
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmcomp import native
from llmcomp.formats import FORMATS
from llmcomp.formats.opening import PackedRef
from llmcomp.formats.save import checkpoint_config
from llmcomp.kinds import Kind, LowRank
from llmcomp.patterns import Pattern
from llmcomp.schemes import INT8_STATIC, Scheme
from llmcomp.weights import CompressedWeight, LowRankWeight, QuantizedWeight, SparseWeight

# All that a GGUF file stores in one way or another, by the last part of a linear's name.
BY_NAME = {
    "q_proj": Scheme(4, 32), "k_proj": Scheme(4, 32, False), "v_proj": Scheme(3, None, False),
    "o_proj": Scheme(4, 64, False), "gate_proj": Scheme(2, 128), "up_proj": Scheme(8, 32, False),
    "down_proj": Scheme(8), "embed_tokens": Scheme(8), "lm_head": Scheme(8, 64), "qkv_proj": Scheme(4, 64),
    "gate_up_proj": Scheme(3, 64),
}  # fmt: skip


def mixed(module: str) -> Scheme:
    """A scheme for each linear of a block, another one for each kind."""
    return BY_NAME[module.rpartition(".")[2]]


def random_weight(
    shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype = torch.float32, seed: int = 0
) -> QuantizedWeight:
    """Integers of the whole range, zero points near its middle, decoded to a standard deviation of about 0.05."""
    generator = torch.Generator().manual_seed(seed)
    rows, groups = shape[0], scheme.groups(shape[1])
    values = torch.randint(scheme.qmin, scheme.qmax + 1, shape, generator=generator, dtype=torch.int8)
    scale = (0.5 + torch.rand(rows, groups, generator=generator)) * 0.09 / (scheme.qmax - scheme.qmin)
    zero = None
    if not scheme.symmetric:
        low, high = max(scheme.qmin, -3), min(scheme.qmax, 3)
        zero = torch.randint(low, high + 1, scale.shape, generator=generator, dtype=torch.int8)
    return QuantizedWeight(values, scale.to(dtype), zero, scheme)


def random_mask(shape: tuple[int, int], pattern: Pattern, seed: int = 0) -> torch.Tensor:
    """bool [out, in] with exactly N of every M kept, any of them alike."""
    assert pattern.kept is not None and pattern.of is not None
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(shape[0], shape[1] // pattern.of, pattern.of, generator=generator).argsort(-1)
    return (order < pattern.kept).view(shape)


def random_of(
    kind: Kind, shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> CompressedWeight:
    """A weight of any kind, decoded to a standard deviation of about 0.05."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(kind, Scheme):
        return random_weight(shape, kind, dtype, seed)
    if isinstance(kind, LowRank):
        sizes = {"left": (shape[0], kind.rank), "right": (kind.rank, shape[1])}
        factors = {
            part: (0.2 * torch.randn(size, generator=generator) / kind.rank**0.25).to(dtype)
            if (scheme := getattr(kind, part)) is None
            else random_weight(size, scheme, dtype, seed + n)
            for n, (part, size) in enumerate(sizes.items())
        }
        base = None if kind.base is None else random_weight(shape, kind.base, dtype, seed + 2)
        return LowRankWeight(factors["left"], factors["right"], base)
    mask = random_mask(shape, kind.pattern, seed)
    if kind.values is None:
        values = (0.05 * torch.randn(shape, generator=generator)).to(dtype)
        values[0, int(mask[0].int().argmax())] = 0  # a kept weight may be zero, too
        return SparseWeight(values.masked_fill(~mask, 0), mask, kind.pattern)
    made = random_weight(shape, kind.values, dtype, seed)
    zero = torch.zeros_like(made.values)
    if made.zero_point is not None:
        zero = made.zero_point.repeat_interleave(shape[1] // made.zero_point.shape[1], 1)
    input_scale = torch.tensor([0.03], dtype=dtype) if kind.values.activations == INT8_STATIC else None
    return QuantizedWeight(
        torch.where(mask, made.values, zero), made.scale, made.zero_point, kind.values, input_scale, kind.pattern, mask
    )


def packed(
    name: str,
    directory: Path,
    kind_of: Callable[[str], Kind | None],
    *,
    form: str = native.METHOD,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """The tiny model `name` with the modules packed that `kind_of` gives a kind; without any, a plain checkpoint.

    Args:
        kind_of: from the name of a linear or embedding.
        form: one of FORMATS.
        overrides: config values that differ.
    """
    model = build(name, dtype=dtype, **overrides)
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    tied = set(model.all_tied_weights_keys)
    modules = {key: one for key, one in model.named_modules() if isinstance(one, kinds) and f"{key}.weight" not in tied}
    chosen = {key: kind for key in modules if (kind := kind_of(key)) is not None}
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    for key in tied:
        tensors.pop(key)
    refs = {key: ref_of(key, modules[key]) for key in chosen}
    layout = FORMATS[form]([(refs[key], chosen[key]) for key in chosen], model)
    for seed, (key, kind) in enumerate(chosen.items()):
        weight = random_of(kind, (refs[key].out_features, refs[key].in_features), dtype, seed)
        del tensors[f"{key}.weight"]
        tensors |= layout.tensors(refs[key], weight)
    own, dtype_name = model.config.to_dict(), str(dtype).removeprefix("torch.")
    config = checkpoint_config(own, type(model).__name__, dtype_name, layout.config(model) if chosen else None)
    directory.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if tokenizer:
        write_tokenizer(directory, encoder=False)
    return directory


def ref_of(name: str, module: Any) -> PackedRef:
    transposed = isinstance(module, Conv1D)
    shape = module.weight.shape[::-1] if transposed else module.weight.shape
    return PackedRef(name, "linear", shape[0], shape[1], transposed)
