"""Mixtures of experts taken apart: transformers keeps a block's experts as one 3-D parameter, files keep each alone.

`split_experts` puts a list of experts made of `nn.Linear` in the place of each fused module, with the names that
the files have (`experts.3.w1`, `experts.3.gate_proj`), so that whoever looks for linears finds them. Which part of
the fused parameter is which stored tensor is read from transformers' own conversion table.

Every expert is called in every forward, in order, with the tokens that are routed to it, be it none: calibration
windows take one and the same way through the model.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_SOURCE = re.compile(r"experts\\?\.\*\\?\.(?P<leaf>\w+)\\?\.weight$")


class Expert(nn.Module):
    """One expert: `names` of its gate, up and down projection; weights [out, in] as in the fused parameter.

    Args:
        activation: between them, on the gate.
        gate_up: [2 · inner, hidden], of which the expert's weights are views.
        down: [hidden, inner].
    """

    def __init__(self, names: Sequence[str], activation: Any, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.names = tuple(names)
        gate, up = gate_up.chunk(2)
        for name, weight in zip(self.names, (gate, up, down), strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, linear)
        self.activation = activation

    def forward(self, tokens: Tensor) -> Tensor:
        """[tokens, hidden] → [tokens, hidden]."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        inner: Tensor = down(self.activation(gate(tokens)) * up(tokens))
        return inner


class SplitExperts(nn.ModuleList):
    """Experts side by side, called as the fused module is; `chosen`: how many of them a token goes to."""

    def __init__(self, experts: Sequence[Expert], chosen: int) -> None:
        super().__init__(experts)
        self.chosen = chosen

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the chosen experts make of each token, added up by their weights.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index, top_k_weights: [tokens, chosen], the experts and their weights.
        """
        chosen = top_k_index.shape[-1]
        choices, weights = top_k_index.reshape(-1), top_k_weights.reshape(-1, 1)
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        total = torch.zeros_like(hidden_states, dtype=wide)
        order = choices.argsort(stable=True)
        for expert, places in zip(self, order.split(self._counts(choices)), strict=True):
            rows = places // chosen
            total.index_add_(0, rows, (expert(hidden_states[rows]) * weights[places]).to(wide))
        return total.to(hidden_states.dtype)

    def _counts(self, choices: Tensor) -> list[int]:
        """How many tokens each expert gets; without values, as even a share as can be."""
        if not choices.is_meta:
            counts: list[int] = choices.bincount(minlength=len(self)).tolist()
            return counts
        share, rest = divmod(len(choices), len(self))
        return [share + (number < rest) for number in range(len(self))]


@dataclass(frozen=True)
class _Fused:
    """A fused module, its place, what its experts' projections are called in files, and how many are chosen."""

    name: str
    module: Any
    names: tuple[str, str, str]
    chosen: int


def split_experts(model: nn.Module) -> None:
    """Take every fused module of experts apart, in place, on meta or not; weights are views of the fused ones.

    Modules that are stored or computed in a way that is not known stay fused (`fused_parameters` tells).
    """
    for fused in list(_fused(model)):
        gate_up, down = (getattr(fused.module, name) for name in (_GATE_UP, _DOWN))
        activation = fused.module.act_fn
        experts = [Expert(fused.names, activation, gate_up[n], down[n]) for n in range(len(gate_up))]
        model.set_submodule(fused.name, SplitExperts(experts, fused.chosen).train(fused.module.training))


def fused_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that hold several experts at once."""
    found = []
    for name, module in model.named_modules():
        if re.search("experts", f"{name.rpartition('.')[2]} {type(module).__name__}", re.IGNORECASE):
            found += [f"{name}.{key}" for key, value in module.named_parameters(recurse=False) if value.dim() == 3]
    return found


def why_fused(model: nn.Module) -> str:
    """Why experts of `fused_parameters` were not taken apart, as the middle of a sentence.

    Where transformers merges experts as it loads them, it decodes them, too; where files hold them merged, as
    GPT-OSS's, it looks for exactly that tensor, and packed ones, merged or one by one, are unexpected keys.
    """
    merged = {name.rpartition(".")[0] for name in fused_parameters(model)}
    if merged and not any(_leaves(_stored_names(model), f"{name}.{_DOWN}") for name in merged):
        return "that lie so in files, where transformers reads no packed ones"
    return "in a way that llmcomp cannot take apart"


def expert_shares(model: nn.Module) -> dict[str, float]:
    """{name of a linear of an expert: share of the tokens that reach it, if the router is even}, of experts
    that `split_experts` has taken apart."""
    return {
        name: module.chosen / len(module)
        for path, module in model.named_modules()
        if isinstance(module, SplitExperts)
        for name, child in module.named_modules(prefix=path)
        if isinstance(child, nn.Linear)
    }


def gates(model: nn.Module) -> set[str]:
    """Names of the linears beside experts that weigh them: routers, and gates of a shared expert."""
    found = set()
    for path, module in model.named_modules():
        if isinstance(module, SplitExperts):
            parent = path.rpartition(".")[0]
            beside = model.get_submodule(parent).named_children()
            found |= {
                f"{parent}.{name}".lstrip(".")
                for name, child in beside
                if isinstance(child, nn.Linear) and child.out_features <= len(module)
            }
    return found


def file_renaming(model: Any) -> Callable[[str], str]:
    """How transformers renames a key of a file, such as Mixtral's `block_sparse_moe` to `mlp`, as it loads it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    return lambda key: apply_renamings(key, renamings)


def _fused(model: nn.Module) -> Iterator[_Fused]:
    candidates = [(name, module) for name, module in model.named_modules() if _is_known(module)]
    if not candidates:
        return
    sources = _stored_names(model)
    for name, module in candidates:
        leaves = [_leaves(sources, f"{name}.{key}") for key in (_GATE_UP, _DOWN)]
        chosen = getattr(module.config, "num_experts_per_tok", None)
        if [len(found) for found in leaves] == [2, 1] and isinstance(chosen, int):
            yield _Fused(name, module, (leaves[0][0], leaves[0][1], leaves[1][0]), chosen)


def _is_known(module: Any) -> bool:
    """Gate and up side by side, [experts, out, in], no biases, activation(gate) · up."""
    from transformers.integrations.moe import _default_apply_gate

    flags = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
    if tuple(getattr(module, flag, None) for flag in flags) != (True, False, False, False, True):
        return False
    shapes = {key: value.dim() for key, value in module.named_parameters()}
    arguments = list(inspect.signature(type(module).forward).parameters)
    return (
        shapes == {_GATE_UP: 3, _DOWN: 3}
        and hasattr(module, "act_fn")
        and type(module)._apply_gate is _default_apply_gate
        and arguments == ["self", "hidden_states", "top_k_index", "top_k_weights"]
    )


def _stored_names(model: Any) -> dict[str, list[str]]:
    """{end of a fused parameter's name: what its parts are called in files}, of merges that can be undone."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    found: dict[str, list[str]] = {}
    for converter in get_model_conversion_mapping(model):
        if not isinstance(converter, WeightConverter):
            continue
        steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
        merges = [(MergeModulelist, 0), (Concatenate, 1)][: len(converter._original_source_patterns)]
        matches = [_SOURCE.search(source) for source in converter._original_source_patterns]
        if steps == merges and all(matches) and len(converter._original_target_patterns) == 1:
            target = converter._original_target_patterns[0].replace("\\", "").lstrip("^")
            found[target] = [match["leaf"] for match in matches if match]
    return found


def _leaves(sources: dict[str, list[str]], name: str) -> list[str]:
    return next((leaves for target, leaves in sources.items() if f".{name}".endswith(target)), [])
