"""Write checkpoints of random weights, for time and memory (quality means nothing here).

    python -m evals.make_model OUTPUT [--layers 22] [--windows FILE]

The Llama shape is TinyLlama's: hidden 2048, 22 layers, 32 heads, 4 key-value heads, MLP 5632, vocabulary 32000:
1.1 B parameters, 2.2 GB. `--layers` makes shallower ones of the same block, so that a change with depth can be
measured. `make_bert` gives BERT-base with a classifier's head. `--windows` also writes 32 × 512 calibration tokens,
uniform over the vocabulary.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)

from evals.common import assets_root

VOCABULARY = 32_000
WINDOWS, LENGTH = 32, 512
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def make_model(output: Path, layers: int = 22, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config, weights and the sample decoder's tokenizer to `output`.

    The tokenizer belongs to another vocabulary; it is there because tools copy one along. No text is
    tokenized with it: the windows are token ids.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    _save(LlamaForCausalLM, config, dtype, output)
    for name in TOKENIZER_FILES:
        shutil.copyfile(assets_root() / "models" / "lm" / name, output / name)


def make_bert(output: Path, layers: int = 12, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config and weights of BERT-base (110 M parameters) with a head for two classes to `output`."""
    torch.manual_seed(seed)
    _save(BertForSequenceClassification, BertConfig(num_hidden_layers=layers), dtype, output)


def _save(kind: type, config: PretrainedConfig, dtype: torch.dtype, output: Path) -> None:
    """Made in `dtype` from the start: a float32 copy of it would take twice the memory."""
    config.dtype = dtype
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = kind(config)
    finally:
        torch.set_default_dtype(previous)
    model.save_pretrained(output)


def make_windows(path: Path, seed: int = 0) -> None:
    """Write `input_ids` [32, 512] int64, uniform over the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    save_file({"input_ids": torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=generator)}, path)


def main(argv: list[str] | None = None) -> int:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--windows", type=Path)
    args = parser.parse_args(argv)
    make_model(args.output, args.layers)
    if args.windows:
        make_windows(args.windows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
