"""What llama.cpp wants to know of a model: its architecture there, the names of its tensors, the numbers of its config.

Each family that is listed is run in llama.cpp and compared with transformers by `tests/evals/test_gguf_llama_cpp.py`.
Whatever a config can say that llama.cpp's graph for the family does not compute is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmcomp.errors import UnknownArchitecture

ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Family:
    """A class of transformers in llama.cpp.

    Attributes:
        arch: llama.cpp's name of it.
        activation: of the MLP; its graph knows no other.
        neighbours: llama.cpp turns neighbouring features of a head where transformers turns a feature and the one half
            a head further; rows of q and k are brought into that order.
        norm_shift: added to the norms' weights (Gemma multiplies by 1 + weight).
        windows: blocks that look back a limited way are written as such.
        keys: further metadata, from writer and config.
        problem: what of a config its graph does not compute, or None.
    """

    arch: str
    activation: str = "silu"
    neighbours: bool = False
    norm_shift: float = 0.0
    windows: bool = False
    keys: Callable[[Any, Any], None] = lambda writer, config: None
    problem: Callable[[Any], str | None] = lambda config: None


def family_of(architecture: str, config: Any) -> Family:
    """The family of a class of transformers, if llama.cpp computes what this config says.

    Raises:
        UnknownArchitecture: it does not, or it is a class that has not been tried.
    """
    family = FAMILIES.get(architecture)
    if family is None:
        raise UnknownArchitecture(
            f"{architecture} cannot be exported as GGUF; these can: {', '.join(sorted(FAMILIES))}."
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    problem = family.problem(config)
    if activation != family.activation:
        problem = f"its MLP computes {activation}, not {family.activation}"
    if problem is not None:
        raise UnknownArchitecture(f"This {architecture} cannot be exported as GGUF: {problem}.")
    return family


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def row_order(name: str, family: Family, config: Any) -> np.ndarray | None:
    """In which order rows of this module are written, int64 [out], or None for their own."""
    kind = name.rpartition(".")[2]
    if not family.neighbours or kind not in ("q_proj", "k_proj"):
        return None
    heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
    rows = np.arange(heads * head_dim(config)).reshape(heads, 2, head_dim(config) // 2)
    return rows.swapaxes(1, 2).reshape(-1)


def names_of(family: Family, config: Any) -> Callable[[str], str | None]:
    """From a tensor's name in transformers to its name in GGUF, None for one that GGUF has no name for."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)

    def name_of(name: str) -> str | None:
        return table.get_name(name, try_suffixes=(".weight", ".bias"))

    return name_of


def write_config(writer: Any, family: Family, config: Any) -> dict[str, np.ndarray]:
    """Write the metadata of the graph; returns further tensors that it needs, by their names in GGUF.

    Raises:
        UnknownArchitecture: rotary positions that are scaled in a way that llama.cpp does not know.
    """
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    family.keys(writer, config)
    if family.windows and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    return _write_rope(writer, family, config)


def beyond_window(family: Family, config: Any) -> int | None:
    """How far back the model looks, where llama.cpp looks at everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if family.windows or not window or window >= config.max_position_embeddings:
        return None
    if getattr(config, "use_sliding_window", True) is False or (kinds and "sliding_attention" not in kinds):
        return None
    return int(window)


def as_dense(tensor: torch.Tensor, name: str, family: Family) -> np.ndarray:
    """A tensor that is not packed as the file holds it.

    Vectors as F32, which llama.cpp's kernels ask for; matrices of bfloat16 as BF16 (their bits), others as F16.

    Raises:
        ValueError: numbers that float16 does not hold.
    """
    if tensor.dim() == 1:
        shift = family.norm_shift if name.endswith("norm.weight") else 0.0
        return (tensor.float() + shift).numpy()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy()
    half = tensor.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ValueError("it holds numbers that float16 does not")
    return half.contiguous().numpy()


# --- rotary positions ---


def _write_rope(writer: Any, family: Family, config: Any) -> dict[str, np.ndarray]:
    rope = dict(config.rope_parameters)
    if "full_attention" in rope:  # a kind for the blocks that look at everything, one for the others
        local, rope = dict(rope["sliding_attention"] or {}), dict(rope["full_attention"])
        if local.get("rope_type", "default") != "default":
            raise _unknown_rope(f"{local['rope_type']} in blocks with a window")
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    dimensions = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))
    if dimensions != head_dim(config) and family.arch != "phi3":
        raise _unknown_rope(f"on {dimensions} of {head_dim(config)} features")
    writer.add_rope_dimension_count(dimensions)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        _add_scaling(writer, kind, rope)
    elif kind == "yarn":
        unusual = {"attention_factor", "mscale", "mscale_all_dim"} & {key for key in rope if rope[key] is not None}
        if unusual or rope.get("truncate") is False:
            raise _unknown_rope(f"yarn with {', '.join(sorted(unusual) or ['truncate: false'])}")
        _add_scaling(writer, kind, rope)
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
    elif kind == "llama3" and family.arch == "llama":
        return {ROPE_FREQS: llama3_factors(rope, dimensions)}
    elif kind != "default":
        raise _unknown_rope(str(kind))
    return {}


def _add_scaling(writer: Any, kind: str, rope: Mapping[str, Any]) -> None:
    import gguf

    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(float(rope["factor"]))


def _unknown_rope(what: str) -> UnknownArchitecture:
    return UnknownArchitecture(f"GGUF cannot hold this model's rotary positions: {what}.")


def llama3_factors(rope: Mapping[str, Any], dimensions: int) -> np.ndarray:
    """By what Llama 3.1 divides each frequency, float32 [dimensions / 2] (transformers' `modeling_rope_utils`).

    High frequencies stay, low ones are divided by `factor`, between them their sum is weighed by the wavelength.
    """
    frequency = 1.0 / rope["rope_theta"] ** (np.arange(0, dimensions, 2, dtype=np.float64) / dimensions)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


# --- families ---


def _granite_keys(writer: Any, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _gemma_keys(writer: Any, config: Any) -> None:
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        writer.add_attn_logit_softcapping(cap)
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        writer.add_final_logit_softcapping(cap)


def _gemma_problem(config: Any) -> str | None:
    # llama.cpp knows the one model that scales otherwise (27B) by its count of blocks.
    largest = config.num_hidden_layers in (46, 62)
    wanted = config.hidden_size // config.num_attention_heads if largest else head_dim(config)
    if config.query_pre_attn_scalar != wanted:
        return f"it divides attention by the root of {config.query_pre_attn_scalar}, llama.cpp by that of {wanted}"
    if config.model_type == "gemma2" and None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        return "it does not cap logits"
    if config.model_type != "gemma2" and config.attn_logit_softcapping is not None:
        return "it caps logits of attention"
    return None


def _smollm3_problem(config: Any) -> str | None:
    usual = [int((block + 1) % 4 != 0) for block in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) != usual:
        return "llama.cpp leaves positions out in each fourth block, and it in others"
    return None


def _own_heads(config: Any) -> str | None:
    if head_dim(config) * config.num_attention_heads != config.hidden_size:
        return f"its {config.num_attention_heads} heads of {head_dim(config)} are not {config.hidden_size} together"
    return None


_GEMMA: dict[str, Any] = {
    "activation": "gelu_pytorch_tanh",
    "norm_shift": 1.0,
    "windows": True,
    "keys": _gemma_keys,
    "problem": _gemma_problem,
}
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", neighbours=True),
    "MistralForCausalLM": Family("llama", neighbours=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "SmolLM3ForCausalLM": Family("smollm3", neighbours=True, problem=_smollm3_problem),
    "GraniteForCausalLM": Family("granite", neighbours=True, keys=_granite_keys, problem=_own_heads),
    "Phi3ForCausalLM": Family("phi3"),
    "Gemma2ForCausalLM": Family("gemma2", **_GEMMA),
    "Gemma3ForCausalLM": Family("gemma3", **_GEMMA),
}
