"""bitsandbytes checkpoints, nf4 and int8: made by transformers from the whole model in memory, loaded the same way.

transformers quantizes each plain nn.Linear or Conv1D that `llm_int8_skip_modules` does not name while it loads, and
`save_pretrained` writes what it made. Measured with transformers 5.23 and bitsandbytes 0.50.2 on a CPU:

- Conv1D (GPT-2) is transposed once and stored [out, in]; it reloads to the same bits.
- An untied head reloads, too. A tied one does not: the tie puts the dense embeddings in its place.
- Embeddings cannot be saved ("not implemented").
- Saving must come before the first forward, which on a CPU with AVX512-BF16 lays 4-bit weights out anew.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcomp import bnb
from llmcomp.errors import BadRecipe
from llmcomp.experts import expert_shares
from llmcomp.formats.base import Entry, Ref, made_when_alone
from llmcomp.kinds import Kind
from llmcomp.weights import CompressedWeight

_SHARD = "5GB"


@dataclass(frozen=True)
class BnbLayout:
    """`formats.base.Layout` of a bitsandbytes checkpoint.

    Attributes:
        kind: nf4 or int8. modules: names of those that are quantized. dtype: of the dense weights.
    """

    kind: bnb.Kind
    modules: frozenset[str]
    dtype: torch.dtype
    dense: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def tensors(self, ref: Ref, weight: CompressedWeight) -> dict[str, Tensor]:
        return {f"{ref.name}.{part}": value for part, value in bnb.encode(self.kind, weight.dense()).items()}

    def blank(self, ref: Ref, kind: Kind, dtype: torch.dtype) -> dict[str, Tensor]:
        dense = torch.empty(ref.out_features, ref.in_features, dtype=dtype, device="meta")
        return {f"{ref.name}.{part}": value for part, value in bnb.encode(self.kind, dense).items()}

    def decode(self, ref: Ref, tensors: Mapping[str, Tensor]) -> Tensor:
        own = {name.removeprefix(f"{ref.name}."): tensor for name, tensor in tensors.items()}
        return bnb.Stored(self.kind, self.dtype, ref.transposed).decode(own)

    def nbytes(self, ref: Ref, itemsize: int) -> int:
        weight = torch.empty(ref.out_features, ref.in_features, dtype=self.dtype, device="meta")
        return sum(tensor.nbytes for tensor in bnb.encode(self.kind, weight).values())

    def config(self, model: nn.Module) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        common = {"llm_int8_skip_modules": skipped(model, self.modules)}
        if self.kind is bnb.INT8:
            made = BitsAndBytesConfig(load_in_8bit=True, **common)
        else:
            made = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self.dtype, **common
            )
        found: dict[str, Any] = made.to_dict()
        return found


def nf4(entries: Sequence[Entry], model: nn.Module | None = None) -> BnbLayout:
    """The layout of an NF4 checkpoint.

    Raises:
        BadRecipe: weights that bitsandbytes cannot carry.
    """
    return _layout(bnb.NF4, entries, model)


def int8(entries: Sequence[Entry], model: nn.Module | None = None) -> BnbLayout:
    """The layout of an LLM.int8 checkpoint.

    Raises:
        BadRecipe: weights that bitsandbytes cannot carry.
    """
    return _layout(bnb.INT8, entries, model)


def load(kind: type[Any], path: Path, layout: BnbLayout, model: nn.Module, *, allow_pickle: bool) -> Any:
    """The model in `path`, quantized by transformers while it loads, on the CPU, in eval mode; never run yet.

    Args:
        kind: its class. model: a skeleton of it.
    """
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig.from_dict(layout.config(model))
    found = kind.from_pretrained(
        str(path), quantization_config=config, dtype=layout.dtype, device_map={"": "cpu"},
        local_files_only=True, use_safetensors=None if allow_pickle else True,
    )  # fmt: skip
    return found.eval()


def save(model: Any, directory: Path) -> None:
    """Write a model that has not run yet; files as transformers names them, their shards of at most 5 GB."""
    model.save_pretrained(directory, max_shard_size=_SHARD)


def skipped(model: nn.Module, quantized: Collection[str]) -> list[str]:
    """`llm_int8_skip_modules` that leave exactly `quantized`, with and without the model's base prefix, because
    AutoModel loads a causal LM's checkpoint without it.

    Plain names, which other readers understand as well; where transformers would take one for the end of a
    quantized name ('dense' of 'layer.0.dense'), the name as a whole, anchored.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    kept = {*quantized, *(name.removeprefix(prefix) for name in quantized)}
    left = {name.removeprefix(prefix) for name in bnb.convertible(model) if name not in quantized}
    optional = f"(?:{re.escape(prefix)})?" if prefix != "." else ""
    return [
        f"{optional}{re.escape(name)}$" if any(_catches(name, other) for other in kept) else name
        for name in sorted(left | made_when_alone(model))
    ]


def _catches(pattern: str, name: str) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(name, [pattern])


def _layout(kind: bnb.Kind, entries: Sequence[Entry], model: nn.Module | None) -> BnbLayout:
    problems, dtype = [], getattr(model, "dtype", torch.float32)
    names = [ref.name for ref, _ in entries]
    if any(ref.role == "embeddings" for ref, _ in entries):
        problems.append("it has no embeddings that can be saved; leave them out of the targets")
    if model is not None and expert_shares(model):
        problems.append("transformers keeps this model's experts fused, which it would leave as they are")
    elif model is not None:
        plain, tied = set(bnb.convertible(model)), _tied(model)
        if shared := next((name for name in names if name in tied and name in plain), None):
            problems.append(f"{shared} shares its storage with the embeddings; leave it out of the targets")
        odd = next((ref.name for ref, _ in entries if ref.role != "embeddings" and ref.name not in plain), None)
        if odd is not None:
            problems.append(
                f"{odd} is no plain linear, or one that transformers keeps in float32; leave it and its like out by "
                f"--skip {odd.rpartition('.')[2]}"
            )
    uneven = next((ref for ref, _ in entries if ref.in_features % bnb.BLOCK), None)
    if kind is bnb.NF4 and uneven is not None:
        problems.append(
            f"{uneven.name} has {uneven.in_features} inputs, and weights whose rows its blocks of {bnb.BLOCK} do not "
            f"divide it computes wrongly on CPUs with AVX512; take bnb-int8 or --skip {uneven.name.rpartition('.')[2]}"
        )
    if problems:
        raise BadRecipe(f"bitsandbytes cannot carry all that the recipe targets: {'; '.join(problems)}.")
    return BnbLayout(kind, frozenset(names), dtype)


def _tied(model: nn.Module) -> set[str]:
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {name.removesuffix(".weight") for name in (*ties, *ties.values())}
