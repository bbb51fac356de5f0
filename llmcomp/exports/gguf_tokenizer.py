"""A tokenizer as llama.cpp reads it: its tokens, how it merges them, and how it splits text before.

llama.cpp does not read tokenizer.json; it has the ways of splitting text built in, each under a name. Which of them a
tokenizer needs is read off its structure, and another structure is refused: a model that is fed other tokens than it
was trained on answers, and answers badly.

Two kinds of BPE are written. Byte-level ones ("gpt2" in GGUF: GPT-2, Llama 3, Qwen, …) with their merges; those of
SentencePiece with bytes to fall back on ("llama": Llama 2, Mistral, Gemma, …) with scores. Merging by score gives what
merging by rank gives when scores fall with the rank of a token's first merge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcomp.errors import UserError

# Patterns as tokenizer.json holds them. "digits" is `Digits`, each one alone; "words" is `ByteLevel` with the pattern
# that it has of its own, GPT-2's; "bytes" is `ByteLevel` without it.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (how text is split, whether whole words that are tokens are taken without merging) → llama.cpp's name.
_SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "smaug-bpe",
    ((_QWEN2, "bytes"), False): "qwen2",
    ((_TEKKEN, "bytes"), True): "tekken",
}
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
NEVER_MERGED = -1e6  # below every rank


@dataclass
class Vocabulary:
    """What GGUF holds of a tokenizer. `types`: of `gguf.TokenType`; `splits`: `tokenizer.ggml.pre`."""

    model: str
    splits: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool | None = None
    notes: list[str] = field(default_factory=list)


def add_tokenizer(writer: Any, tokenizer: Any, rows: int, place: Path) -> list[str]:
    """Write a tokenizer of transformers and the model's name into the metadata; returns sentences for the user.

    Args:
        rows: of the model's embeddings; ids behind the tokenizer's are filled up, tokens behind the rows left out.
        place: where it comes from, for messages; its name is the model's.

    Raises:
        UserError: it is of a kind that llama.cpp does not know.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"The tokenizer in {place} has no tokenizer.json to read, so it cannot be exported as GGUF.")
    structure = json.loads(backend.to_str())
    try:
        found = read_vocabulary(structure, rows)
        begins, ends = _added(tokenizer)
    except ValueError as error:
        raise UserError(f"The tokenizer in {place} cannot be exported as GGUF: {error}.") from error
    writer.add_name(_name(place, found.tokens))
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.splits)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.merges:
        writer.add_token_merges(found.merges)
    if found.scores:
        writer.add_token_scores(found.scores)
    if found.space_prefix is not None:
        writer.add_add_space_prefix(found.space_prefix)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
    for kind in ("bos", "eos", "unk", "sep", "pad", "mask"):
        identifier = getattr(tokenizer, f"{kind}_token_id", None)
        if identifier is not None and identifier < rows:
            getattr(writer, f"add_{kind}_token_id")(identifier)
    _add_template(writer, tokenizer.chat_template)
    if tokenizer.eos_token_id is None:
        found.notes.append("The tokenizer names no token that ends a text, so llama.cpp takes one of its own choice.")
    return found.notes


def read_vocabulary(structure: Mapping[str, Any], rows: int) -> Vocabulary:
    """A tokenizer.json with BPE for a model with `rows` embeddings.

    Raises:
        ValueError: what llama.cpp does not do, in words.
    """
    model = structure["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"its model is {model.get('type')}, and BPE is what can be written")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"it has a {key}")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        return _sentencepiece(structure, merges, rows)
    return _byte_level(structure, merges, rows)


def _byte_level(structure: Mapping[str, Any], merges: list[tuple[str, ...]], rows: int) -> Vocabulary:
    kind = (structure.get("normalizer") or {}).get("type", "NFC")
    if kind != "NFC":
        raise ValueError(f"it normalizes text by {kind}")
    steps = tuple(_step(one) for one in _flat(structure.get("pre_tokenizer"), "pretokenizers"))
    splits = _SPLITS.get((steps, bool(structure["model"].get("ignore_merges"))))
    if splits is None:
        whole = " and takes words that are tokens whole" if structure["model"].get("ignore_merges") else ""
        raise ValueError(f"it splits text by {' then '.join(steps) or 'nothing'}{whole}, for which no name is known")
    found = _tokens(structure, rows, spaces=False)
    found.model, found.splits = "gpt2", splits
    found.merges = [" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in merge) for merge in merges]
    return found


def _sentencepiece(structure: Mapping[str, Any], merges: list[tuple[str, ...]], rows: int) -> Vocabulary:
    found = _tokens(structure, rows, spaces=True)
    found.model, found.splits = "llama", "default"
    found.space_prefix, beginning = _space_prefix(structure)
    if beginning:
        found.notes.append(
            "llama.cpp puts a space before text that begins with one, and before text behind a special token; this "
            "tokenizer does not."
        )
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        rank.setdefault("".join(merge), place)
    found.scores = [-float(rank[token]) if token in rank else NEVER_MERGED for token in found.tokens]
    return found


def _tokens(structure: Mapping[str, Any], rows: int, *, spaces: bool) -> Vocabulary:
    """All tokens with their types. With `spaces`, added ones that are looked for behind the normalizer get a space
    for each U+2581, as llama.cpp looks for them before."""
    import gguf

    kinds = gguf.TokenType
    model = structure["model"]
    by_id = {identifier: (token, kinds.NORMAL) for token, identifier in model["vocab"].items()}
    for one in structure.get("added_tokens") or ():
        text = one["content"]
        if one["special"] or _looks_special(text):
            by_id[one["id"]] = (text, kinds.CONTROL)
        else:
            by_id[one["id"]] = (text.replace(_SPACE, " ") if spaces and one["normalized"] else text, kinds.USER_DEFINED)
    if spaces:
        for identifier, (token, kind) in by_id.items():
            if _BYTE.fullmatch(token) and kind == kinds.NORMAL:
                by_id[identifier] = (token, kinds.BYTE)
        unknown = model["vocab"].get(model.get("unk_token"))
        if unknown is not None:
            by_id[unknown] = (by_id[unknown][0], kinds.UNKNOWN)
    listed = [by_id.get(identifier, (f"[PAD{identifier}]", kinds.UNUSED)) for identifier in range(rows)]
    found = Vocabulary("", "", [token for token, _ in listed], [int(kind) for _, kind in listed])
    if len(set(found.tokens)) != rows:
        twice = next(token for token in found.tokens if found.tokens.count(token) > 1)
        raise ValueError(f"it has two tokens '{twice}'")
    if strips := [one["content"] for one in structure.get("added_tokens") or () if one["lstrip"] or one["rstrip"]]:
        found.notes.append(
            f"{len(strips)} tokens take in the spaces beside them, such as '{strips[0]}', for which GGUF has no place."
        )
    if beyond := sorted(identifier for identifier in by_id if identifier >= rows):
        token = by_id[beyond[0]][0]
        found.notes.append(f"{len(beyond)} tokens have no row in the embeddings and are left out, such as '{token}'.")
    return found


def _name(place: Path, tokens: list[str]) -> str:
    """The directory's name, unless llama.cpp would look for tokens of Phi-3 that are not there, and end."""
    name = place.resolve().name
    if re.search("phi-?3", name.lower()) and not {"</s>", "<unk>", "<s>", "<|endoftext|>"} <= set(tokens):
        return "model"
    return name


def _looks_special(text: str) -> bool:
    """Added tokens that some models (DeepSeek, Gemma) use as special ones without saying so; llama.cpp's converter."""
    marked = any(text.startswith(a) and text.endswith(z) for a, z in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">")))
    return marked or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


# --- how text is split ---


def _flat(step: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    """A step, a `Sequence` of steps or none, as a list."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for one in step[parts] for inner in _flat(one, parts)]


def _step(step: Mapping[str, Any]) -> str:
    """What `_SPLITS` calls a step, or a description that it does not hold."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "words" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    pattern = step.get("pattern", {}).get("Regex")
    if kind == "Split" and pattern and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(pattern)
    return json.dumps(step, ensure_ascii=False, sort_keys=True)


def _space_prefix(structure: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether text gets a space before its first word, and whether only where it has none.

    Raises:
        ValueError: spaces do not become U+2581, or more is done to a text.
    """
    steps = _flat(structure.get("normalizer"), "normalizers")
    steps += _flat(structure.get("pre_tokenizer"), "pretokenizers")
    prefix = beginning = marked = False
    for step in steps:
        if step == {"type": "Prepend", "prepend": _SPACE}:
            prefix = True
        elif step == {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}:
            marked = True
        elif step["type"] == "Metaspace" and not step.get("split", True) and step["replacement"] == _SPACE:
            beginning = not prefix and step.get("prepend_scheme", "always") != "never"
            prefix, marked = prefix or beginning, True
        elif step["type"] != "Split" or step["pattern"] != {"String": " "} or not marked:
            raise ValueError(f"it changes text by {json.dumps(step, ensure_ascii=False)}")
    if not marked:
        raise ValueError(f"it does not write spaces as {_SPACE}")
    return prefix, beginning


# --- what comes around a text ---


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether it puts its first token before a text, and its last one behind."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    for first, last in ((False, False), (True, False), (False, True), (True, True)):
        if whole == [tokenizer.bos_token_id] * first + plain + [tokenizer.eos_token_id] * last:
            return first, last
    raise ValueError(f"it makes {whole} of a text whose tokens are {plain}")


def _add_template(writer: Any, template: Any) -> None:
    if isinstance(template, Mapping):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
