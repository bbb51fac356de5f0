"""Tokens of real vocabularies: Hugging Face's tokenizers beside llama.cpp on the files that llmcomp writes for them.

    python -m evals.gguf_vocabularies LLAMA_CPP/models --python PYTHON [--text data/wikitext-2-raw/test.txt]

LLAMA_CPP is a checkout of llama.cpp, or its copy in the source package of llama-cpp-python (`vendor/llama.cpp`); it
holds the vocabularies of Llama 2, Llama 3, Qwen2 and GPT-2 as GGUF, and texts made to be difficult. Each is put
together as a tokenizer.json, saved beside a tiny random model, exported, and asked for the tokens of those and of
60,000 characters of `--text`. Further rows give Llama 3's tokens another way of splitting text, Llama 2's another of
spaces.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evals.common import assets_root, markdown
from evals.gguf_check import ask, export
from evals.process import versions
from llmcomp.exports import gguf_tokenizer

SPACE = "\u2581"
SPLIT = "\n__ggml_vocab_test__\n"
NORMAL, UNKNOWN, CONTROL = 1, 2, 3
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORDS = {**BYTES, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
Structure = dict[str, Any]


def fields_of(path: Path) -> dict[str, Any]:
    """What a GGUF file says of its tokenizer, without `tokenizer.ggml.`."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    return {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in fields.items() if "ggml." in key}


def added(identifier: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": identifier, "content": text, **flags, "special": True}


def structure_of(fields: dict[str, Any], model: dict[str, Any], pre: Any, normalizer: Any, begins: bool) -> Structure:
    """A tokenizer.json."""
    special = [added(i, t) for i, t in enumerate(fields["tokens"]) if fields["token_type"][i] in (UNKNOWN, CONTROL)]
    post = None
    if begins:
        bos = fields["tokens"][fields["bos_token_id"]]
        text = {"Sequence": {"id": "A", "type_id": 0}}
        ids = {bos: {"id": bos, "ids": [fields["bos_token_id"]], "tokens": [bos]}}
        single = [{"SpecialToken": {"id": bos, "type_id": 0}}, text]
        post = {"type": "TemplateProcessing", "single": single, "pair": [*single, text], "special_tokens": ids}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": normalizer,
        "pre_tokenizer": pre, "post_processor": post, "decoder": None, "model": model,
    }  # fmt: skip


def byte_level(fields: dict[str, Any], pattern: str | None, *, whole: bool = False, digits: bool = False) -> Structure:
    """A byte-level BPE with this pattern, GPT-2's for None."""
    vocab = {token: i for i, token in enumerate(fields["tokens"]) if fields["token_type"][i] == NORMAL}
    steps = [DIGITS, WORDS] if digits else [WORDS]
    if pattern is not None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        steps = [split, BYTES]
    model = {"type": "BPE", "vocab": vocab, "merges": [merge.split(" ", 1) for merge in fields["merges"]]}
    pre = {"type": "Sequence", "pretokenizers": steps}
    return structure_of(fields, {**model, "ignore_merges": whole}, pre, None, "<|begin_of_text|>" in fields["tokens"])


def sentencepiece(fields: dict[str, Any], pre: Any, normalizer: Any) -> Structure:
    """A BPE with byte fallback, its merges found from scores as transformers converts SentencePiece's models."""
    vocab = {token: i for i, token in enumerate(fields["tokens"])}
    merges: list[tuple[float, str, str]] = []
    for token, score in zip(fields["tokens"], fields["scores"], strict=True):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(a, b) for a, b in pairs if a in vocab and b in vocab]
        merges += [(score, a, b) for a, b in sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    merges.sort(key=lambda merge: -merge[0])
    model = {
        "type": "BPE", "vocab": vocab, "merges": [[a, b] for _, a, b in merges], "unk_token": "<unk>",
        "fuse_unk": True, "byte_fallback": True,
    }  # fmt: skip
    return structure_of(fields, model, pre, normalizer, True)


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
LLAMA2 = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, REPLACE]}
GEMMA = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
NEVER = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False}
CASES: dict[str, tuple[str, Callable[[dict[str, Any]], Structure]]] = {
    "Llama 2": ("llama-spm", lambda f: sentencepiece(f, None, LLAMA2)),
    "Llama 2, spaces as Gemma's": ("llama-spm", lambda f: sentencepiece(f, GEMMA, REPLACE)),
    "Llama 2, Metaspace never": ("llama-spm", lambda f: sentencepiece(f, NEVER, None)),
    "Llama 3": ("llama-bpe", lambda f: byte_level(f, gguf_tokenizer._LLAMA3, whole=True)),
    "Llama 3, always merged": ("llama-bpe", lambda f: byte_level(f, gguf_tokenizer._LLAMA3)),
    "Llama 3, split as Tekken's": ("llama-bpe", lambda f: byte_level(f, gguf_tokenizer._TEKKEN, whole=True)),
    "Llama 3, split as SmolLM's": ("llama-bpe", lambda f: byte_level(f, None, digits=True)),
    "Qwen2": ("qwen2", lambda f: byte_level(f, gguf_tokenizer._QWEN2)),
    "GPT-2": ("gpt-2", lambda f: byte_level(f, None)),
}


def row(name: str, models: Path, python: Path, text: str) -> list[str]:
    """One line of the table; which texts differ goes to stderr."""
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    file, make = CASES[name]
    fields = fields_of(models / f"ggml-vocab-{file}.gguf")
    texts = (models / f"ggml-vocab-{file}.gguf.inp").read_text(encoding="utf-8").split(SPLIT)
    end = fields["tokens"][fields["eos_token_id"]]
    texts += [text, f"a {end} b{end}c"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        config = LlamaConfig(
            vocab_size=len(fields["tokens"]), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(place)
        core = Tokenizer.from_str(json.dumps(make(fields)))
        beginning = fields["tokens"][fields["bos_token_id"]] if "bos_token_id" in fields else None
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=beginning, eos_token=end)
        tokenizer.save_pretrained(place)
        export(place, Path(folder) / "gguf")
        answer = ask(python, Path(folder) / "gguf" / "model.gguf", [], texts)
        splits = fields_of(Path(folder) / "gguf" / "model.gguf")["pre"]
    wanted = [tokenizer(one)["input_ids"] for one in texts]
    for one, ours, theirs in zip(texts, wanted, answer.tokens, strict=True):
        if ours != theirs:
            print(f"{name}: {one[:60]!r}: {ours[:20]}, llama.cpp {theirs[:20]}", file=sys.stderr, flush=True)
    same = sum(ours == theirs for ours, theirs in zip(wanted, answer.tokens, strict=True))
    return [name, splits, f"{len(fields['tokens']):,}", f"{sum(map(len, wanted)):,}", f"{same} of {len(texts)}"]


def main(argv: list[str] | None = None) -> int:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="the folder of ggml-vocab-*.gguf")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="one with llama-cpp-python")
    parser.add_argument("--text", default="data/wikitext-2-raw/test.txt", help="below LLMCOMP_ASSETS")
    args = parser.parse_args(argv)
    print(json.dumps(versions(Path(sys.executable), ["llmcomp", "gguf", "tokenizers", "transformers"])))
    print(json.dumps(versions(args.python, ["llama_cpp_python"])))
    text = (assets_root() / args.text).read_text(encoding="utf-8")[:60_000]
    rows = [row(name, args.models, args.python, text) for name in CASES]
    print(f"\n{markdown(['tokenizer', 'name of its split', 'vocabulary', 'tokens', 'equal texts'], rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
