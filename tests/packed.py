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

from llmcomp import native
from llmcomp.formats import FORMATS
from llmcomp.formats.opening import PackedRef
from llmcomp.formats.save import checkpoint_config
from llmcomp.schemes import Scheme
from llmcomp.weights import QuantizedWeight

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


def packed(
    name: str,
    directory: Path,
    scheme_of: Callable[[str], Scheme | None],
    *,
    form: str = native.METHOD,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """The tiny model `name` with the modules packed that `scheme_of` gives a scheme; without any, a plain checkpoint.

    Args:
        scheme_of: from the name of a linear or embedding.
        form: one of FORMATS.
        overrides: config values that differ.
    """
    model = build(name, dtype=dtype, **overrides)
    kinds = (nn.Linear, nn.Embedding)
    tied = set(model.all_tied_weights_keys)
    modules = {key: one for key, one in model.named_modules() if isinstance(one, kinds) and f"{key}.weight" not in tied}
    schemes = {key: scheme for key in modules if (scheme := scheme_of(key)) is not None}
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    for key in tied:
        tensors.pop(key)
    refs = {key: PackedRef(key, "linear", *modules[key].weight.shape, False) for key in schemes}
    layout = FORMATS[form]([(refs[key], schemes[key]) for key in schemes], model)
    for seed, (key, scheme) in enumerate(schemes.items()):
        weight = random_weight(tuple(modules[key].weight.shape), scheme, dtype, seed)
        del tensors[f"{key}.weight"]
        tensors |= layout.tensors(refs[key], weight)
    own, dtype_name = model.config.to_dict(), str(dtype).removeprefix("torch.")
    config = checkpoint_config(own, type(model).__name__, dtype_name, layout.config(model) if schemes else None)
    directory.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if tokenizer:
        write_tokenizer(directory, encoder=False)
    return directory
