"""Tiny checkpoints in llmcomp's own layout, each linear rounded to nearest by a scheme of its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from checkpoints import rtn
from safetensors.torch import save_file
from torch import nn

from llmcomp import native
from llmcomp.formats.opening import Opened, open_checkpoint
from llmcomp.schemes import INT8_DYNAMIC, INT8_STATIC, Scheme

# Every kind of scheme, so that one export is a test of all of them.
GROUPED = (
    Scheme(4, 128), Scheme(4, 32, False), Scheme(3, 64), Scheme(2, 64), Scheme(2, 32, False), Scheme(8, 64),
    Scheme(4),
)  # fmt: skip
BY_ROW = (
    Scheme(8), Scheme(8, None, False), Scheme(8, activations=INT8_DYNAMIC), Scheme(8, activations=INT8_STATIC),
    Scheme(4, None, False), Scheme(3, 128, False),
)  # fmt: skip


def in_turn(source: Path, schemes: Sequence[Scheme]) -> dict[str, Scheme]:
    """{linear of a block: scheme}, one after the other."""
    model = open_checkpoint(source).skeleton
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and any(p.isdigit() for p in n.split("."))]
    return dict(zip(names, itertools.cycle(schemes), strict=False))


def packed(source: Path, target: Path, schemes: Mapping[str, Scheme]) -> Opened:
    """The model of `source`, its modules rounded by `schemes`, in `target`."""
    opened = open_checkpoint(source)
    state = {name: opened.tensor(name) for name in opened.tensors}
    for name, scheme in schemes.items():
        weight = rtn(state.pop(f"{name}.weight"), scheme)
        if scheme.activations == INT8_STATIC:
            weight = replace(weight, input_scale=torch.tensor([0.03], dtype=weight.scale.dtype))
        state |= {f"{name}.{part}": tensor for part, tensor in native.to_tensors(weight).items()}
    target.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(native.wrap(config, native.describe(schemes))), encoding="utf-8")
    return open_checkpoint(target)
