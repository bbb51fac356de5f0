"""Tokenizers whose memory ends when they do.

The library `tokenizers` remembers how it split up to 10,000 words: some 5 MB for each tokenizer in each thread, kept
as long as the thread lives, though the tokenizer be long gone. A process that compresses one model after another
would grow by that with every one. Without this memory, text is split as fast, as far as could be measured.
"""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def forgetful(tokenizer: T) -> T:
    """The same tokenizer, or processor with one in it, told to remember no words; ids stay what they were."""
    inner: Any = getattr(tokenizer, "tokenizer", tokenizer)
    model = getattr(getattr(inner, "backend_tokenizer", None), "model", None)
    resize = getattr(model, "_resize_cache", None)  # BPE and Unigram have it, WordPiece has no such memory
    if resize is not None:
        resize(0)
    return tokenizer
