"""Write a Llama-shaped checkpoint of random bf16 weights, for time and memory (quality means nothing here).

    python -m evals.make_model OUTPUT [--layers 22] [--windows FILE]

The shape is TinyLlama's: hidden 2048, 22 layers, 32 heads, 4 key-value heads, MLP 5632, vocabulary 32000:
1.1 B parameters, 2.2 GB. `--layers` makes shallower ones of the same block, so that a change with depth can
be measured. `--windows` also writes 32 × 512 calibration tokens, uniform over the vocabulary.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from evals.common import assets_root

VOCABULARY = 32_000
WINDOWS, LENGTH = 32, 512
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def make_model(output: Path, layers: int = 22, seed: int = 0) -> None:
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
        dtype="bfloat16",
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    model.save_pretrained(output)
    for name in TOKENIZER_FILES:
        shutil.copyfile(assets_root() / "models" / "lm" / name, output / name)


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
