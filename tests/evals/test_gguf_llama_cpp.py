"""llama.cpp itself on exported files: its logits beside transformers', its tokens beside the tokenizer's.

    LLMCOMP_LLAMA_CPP=/path/to/python pytest -m slow tests/evals/test_gguf_llama_cpp.py

where that python has llama-cpp-python; without the variable, this one if it has.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import mixed, packed
from tiny import VOCABULARY
from transformers import AutoTokenizer

from evals import gguf_check

PYTHON = os.environ.get("LLMCOMP_LLAMA_CPP") or (sys.executable if importlib.util.find_spec("llama_cpp") else "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="no llama-cpp-python here, and LLMCOMP_LLAMA_CPP names no python with it"),
]
WIDE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama-untied", {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": ("llama-untied", {"head_dim": 64}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3 yarn": ("qwen3", {"rope_parameters": YARN}),
    "qwen3 linear": ("qwen3", {"rope_parameters": WIDE}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "granite": ("granite", {"logits_scaling": 2.0, "attention_multiplier": 0.25}),
    "phi3": ("phi3", {}),
    "phi3 partial": ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
}
TEXTS = ["Hello world, it's 12345 apples!\n\n  indented\t<s>x</s>", "Übergröße 🚀 日本語 don't", "", " "]
# F16 keeps 11 bits of weights and inputs; where weights are quantized, llama.cpp rounds inputs to 8 bits.
TOLERANCE = {"dense": 2e-3, "packed": 2.5e-2}


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in (7, 120)]


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("case", MODELS)
def test_llama_cpp_computes_the_same(case: str, kind: str, tmp_path: Path) -> None:
    name, overrides = MODELS[case]
    checkpoint = packed(name, tmp_path / "m", mixed if kind == "packed" else lambda module: None, **overrides)
    gguf_check.export(checkpoint, tmp_path / "out")
    ids = sequences()
    answer = gguf_check.ask(Path(PYTHON), tmp_path / "out" / "model.gguf", ids, TEXTS)
    model = gguf_check.decoded_model(checkpoint)
    wanted = gguf_check.logits_of(model, ids)
    assert gguf_check.error(answer.logits, wanted) < TOLERANCE[kind]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, config=model.config)
    assert answer.tokens == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_the_tolerance_would_show_rows_in_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were rows of q and k left as transformers has them, the error would be far beyond it."""
    from llmcomp.exports import gguf_models

    monkeypatch.setattr(gguf_models, "row_order", lambda name, family, config: None)
    checkpoint = packed("llama", tmp_path / "m", lambda module: None)
    gguf_check.export(checkpoint, tmp_path / "out")
    answer = gguf_check.ask(Path(PYTHON), tmp_path / "out" / "model.gguf", sequences(), [])
    wanted = gguf_check.logits_of(gguf_check.decoded_model(checkpoint), sequences())
    assert gguf_check.error(answer.logits, wanted) > 10 * TOLERANCE["packed"]
