"""What discovery must find in each tiny architecture, written out by hand from the models' own code.

STAGES: name → (name of the list of blocks, how many, stages of a block by names inside it).
"""

from __future__ import annotations

import re

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = (QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
BERT = (
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    ("attention.output.dense",),
    ("intermediate.dense",),
    ("output.dense",),
)
BLOOM = (
    ("self_attention.query_key_value",),
    ("self_attention.dense",),
    ("mlp.dense_h_to_4h",),
    ("mlp.dense_4h_to_h",),
)
DEBERTA = (("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"), *BERT[1:])
SHARED = "albert_layers.0."  # of a group of ALBERT
ALBERT = (
    (f"{SHARED}attention.query", f"{SHARED}attention.key", f"{SHARED}attention.value"),
    (f"{SHARED}attention.dense",),
    (f"{SHARED}ffn",),
    (f"{SHARED}ffn_output",),
)
STAGES = {
    **dict.fromkeys(
        ("llama", "llama-untied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "stablelm", "olmo2", "smollm3",
         "granite"),
        ("model.layers", 2, LLAMA),
    ),
    "phi3": (
        "model.layers",
        2,
        (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    ),
    # Attention and MLP side by side: what reads the one norm's output is one stage.
    "cohere": (
        "model.layers",
        2,
        ((*QKV, "mlp.gate_proj", "mlp.up_proj"), ("self_attn.o_proj",), ("mlp.down_proj",)),
    ),
    "gptj": (
        "transformer.h",
        2,
        (
            ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"),
            ("attn.out_proj",),
            ("mlp.fc_out",),
        ),
    ),
    "falcon": ("transformer.h", 2, ((*BLOOM[0], *BLOOM[2]), BLOOM[1], BLOOM[3])),
    "falcon-alibi": ("transformer.h", 2, BLOOM),
    "bloom": ("transformer.h", 2, BLOOM),
    # Side by side too, but behind a norm each.
    "gpt-neox": (
        "gpt_neox.layers",
        2,
        (("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
    ),
    "gpt2": ("transformer.h", 2, (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))),
    "opt": (
        "model.decoder.layers",
        2,
        (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("fc1",),
            ("fc2",),
        ),
    ),
    "bert": ("bert.encoder.layer", 2, BERT),
    "roberta": ("roberta.encoder.layer", 2, BERT),
    "xlm-roberta": ("roberta.encoder.layer", 2, BERT),
    "electra": ("electra.encoder.layer", 2, BERT),
    "albert": ("albert.encoder.albert_layer_groups", 1, ALBERT),
    "deberta-v2": ("deberta.encoder.layer", 2, DEBERTA),
    "distilbert": (
        "distilbert.transformer.layer",
        2,
        (
            ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            ("attention.out_lin",),
            ("ffn.lin1",),
            ("ffn.lin2",),
        ),
    ),
    "modernbert": ("model.layers", 4, (("attn.Wqkv",), ("attn.Wo",), ("mlp.Wi",), ("mlp.Wo",))),
    "mpnet": (
        "mpnet.encoder.layer",
        2,
        (
            ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
            ("attention.attn.o",),
            ("intermediate.dense",),
            ("output.dense",),
        ),
    ),
}
def _experts(count: int, *names: str) -> tuple[tuple[str, ...], ...]:
    *inputs, output = names
    one = [tuple(f"mlp.experts.{n}.{name}" for name in inputs) for n in range(count)]
    return tuple(stage for n in range(count) for stage in (one[n], (f"mlp.experts.{n}.{output}",)))


MLA = (  # queries, and keys and values, through a narrow projection and a norm each
    ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    ("self_attn.q_b_proj",),
    ("self_attn.kv_b_proj",),
    ("self_attn.o_proj",),
)
STAGES |= {
    "mixtral": ("model.layers", 2, (*LLAMA[:2], *_experts(4, "w1", "w3", "w2"))),
    "qwen3-moe": ("model.layers", 2, (*LLAMA[:2], *_experts(4, "gate_proj", "up_proj", "down_proj"))),
    "deepseek-v3": ("model.layers", 2, (*MLA, *LLAMA[2:])),
}
# Of encoder-decoders the encoder; then the decoder, whose keys and values of cross-attention read the encoder's output.
_T5 = ("layer.0.SelfAttention", "layer.1.EncDecAttention")
_SELF = (tuple(f"{_T5[0]}.{name}" for name in "qkv"), (f"{_T5[0]}.o",))
_CROSS = ((f"{_T5[1]}.q",), (f"{_T5[1]}.k", f"{_T5[1]}.v"), (f"{_T5[1]}.o",))
_BART = (QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",))
_BART_CROSS = (
    ("encoder_attn.q_proj",),
    ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    ("encoder_attn.out_proj",),
)


def _t5(layer: int, *inputs: str) -> tuple[tuple[str, ...], ...]:
    place = f"layer.{layer}.DenseReluDense"
    return (tuple(f"{place}.{name}" for name in inputs), (f"{place}.wo",))


STAGES |= {
    "t5": ("encoder.block", 2, (*_SELF, *_t5(1, "wi"))),
    "flan-t5": ("encoder.block", 2, (*_SELF, *_t5(1, "wi_0", "wi_1"))),
    "bart": ("model.encoder.layers", 2, _BART),
    "whisper": ("model.encoder.layers", 2, _BART),
    **dict.fromkeys(("llava", "qwen2-vl", "qwen2.5-vl", "gemma3-vision"), ("model.language_model.layers", 2, LLAMA)),
    **dict.fromkeys(("idefics3", "smolvlm"), ("model.text_model.layers", 2, LLAMA)),
    "vit": (
        "vit.layers",
        2,
        (
            ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            ("attention.o_proj",),
            ("mlp.fc1",),
            ("mlp.fc2",),
        ),
    ),
}
SECOND = {
    "t5": ("decoder.block", 2, (*_SELF, *_CROSS, *_t5(2, "wi"))),
    "flan-t5": ("decoder.block", 2, (*_SELF, *_CROSS, *_t5(2, "wi_0", "wi_1"))),
    **dict.fromkeys(("bart", "whisper"), ("model.decoder.layers", 2, (*_BART[:2], *_BART_CROSS, *_BART[2:]))),
}
# Blocks that differ from the first.
OTHERS = {
    ("deepseek-v3", 1): (
        *MLA,
        *_experts(8, "gate_proj", "up_proj", "down_proj"),
        ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        ("mlp.shared_experts.down_proj",),
    )
}
# Solved with the attention's inputs, computed after its output.
LASTING = {
    "cohere": {"mlp.gate_proj", "mlp.up_proj"},
    "gptj": {"mlp.fc_in"},
    "falcon": {"mlp.dense_h_to_4h"},
    "deepseek-v3": {"self_attn.kv_a_proj_with_mqa"},
}
MLP = re.compile(rf"({SHARED})?(mlp|ffn|fc[12]|intermediate|output)\b|{SHARED}ffn_output|layer\.\d\.DenseReluDense")
