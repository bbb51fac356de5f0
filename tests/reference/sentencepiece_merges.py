"""How llama.cpp merges with scores (`llm_tokenizer_spm`): of all neighbours that are a token together, those with the
highest score first, the leftmost of equals; what is no token in the end goes by its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def merge(text: str, tokens: Sequence[str], scores: Sequence[float]) -> list[int]:
    """Ids of `text`, in which spaces are U+2581 already."""
    ids = {token: number for number, token in enumerate(tokens)}
    parts = list(text)
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    found = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found
