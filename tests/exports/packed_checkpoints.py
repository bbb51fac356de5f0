"""Tiny checkpoints in llmcomp's own layout, each linear rounded to nearest by a scheme of its own, and what
transformers and an exported file make of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import rtn
from safetensors.torch import save_file
from torch import Tensor, nn

from llmcomp import native
from llmcomp.formats.opening import Opened, open_checkpoint
from llmcomp.formats.reading import auto_class, model_config
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
        state |= {f"{name}.{part}": tensor for part, tensor in native.to_tensors(weight, "embed" in name).items()}
    target.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(native.wrap(config, native.describe(schemes))), encoding="utf-8")
    return open_checkpoint(target)


def dense_model(opened: Opened) -> Any:
    """The model as transformers has it, with the decoded weights in float32."""
    config = model_config(opened.directory)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict({name: value.float() for name, value in opened.dense()}, strict=False)
    model.tie_weights()
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model


def logits_by_steps(
    run: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]], opened: Opened, ids: Tensor
) -> np.ndarray:
    """What a decoder answers to six tokens with an empty past, then four with its cache, then one by one."""
    config, (rows, tokens), logits = opened.config, ids.shape, []
    shape = (rows, config["num_key_value_heads"], 0, config["head_dim"])
    layers = range(config["num_hidden_layers"])
    past = {f"past_key_values.{n}.{k}": np.zeros(shape, np.float32) for n in layers for k in ("key", "value")}
    for start, end in ((0, 6), (6, 10), *((at, at + 1) for at in range(10, tokens))):
        inputs = {
            "input_ids": ids[:, start:end].numpy(),
            "attention_mask": np.ones((rows, end), np.int64),
            "position_ids": np.tile(np.arange(start, end), (rows, 1)),
        }
        found = run({**inputs, **past})
        logits.append(found.pop("logits"))
        past = {name.replace("present", "past_key_values"): value for name, value in found.items()}
    assert {value.shape[2] for value in past.values()} == {tokens}
    return np.concatenate(logits, 1)


def relative(found: np.ndarray, wanted: Tensor) -> float:
    """Root mean square of the difference over the standard deviation, in float64."""
    gap = found.astype(np.float64) - wanted.double().numpy()
    return float(np.sqrt(np.square(gap).mean()) / wanted.double().std())
