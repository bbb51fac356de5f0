"""Find a model's structure by looking at it: no list of families, no names of layers.

`skeleton` builds the class that config.json names with its parameters on the meta device (shapes, no memory)
and its buffers real, so that filling in parameters is all that a forward pass still needs. `discover` reads
the rest off the skeleton: the blocks are the heaviest list of like modules, the linears in them are grouped
by running the model's own forward on meta tensors and seeing which of them are handed the very same input.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.core_model_loading import build_glob_alternation
from transformers.modeling_utils import str_to_torch_dtype
from transformers.pytorch_utils import Conv1D

from llmcomp import native
from llmcomp.adapters.base import Adapter, Block, LinearRef
from llmcomp.adapters.chains import chains_of, ends, ref_of
from llmcomp.adapters.trace import Trace, linears, trace
from llmcomp.errors import BadCheckpoint, UnknownArchitecture
from llmcomp.experts import expert_shares, fused_parameters, gates, split_experts, why_fused
from llmcomp.feeds import IDS, main_input, task_beyond_text, unknown_feed
from llmcomp.sentences import is_sentence_encoder
from llmcomp.shards import read_json_object

_ROUTER = "router: it decides which experts a token goes to"
# The first suffix of the class name that fits tells the task; a class without one is a bare encoder.
_TASKS = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForPreTraining": "pretraining",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForNextSentencePrediction": "next-sentence-prediction",
}


def skeleton(path: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The model that `path`/config.json names: parameters on meta, buffers computed, eval mode, ties tied.

    Its dtypes are those that plain `from_pretrained(path)` gives: the config's dtype (or, where the config
    has none, that of the first floating tensor in the weights), and float32 where the class insists on it.
    Experts are taken apart (`llmcomp.experts`).

    Args:
        path: a directory with config.json; weights are not read.
        trust_remote_code: run model code that lies in the directory.

    Raises:
        BadCheckpoint: a config that transformers refuses, or a shard whose header says no dtype.
        UnknownArchitecture: a model type or class that transformers does not have.
    """
    config = _config(Path(path), trust_remote_code)
    kind = _model_class(config, Path(path), trust_remote_code)
    dtype = config.dtype or _stored_dtype(Path(path))
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return _built(kind, copy.deepcopy(config), dtype)


def resized(model: Any, changes: Mapping[str, Any]) -> nn.Module:
    """A skeleton of the same class with other sizes.

    Args:
        changes: fields of its config, by the names that config.json has.

    Raises:
        ValueError: sizes that transformers refuses; the message says why.
    """
    try:
        config = type(model.config).from_dict({**model.config.to_dict(), **changes})
        return _built(type(model), config, model.dtype)
    except (StrictDataclassError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _built(kind: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """A model with its parameters on meta."""
    with init_empty_weights(include_buffers=False):
        model = kind._from_config(config, dtype=dtype)
    split_experts(model)
    model.tie_weights()  # accelerate makes each registered parameter a new object, which undoes ties
    _keep_in_float32(model, dtype)
    return cast(nn.Module, model.requires_grad_(False).eval())


def discover(model: nn.Module) -> Adapter:
    """The structure of a `skeleton`: blocks, stages, roles, embeddings, head, ties, task.

    Raises:
        UnknownArchitecture: no list of like modules with linears in it, no token embedding, inputs that
            cannot be made, or experts that could not be taken apart; the message shows what was found.
    """
    architecture = type(model).__name__
    if problem := unknown_feed(model):
        raise UnknownArchitecture(f"{architecture} {problem}.")
    if fused := fused_parameters(model):
        raise UnknownArchitecture(
            f"{architecture} keeps its experts in fused parameters ({fused[0]} and {len(fused) - 1} more) "
            f"{why_fused(model)}; most of the model would stay as it is."
        )
    part, chains = chains_of(model)
    found = {f"{chain}.{index}": layer for chain, layers in chains.items() for index, layer in enumerate(layers)}
    names = list(found)
    traced = trace(model, names)
    applications = _applications(architecture, names, traced)
    blocks = tuple(
        _block(index, name, layer, applications[name], traced)
        for index, (name, layer) in enumerate(found.items())
    )
    ties = _ties(model)
    embeddings, head, shared = ends(model, ties)
    claimed = {ref.name for ref in (*(ref for block in blocks for ref in block.linears), embeddings, head) if ref}
    return Adapter(
        model=model,
        config=model.config,
        task=_task(architecture),
        blocks=blocks,
        embeddings=embeddings,
        head=head,
        ties=ties,
        uncompressed=shared | _uncompressed(model, claimed | set(shared), tuple(f"{chain}." for chain in chains), part),
        sample_tokens=None if main_input(model) == IDS else _tokens(blocks, traced),
        trace_problem=traced.problem,
    )


def _task(architecture: str) -> str:
    if (beyond := task_beyond_text(architecture)) is not None:
        return beyond
    return next((task for suffix, task in _TASKS.items() if suffix in architecture), "encoder")


# --- the skeleton ---


def _config(path: Path, trust_remote_code: bool) -> Any:
    try:
        native.register(read_json_object(Path(path) / "config.json"))
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        if "does not recognize this architecture" in reason or "Unrecognized model" in reason:
            raise UnknownArchitecture(
                f"{path}/config.json names no model type that transformers {transformers.__version__} knows; "
                "a newer transformers may know it."
            ) from error
        raise BadCheckpoint(f"transformers refuses {path}/config.json: {reason[:300]}") from error


def _model_class(config: Any, path: Path, trust_remote_code: bool) -> Any:
    """The class of config.architectures[0]; the bare model of the config's type where none is named, or where
    sentence-transformers uses the model without its head."""
    name = (config.architectures or [None])[0]
    kinds: Any = transformers.MODEL_MAPPING
    headless = name is None or (_task(name) != "encoder" and is_sentence_encoder(path))
    if headless and type(config) in kinds:
        return kinds[type(config)]
    if name is None:
        raise UnknownArchitecture(f"{path}/config.json names no architecture, nor a type with one.")
    auto_map = getattr(config, "auto_map", None) or {}
    for reference in auto_map.values() if trust_remote_code else ():
        if str(reference).rsplit(".", 1)[-1] == name:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            return get_class_from_dynamic_module(reference, str(path))
    if (found := getattr(transformers, name, None)) is not None:
        return found
    raise UnknownArchitecture(
        f"{path}/config.json names the architecture {name}, which transformers {transformers.__version__} "
        "does not have; a newer transformers may, or the model brings its own code (--trust-remote-code)."
    )


def _stored_dtype(path: Path) -> torch.dtype:
    """Dtype of the first floating tensor, as from_pretrained looks for it; float32 where there is none."""
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as handle:
                stored = [handle.get_slice(key).get_dtype() for key in handle.keys()]  # noqa: SIM118
        except SafetensorError as error:
            raise BadCheckpoint(f"{file} is truncated or corrupt ({error}); copy it again.") from error
        for dtype in (str_to_torch_dtype.get(name) for name in stored):
            if dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                return dtype
    return torch.float32


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    wanted, _, _ = build_glob_alternation(list(plan))
    for name, parameter in model.named_parameters():
        if wanted.search(name):
            parameter.data = parameter.data.to(torch.float32)


# --- blocks ---


def _tokens(blocks: Sequence[Block], traced: Trace) -> int | None:
    """Tokens that one sample becomes, as the first linear reads them."""
    read = traced.inputs.get(blocks[0].linears[0].name)
    return None if read is None else read.numel() // read.shape[-1]


def _applications(architecture: str, names: Sequence[str], traced: Trace) -> dict[str, int]:
    """How often in a row each block is run; once where the forward could not be followed."""
    visited = [name for name in traced.order if name in names]
    runs = [(name, len(list(run))) for name, run in groupby(visited)]
    if len(runs) != len({name for name, _ in runs}):
        order = ", ".join(name.rpartition(".")[2] for name in visited[:8]) + ", …" * (len(visited) > 8)
        raise UnknownArchitecture(
            f"{architecture} comes back to an earlier block (its blocks run in the order {order}); llmcomp "
            "compresses blocks that are run once, or several times in a row."
        )
    return dict.fromkeys(names, 1) | dict(runs)


def _block(index: int, name: str, layer: nn.Module, applications: int, traced: Trace) -> Block:
    """Group the linears of one block by the identity of their input; one by one where nothing was traced."""
    shares = {f"{name}.{inner}": share for inner, share in expert_shares(layer).items()}
    weighing = {f"{name}.{inner}" for inner in gates(layer)}
    refs = {
        n: replace(ref_of(n, m, _role(layer, n[len(name) + 1 :]), index), share=shares.get(n, 1.0))
        for n, m in linears(layer, name)
        if n not in weighing
    }
    if traced.problem is not None:
        alone = tuple((ref,) for ref in refs.values())
        return Block(index, name, alone, lasting=frozenset(refs))
    stages: dict[int, list[LinearRef]] = {}
    for called, tensor in traced.inputs.items():
        if called in refs:
            stages.setdefault(id(tensor), []).append(refs[called])
    found = tuple(tuple(stage) for stage in stages.values())
    return Block(index, name, found, applications, _lasting(found, traced.order))


def _lasting(stages: Sequence[Sequence[LinearRef]], order: Sequence[str]) -> frozenset[str]:
    """Names of the linears that are still to be computed when the stage after their own begins."""
    last = {name: place for place, name in enumerate(order)}
    found = set()
    for stage, following in pairwise(stages):
        begins = order.index(following[0].name)
        found |= {ref.name for ref in stage if last[ref.name] > begins}
    return frozenset(found)


def _role(layer: nn.Module, path: str) -> str:
    """attention where a module on the way to the linear is one, by its attribute or class; else mlp."""
    parts = path.split(".")[:-1]
    modules = (layer.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts)))
    for part, module in zip(parts, modules, strict=True):
        if re.search(r"attn|attention", f"{part} {type(module).__name__}", re.IGNORECASE):
            return "attention"
    return "mlp"


# --- around the blocks ---


def _ties(model: Any) -> dict[str, str]:
    """Ties in force: as the class names them, where this config and this instance have both ends."""
    names = set(model.state_dict())
    return {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if target in names and source in names
    }


def _uncompressed(model: nn.Module, claimed: set[str], chains: tuple[str, ...], part: str) -> dict[str, str]:
    """Matrices that nothing will compress: name → why. Embeddings of positions and types are left out.

    Args:
        chains: what names within the blocks begin with. part: of the model that is compressed, '' for all of it.
    """
    labels = getattr(model.config, "num_labels", None)
    reasons: dict[str, str] = dict.fromkeys(gates(model), _ROUTER)
    for name, module in model.named_modules():
        if name in claimed or name in reasons or isinstance(module, nn.Embedding):
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            reasons[name] = _why(name, module, chains, part, labels)
            continue
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            if parameter.dim() > 1:
                reasons[key] = _why_not_linear(parameter, module)
    return reasons


def _why_not_linear(parameter: nn.Parameter, module: nn.Module) -> str:
    if "router" in type(module).__name__.lower():
        return _ROUTER
    shape = "x".join(map(str, parameter.shape))
    return f"no linear layer: a {shape} parameter of {type(module).__name__}"


def _why(name: str, module: Any, chains: tuple[str, ...], part: str, labels: int | None) -> str:
    if name.startswith(chains):
        return "not used by a plain forward pass"
    if part and not name.startswith(f"{part}."):
        return "no part of the language model, which alone is compressed"
    if "pool" in name:
        return "pooler, outside of the blocks"
    if isinstance(module, nn.Linear) and module.out_features == labels:
        return "classifier: its outputs are the answer itself"
    return "outside of the blocks"
