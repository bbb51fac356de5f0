"""Tiny random models and tokenizers, saved as a user would save them: what most tests compress.

    tiny("llama", tmp_path / "model")                    a seeded two-block Llama in float32
    tiny("bert-classifier", directory, tokenizer=True)   with a WordPiece-like tokenizer beside it

Widths are the smallest that every group size up to 128 divides. Weights are normal with a standard deviation
of 0.05 (norms excepted), wide enough that logits differ between tokens and that rounding shows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WIDTH, DEEP, HEADS, HEAD_DIM, VOCABULARY, POSITIONS = 128, 256, 4, 32, 512, 128
PAD, UNK, BOS, EOS, MASK = 0, 1, 2, 3, 4
PICTURE, MEL_BINS, IMAGE_TOKEN = 32, 16, VOCABULARY


def _decoder(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH, "intermediate_size": DEEP, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "num_key_value_heads": 2, "head_dim": HEAD_DIM, "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
        **more,
    }  # fmt: skip


def _encoder(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH, "intermediate_size": DEEP, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "vocab_size": VOCABULARY, "pad_token_id": PAD, **{"max_position_embeddings": POSITIONS, **more},
    }  # fmt: skip


def _mpnet(**more: Any) -> dict[str, Any]:
    # MPNet and RoBERTa start counting positions behind the padding id.
    return _encoder(max_position_embeddings=POSITIONS + 2, **more)


def _roberta(**more: Any) -> dict[str, Any]:
    return _mpnet(type_vocab_size=1, **more)


def _distilbert() -> dict[str, Any]:
    return {
        "dim": WIDTH, "hidden_dim": DEEP, "n_layers": 2, "n_heads": HEADS, "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS, "pad_token_id": PAD,
    }  # fmt: skip


def _modernbert() -> dict[str, Any]:
    # Four blocks: global, local, local, global; the window is shorter than the tests' sequences.
    return _encoder(
        num_hidden_layers=4, local_attention=8, bos_token_id=BOS, eos_token_id=EOS, cls_token_id=BOS,
        sep_token_id=EOS,
    )  # fmt: skip


_GPT2 = {
    "n_embd": WIDTH, "n_inner": DEEP, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCABULARY,
    "n_positions": POSITIONS, "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
_OPT = {
    "hidden_size": WIDTH, "ffn_dim": DEEP, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "word_embed_proj_dim": WIDTH,
    "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
_GPT_NEOX = {
    "hidden_size": WIDTH, "intermediate_size": DEEP, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
_BLOOM = {
    "hidden_size": WIDTH, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCABULARY, "pad_token_id": PAD,
    "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
_FALCON = {
    "hidden_size": WIDTH, "ffn_hidden_size": DEEP, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
_GPTJ = {
    "n_embd": WIDTH, "n_inner": DEEP, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCABULARY,
    "n_positions": POSITIONS, "rotary_dim": 8, "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
# A local and a global layer; the window is shorter than the tests' sequences.
_LOCAL = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = {**_LOCAL, "query_pre_attn_scalar": HEAD_DIM, "tie_word_embeddings": True}
_DEBERTA = {
    "relative_attention": True, "position_buckets": 16, "pos_att_type": "p2c|c2p", "share_att_key": True,
    "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
# Four experts, two for each token. DeepSeek: two of the eight from one of two groups, one more for all tokens, and
# a first layer without experts.
_MIXTURE = {"num_experts_per_tok": 2, "num_local_experts": 4}
_QWEN_MOE = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": WIDTH, "norm_topk_prob": True}
_DEEPSEEK = {
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": WIDTH, "num_key_value_heads": HEADS,
    "q_lora_rank": WIDTH, "kv_lora_rank": WIDTH, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": HEAD_DIM,
    "head_dim": 16,
}  # fmt: skip
GPT_OSS = {  # of which llmcomp takes none
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
_THREE = {"num_labels": 3}
# Encoders and decoders of two blocks each.
_T5 = {
    "d_model": WIDTH, "d_ff": DEEP, "d_kv": HEAD_DIM, "num_layers": 2, "num_heads": HEADS, "vocab_size": VOCABULARY,
    "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD,
}  # fmt: skip
_FLAN = {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_BART = {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": DEEP, "decoder_ffn_dim": DEEP,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "vocab_size": VOCABULARY, "pad_token_id": PAD,
    "bos_token_id": BOS, "eos_token_id": EOS, "decoder_start_token_id": EOS, "max_position_embeddings": POSITIONS,
}  # fmt: skip

_VIT = {
    "hidden_size": WIDTH, "intermediate_size": DEEP, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "image_size": PICTURE, "patch_size": PICTURE // 4, **_THREE,
}  # fmt: skip
_WHISPER = {
    **_BART, "max_source_positions": 50, "max_target_positions": 64, "num_mel_bins": MEL_BINS,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
del _WHISPER["max_position_embeddings"]
# A vision tower of two blocks with more linears than one of the language model has; IMAGE_TOKEN lies behind the words.
_LLAVA = {
    "text_config": {"model_type": "llama", **_decoder(vocab_size=IMAGE_TOKEN + 8, tie_word_embeddings=False)},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": DEEP, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": PICTURE, "patch_size": PICTURE // 4, "projection_dim": 64,
    },
    "image_token_index": IMAGE_TOKEN,
}  # fmt: skip

# Others of the kind. Qwen's towers read patches without a batch, and each of its tokens has three positions.
_VISION = {
    "hidden_size": 64, "intermediate_size": DEEP, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": PICTURE, "patch_size": PICTURE // 4,
}  # fmt: skip
_WORDS = _decoder(vocab_size=IMAGE_TOKEN + 16)
_QWEN_VL = {
    "text_config": {**_WORDS, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
    "vision_config": {
        "depth": 3, "embed_dim": 64, "hidden_size": WIDTH, "num_heads": 4, "patch_size": PICTURE // 4, "mlp_ratio": 4,
    },
    "image_token_id": IMAGE_TOKEN, "video_token_id": IMAGE_TOKEN + 1, "vision_start_token_id": IMAGE_TOKEN + 2,
    "vision_end_token_id": IMAGE_TOKEN + 3,
}  # fmt: skip
# A tower of windowed attention and one block of global.
_QWEN_VL_25 = {
    **_QWEN_VL,
    "vision_config": {
        "depth": 3, "hidden_size": 64, "intermediate_size": DEEP, "num_heads": 4, "patch_size": PICTURE // 4,
        "out_hidden_size": WIDTH, "window_size": PICTURE, "fullatt_block_indexes": [1],
    },
}  # fmt: skip
_IDEFICS = {
    "text_config": {"model_type": "llama", **_WORDS}, "vision_config": _VISION, "image_token_id": IMAGE_TOKEN,
    "scale_factor": 2,
}  # fmt: skip
_GEMMA_VISION = {
    "text_config": {**_WORDS, **_LOCAL, "query_pre_attn_scalar": HEAD_DIM},
    "vision_config": {"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
    "image_token_index": IMAGE_TOKEN, "boi_token_index": IMAGE_TOKEN + 1, "eoi_token_index": IMAGE_TOKEN + 2,
    "mm_tokens_per_image": 4,
}  # fmt: skip

# name → (prefix of the transformers classes, suffix of the model class, config)
_MODELS: dict[str, tuple[str, str, Callable[[], dict[str, Any]]]] = {
    "llama": ("Llama", "ForCausalLM", lambda: _decoder(tie_word_embeddings=True)),
    "llama-untied": ("Llama", "ForCausalLM", lambda: _decoder(tie_word_embeddings=False)),
    "mistral": ("Mistral", "ForCausalLM", lambda: _decoder(tie_word_embeddings=False, sliding_window=8)),
    "qwen3": ("Qwen3", "ForCausalLM", lambda: _decoder(tie_word_embeddings=True)),
    "qwen2": ("Qwen2", "ForCausalLM", lambda: _decoder(tie_word_embeddings=True)),
    "gemma2": ("Gemma2", "ForCausalLM", lambda: _decoder(**_GEMMA)),
    "gemma3": ("Gemma3", "ForCausalLM", lambda: _decoder(**_GEMMA)),
    "phi3": ("Phi3", "ForCausalLM", lambda: _decoder(tie_word_embeddings=False)),
    "stablelm": ("StableLm", "ForCausalLM", lambda: _decoder(use_qkv_bias=True, qk_layernorm=True)),
    "olmo2": ("Olmo2", "ForCausalLM", _decoder),
    # The second layer has no rotary positions.
    "smollm3": ("SmolLM3", "ForCausalLM", lambda: _decoder(no_rope_layers=[1, 0])),
    "cohere": ("Cohere", "ForCausalLM", lambda: _decoder(use_qk_norm=True)),
    "granite": ("Granite", "ForCausalLM", lambda: _decoder(embedding_multiplier=2.0, residual_multiplier=0.5)),
    "gpt-neox": ("GPTNeoX", "ForCausalLM", lambda: dict(_GPT_NEOX)),
    "gptj": ("GPTJ", "ForCausalLM", lambda: dict(_GPTJ)),
    "bloom": ("Bloom", "ForCausalLM", lambda: dict(_BLOOM)),
    # As Falcon 7B: rotary positions, one norm before attention and MLP; as RW: ALiBi, one after the other.
    "falcon": ("Falcon", "ForCausalLM", lambda: dict(_FALCON)),
    "falcon-alibi": ("Falcon", "ForCausalLM", lambda: {**_FALCON, "alibi": True, "parallel_attn": False}),
    "mixtral": ("Mixtral", "ForCausalLM", lambda: _decoder(**_MIXTURE)),
    "qwen3-moe": ("Qwen3Moe", "ForCausalLM", lambda: _decoder(**_QWEN_MOE)),
    "deepseek-v3": ("DeepseekV3", "ForCausalLM", lambda: {**_decoder(), **_DEEPSEEK}),
    "gpt2": ("GPT2", "LMHeadModel", lambda: dict(_GPT2)),
    "opt": ("OPT", "ForCausalLM", lambda: dict(_OPT)),
    "bert": ("Bert", "ForMaskedLM", _encoder),
    "bert-classifier": ("Bert", "ForSequenceClassification", lambda: _encoder(**_THREE)),
    "roberta": ("Roberta", "ForMaskedLM", _roberta),
    "roberta-classifier": ("Roberta", "ForSequenceClassification", lambda: _roberta(**_THREE)),
    "xlm-roberta": ("XLMRoberta", "ForMaskedLM", _roberta),
    "xlm-roberta-classifier": ("XLMRoberta", "ForSequenceClassification", lambda: _roberta(**_THREE)),
    "electra": ("Electra", "ForMaskedLM", lambda: _encoder(embedding_size=64)),
    "electra-classifier": ("Electra", "ForSequenceClassification", lambda: _encoder(embedding_size=64, **_THREE)),
    "albert": ("Albert", "ForMaskedLM", lambda: _encoder(embedding_size=64)),
    "albert-classifier": ("Albert", "ForSequenceClassification", lambda: _encoder(embedding_size=64, **_THREE)),
    "deberta-v2": ("DebertaV2", "ForMaskedLM", lambda: _encoder(**_DEBERTA)),
    "deberta-v2-classifier": (
        "DebertaV2", "ForSequenceClassification", lambda: _encoder(**_DEBERTA, **_THREE)),
    "distilbert": ("DistilBert", "ForMaskedLM", _distilbert),
    "distilbert-classifier": ("DistilBert", "ForSequenceClassification", lambda: {**_distilbert(), **_THREE}),
    "modernbert": ("ModernBert", "ForMaskedLM", _modernbert),
    "modernbert-classifier": ("ModernBert", "ForSequenceClassification", lambda: {**_modernbert(), **_THREE}),
    "t5": ("T5", "ForConditionalGeneration", lambda: dict(_T5)),
    "flan-t5": ("T5", "ForConditionalGeneration", lambda: dict(_FLAN)),
    "bart": ("Bart", "ForConditionalGeneration", lambda: dict(_BART)),
    "whisper": ("Whisper", "ForConditionalGeneration", lambda: dict(_WHISPER)),
    "vit-classifier": ("ViT", "ForImageClassification", lambda: dict(_VIT)),
    "llava": ("Llava", "ForConditionalGeneration", lambda: copy.deepcopy(_LLAVA)),
    "qwen2-vl": ("Qwen2VL", "ForConditionalGeneration", lambda: copy.deepcopy(_QWEN_VL)),
    "qwen2.5-vl": ("Qwen2_5_VL", "ForConditionalGeneration", lambda: copy.deepcopy(_QWEN_VL_25)),
    "idefics3": ("Idefics3", "ForConditionalGeneration", lambda: copy.deepcopy(_IDEFICS)),
    "smolvlm": ("SmolVLM", "ForConditionalGeneration", lambda: copy.deepcopy(_IDEFICS)),
    "gemma3-vision": ("Gemma3", "ForConditionalGeneration", lambda: copy.deepcopy(_GEMMA_VISION)),
    "mpnet": ("MPNet", "ForMaskedLM", _mpnet),
    "mpnet-classifier": ("MPNet", "ForSequenceClassification", lambda: _mpnet(**_THREE)),
}

TINY = tuple(_MODELS)
TWO_CHAINS = ("t5", "flan-t5", "bart", "whisper")
VISION_LANGUAGE = ("llava", "qwen2-vl", "qwen2.5-vl", "idefics3", "smolvlm", "gemma3-vision")
BEYOND_TEXT = ("whisper", "vit-classifier", *VISION_LANGUAGE)  # see tiny_media
DECODERS = tuple(name for name, (_, suffix, _) in _MODELS.items() if suffix in ("ForCausalLM", "LMHeadModel"))


def build(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, bare: bool = False, **overrides: Any
) -> Any:
    """The tiny model `name` in memory, in eval mode, with `bare` without its head; `overrides` change its config."""
    import transformers

    family, suffix, settings = _MODELS[name]
    kind = getattr(transformers, f"{family}{'Model' if bare else suffix}")
    model = kind(kind.config_class(**{**settings(), **overrides}))
    generator = torch.Generator().manual_seed(seed)
    middle = 0 if family.startswith("Gemma") else 1  # Gemma's norms multiply by 1 + weight
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.dim() == 1 and key.endswith("weight")
            parameter.copy_(middle + 0.1 * noise if is_gain else 0.05 * noise)
    return model.to(dtype).eval()


def tiny(
    name: str,
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = False,
    shard: str = "50GB",
    **overrides: Any,
) -> Path:
    """Save the tiny model `name` (one of TINY) into `directory` and return it.

    Args:
        seed: of the weights.
        dtype: of the saved weights, float32 or bfloat16.
        tokenizer: write one beside it, see `write_tokenizer`.
        shard: largest file, such as '100KB', to get an index and several shards.
        overrides: config values that differ, such as num_hidden_layers=3, and `bare` (see `build`).
    """
    model = build(name, seed=seed, dtype=dtype, **overrides)
    model.save_pretrained(directory, max_shard_size=shard)
    if tokenizer and name in BEYOND_TEXT:
        from tiny_media import write_processor

        write_processor(name, directory)
    elif tokenizer:
        write_tokenizer(directory, encoder=name not in DECODERS)
    return Path(directory)


def write_tokenizer(directory: Path, *, encoder: bool, text: list[str] | None = None) -> Any:
    """Train a byte-level BPE of at most VOCABULARY tokens on `text` (or on the standard library's own words)
    and save it into `directory`; with `encoder`, texts are wrapped in [CLS] … [SEP] as BERT's are.

    Every byte is in the alphabet, so no text is unknown to it. Ids of the special tokens: PAD, UNK, BOS (also
    [CLS]), EOS (also [SEP]) and MASK above.
    """
    import pydoc_data.topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if encoder else ["<pad>", "<unk>", "<s>", "</s>"]
    core = Tokenizer(models.BPE(unk_token=special[UNK]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(text or list(pydoc_data.topics.topics.values())[:20], trainer)
    if encoder:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B [SEP]",
            special_tokens=[("[CLS]", BOS), ("[SEP]", EOS)],
        )
        names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    else:
        names = {"bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=special[PAD],
        unk_token=special[UNK],
        model_max_length=POSITIONS,
        **names,
    )
    fast.save_pretrained(directory)
    return fast
