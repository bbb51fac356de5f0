"""What llama.cpp makes of a GGUF file: logits of token ids, ids of texts. Runs where llama-cpp-python is installed.

    python evals/llama_cpp_logits.py REQUEST.json ANSWER.npz

REQUEST.json: {"model": "model.gguf", "ids": [[…], …], "texts": ["…", …]}. ANSWER.npz: `logits0`, `logits1`, …, each
[tokens, vocabulary] float32; `tokens0`, …, each int64, with what the tokenizer puts around a text; `version`.
Keys and values are kept in float32, so that what differs is weights and products.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

F32 = 0  # GGML_TYPE_F32


def main(request: Path, answer: Path) -> None:
    asked = json.loads(request.read_text(encoding="utf-8"))
    longest = max([len(ids) for ids in asked["ids"]] + [32])
    model = llama_cpp.Llama(
        asked["model"], n_ctx=longest, n_batch=longest, n_ubatch=longest, n_threads=1, n_threads_batch=1,
        logits_all=True, type_k=F32, type_v=F32, swa_full=True, verbose=False,
    )  # fmt: skip
    found: dict[str, Any] = {"version": np.array(llama_cpp.__version__)}
    for number, ids in enumerate(asked["ids"]):
        model.reset()
        model.eval(ids)
        found[f"logits{number}"] = np.array(model.scores[: len(ids)], dtype=np.float32)
    for number, text in enumerate(asked["texts"]):
        tokens = model.tokenize(text.encode("utf-8"), add_bos=True, special=True)
        found[f"tokens{number}"] = np.array(tokens, dtype=np.int64)
    np.savez(answer, **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
