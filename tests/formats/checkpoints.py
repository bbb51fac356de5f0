"""Tiny models, rounded to nearest, written by llmcomp.formats together with their witness."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from llmcomp.activations import quantize_inputs, quantized, static_scale
from llmcomp.adapters.base import LinearRef
from llmcomp.formats import FORMATS, broken_ties, witness
from llmcomp.formats.base import Layout
from llmcomp.formats.save import ShardWriter, checkpoint_config, partial_of
from llmcomp.kinds import Kind, LowRank, integers_of
from llmcomp.schemes import INT8_STATIC, Scheme
from llmcomp.weights import INPUT_SCALE, CompressedWeight, LowRankWeight, QuantizedWeight, SparseWeight

INPUTS = {
    "input_ids": torch.tensor([[5, 17, 3, 80, 9, 41, 2, 6], [7, 1, 99, 23, 0, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 8, [1] * 4 + [0] * 4]),
}


def llama(tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=160, max_position_embeddings=64, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _made(LlamaForCausalLM, config, dtype)


def bert(dtype: torch.dtype = torch.float32, kind: type = BertForMaskedLM) -> Any:
    config = BertConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=160,
        max_position_embeddings=64,
    )  # fmt: skip
    return _made(kind, config, dtype)


def bare_bert(dtype: torch.dtype = torch.float32) -> BertModel:
    return bert(dtype, BertModel)


def gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_embd=128, n_layer=2, n_head=4, vocab_size=160, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return _made(GPT2LMHeadModel, config, dtype)


def _made(kind: type, config: object, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return kind(config).to(dtype).eval()


def rtn(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round to nearest, the plainest way."""
    rows, columns = weight.shape
    grouped = weight.float().reshape(rows, scheme.groups(columns), -1)
    if scheme.symmetric:
        scale = (grouped.abs().amax(-1) / scheme.qmax).clamp_min(1e-6).to(weight.dtype)
        zero = torch.zeros_like(scale)
    else:
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        scale = ((high - low) / (scheme.qmax - scheme.qmin)).clamp_min(1e-6).to(weight.dtype)
        zero = (scheme.qmin - low / scale.float()).round().clamp(scheme.qmin, scheme.qmax)
    values = (grouped / scale.float()[..., None] + zero.float()[..., None]).round()
    values = values.clamp(scheme.qmin, scheme.qmax).to(torch.int8).reshape(rows, columns)
    return QuantizedWeight(values, scale, None if scheme.symmetric else zero.to(torch.int8), scheme)


def made(weight: Tensor, kind: Kind) -> CompressedWeight:
    """A weight [out, in] as that kind, the plainest way: nearest integers, largest of each group, SVD."""
    if isinstance(kind, Scheme):
        return rtn(weight, kind)
    if isinstance(kind, LowRank):
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        left, right = u[:, : kind.rank] * s[: kind.rank], v[: kind.rank]
        held = LowRankWeight(left.to(weight.dtype), right.to(weight.dtype))
        parts = {"left": held.left, "right": held.right, "base": weight}
        whole = {part: rtn(one, scheme) for part, one in parts.items() if (scheme := getattr(kind, part)) is not None}
        return replace(held, **whole)
    assert kind.pattern.kept is not None and kind.pattern.of is not None
    groups = weight.abs().reshape(len(weight), -1, kind.pattern.of)
    mask = (groups.argsort(-1, descending=True).argsort(-1) < kind.pattern.kept).view(weight.shape)
    sparse = weight.masked_fill(~mask, 0)
    if kind.values is None:
        return SparseWeight(sparse, mask, kind.pattern)
    return replace(rtn(sparse, kind.values), pattern=kind.pattern, mask=mask)


def ref(model: nn.Module, name: str) -> LinearRef:
    weight = model.get_submodule(name).weight
    transposed = isinstance(model.get_submodule(name), Conv1D)
    out_features, in_features = reversed(weight.shape) if transposed else weight.shape
    inside = re.search(r"\.(\d+)\.", name)
    role = "mlp" if inside else "embeddings" if "emb" in name or "wte" in name else "head"
    return LinearRef(name, role, int(inside[1]) if inside else None, out_features, in_features, transposed)


def linears(model: nn.Module) -> list[str]:
    """Names of the linears inside the blocks."""
    kinds = (nn.Linear, Conv1D)
    return [name for name, m in model.named_modules() if isinstance(m, kinds) and re.search(r"\.\d+\.", name)]


@dataclass
class Written:
    """A finished, unpublished checkpoint with its witness."""

    writer: ShardWriter
    directory: Path
    witness: Path
    layout: Layout
    dense: dict[str, Tensor]
    sizes: dict[str, int]


def write(
    folder: Path, model: nn.Module, schemes: Mapping[str, Kind], form: str = "compressed-tensors"
) -> Written:
    """Quantize `schemes`' modules and write everything, one shard a block."""
    entries = [(ref(model, name), scheme) for name, scheme in schemes.items()]
    layout = FORMATS[form](entries, model)
    source = {k: (tuple(v.shape), witness.dtype_name(v.dtype)) for k, v in model.state_dict().items()}
    ties = dict(model.all_tied_weights_keys)
    packed = {} if form == "dense" else {r.name: s.label for r, s in entries if r.name not in layout.dense}
    broken = broken_ties(ties, list(schemes))
    scales = _input_scales(model, [r.name for r, kind in entries if _activations(kind) == INT8_STATIC])
    shards, sizes = _shards(model, entries, layout, scales)
    for name in set(ties) - set(broken):
        shards["block-99999"].pop(name, None)
    writer = ShardWriter(partial_of(folder / "out"))
    place = writer.partial / "witness"
    plain = _replaced(model, entries)
    for key, tensors in shards.items():
        writer.write(key, tensors)
    own = {f"{name}.{INPUT_SCALE}": scale for name, scale in scales.items()}
    witness.record(place, "all", {name: plain[name] for name in source} | own)
    with torch.no_grad():
        model.load_state_dict(plain)
        if broken:
            model.config.tie_word_embeddings = False
        for r, scheme in entries:
            if _activations(scheme):
                quantize_inputs(model.get_submodule(r.name), partial(quantized, scale=scales.get(r.name)))
        output = witness.model_output(model(**INPUTS))
    witness.save(place, compressed=packed, source=source, inputs=INPUTS, output=output)
    dtype = witness.dtype_name(model.dtype)
    config = checkpoint_config(
        model.config.to_dict(), type(model).__name__, dtype, layout.config(model), untied=bool(broken)
    )
    directory = writer.finish(list(shards), config)
    return Written(writer, directory, place, layout, plain, sizes)


def _shards(
    model: nn.Module, entries: list, layout: Layout, scales: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, int]]:
    chosen = {r.name: (r, s) for r, s in entries}
    shards: dict[str, dict[str, Tensor]] = {}
    sizes = {}
    for key, tensor in model.state_dict().items():
        name, _, last = key.rpartition(".")
        inside = re.search(r"\.(\d+)\.", key)
        shard = shards.setdefault(f"block-{int(inside[1]):05d}" if inside else "block-99999", {})
        if last == "weight" and name in chosen:
            r, scheme = chosen[name]
            weight = made(tensor.t() if r.transposed else tensor, scheme)
            if isinstance(weight, QuantizedWeight):
                weight = replace(weight, input_scale=scales.get(name))
            new = layout.tensors(r, weight)
            sizes[name] = sum(t.nbytes for t in new.values())
            shard.update(new)
        else:
            shard[key] = tensor.clone()
    return dict(sorted(shards.items())), sizes


def _activations(kind: Kind) -> str | None:
    scheme = integers_of(kind)
    return None if scheme is None else scheme.activations


def _input_scales(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Half of what each linear reads at most, so that some is clipped."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found.update({name: static_scale(args[0].abs() / 2, args[0].dtype)})
        )
        for name in names
    ]
    with torch.no_grad():
        model(**INPUTS)
    for handle in handles:
        handle.remove()
    return found


def _replaced(model: nn.Module, entries: list) -> dict[str, Tensor]:
    """The state dict with quantized weights decoded, ties broken."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for r, scheme in entries:
        weight = state[f"{r.name}.weight"]
        dense = made(weight.t() if r.transposed else weight, scheme).dense()
        state[f"{r.name}.weight"] = dense.t().contiguous() if r.transposed else dense
    untied = broken_ties(model.all_tied_weights_keys, [r.name for r, _ in entries])
    for target, source in untied.items():
        for name in (target, source):  # load_state_dict must not write one through the other
            owner, _, last = name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, last, nn.Parameter(getattr(module, last).detach().clone()))
    return state
