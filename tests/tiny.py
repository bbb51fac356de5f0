"""Tiny random models and tokenizers, saved as a user would save them: what most tests compress.

    tiny("llama", tmp_path / "model")                    a seeded two-block Llama in float32
    tiny("bert-classifier", directory, tokenizer=True)   with a WordPiece-like tokenizer beside it

Widths are the smallest that every group size up to 128 divides. Weights are normal with a standard deviation
of 0.05 (norms excepted), wide enough that logits differ between tokens and that rounding shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WIDTH, DEEP, HEADS, HEAD_DIM, VOCABULARY, POSITIONS = 128, 256, 4, 32, 512, 128
PAD, UNK, BOS, EOS, MASK = 0, 1, 2, 3, 4


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
_THREE = {"num_labels": 3}

# name → (prefix of the transformers classes, suffix of the model class, config)
_MODELS: dict[str, tuple[str, str, Callable[[], dict[str, Any]]]] = {
    "llama": ("Llama", "ForCausalLM", lambda: _decoder(tie_word_embeddings=True)),
    "llama-untied": ("Llama", "ForCausalLM", lambda: _decoder(tie_word_embeddings=False)),
    "mistral": ("Mistral", "ForCausalLM", lambda: _decoder(tie_word_embeddings=False, sliding_window=8)),
    "qwen3": ("Qwen3", "ForCausalLM", lambda: _decoder(tie_word_embeddings=True)),
    "gpt2": ("GPT2", "LMHeadModel", lambda: dict(_GPT2)),
    "opt": ("OPT", "ForCausalLM", lambda: dict(_OPT)),
    "bert": ("Bert", "ForMaskedLM", _encoder),
    "bert-classifier": ("Bert", "ForSequenceClassification", lambda: _encoder(**_THREE)),
    "roberta": ("Roberta", "ForMaskedLM", _roberta),
    "roberta-classifier": ("Roberta", "ForSequenceClassification", lambda: _roberta(**_THREE)),
    "distilbert": ("DistilBert", "ForMaskedLM", _distilbert),
    "distilbert-classifier": ("DistilBert", "ForSequenceClassification", lambda: {**_distilbert(), **_THREE}),
    "modernbert": ("ModernBert", "ForMaskedLM", _modernbert),
    "modernbert-classifier": ("ModernBert", "ForSequenceClassification", lambda: {**_modernbert(), **_THREE}),
    "mpnet": ("MPNet", "ForMaskedLM", _mpnet),
    "mpnet-classifier": ("MPNet", "ForSequenceClassification", lambda: _mpnet(**_THREE)),
}

TINY = tuple(_MODELS)
DECODERS = ("llama", "llama-untied", "mistral", "qwen3", "gpt2", "opt")


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """The tiny model `name` in memory, in eval mode; `overrides` change its config."""
    import transformers

    family, suffix, settings = _MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**settings(), **overrides})
    model = getattr(transformers, f"{family}{suffix}")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.dim() == 1 and key.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_gain else 0.05 * noise)
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
        overrides: config values that differ, such as num_hidden_layers=3.
    """
    model = build(name, seed=seed, dtype=dtype, **overrides)
    model.save_pretrained(directory, max_shard_size=shard)
    if tokenizer:
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
