"""The measures that compare llama.cpp's logits with transformers', on logits whose answers are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from packed import packed
from tiny import tiny
from transformers import AutoModelForCausalLM

from evals import gguf_check
from evals.gguf_vocabularies import byte_level, sentencepiece
from llmcomp.schemes import Scheme

WANTED = [np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[3.0, 0.0]])]


def test_error_takes_out_what_softmax_does() -> None:
    assert gguf_check.error([one + 5.0 for one in WANTED], WANTED) == 0
    assert gguf_check.error([one * 1.1 for one in WANTED], WANTED) == pytest.approx(0.1)


def test_divergence_and_agreement() -> None:
    assert gguf_check.divergence(WANTED, WANTED) == 0
    found = [np.log(np.array([[0.25, 0.75]]))]
    even = [np.zeros((1, 2))]
    assert gguf_check.divergence(found, even) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert gguf_check.agreement([WANTED[0], np.array([[0.0, 3.0]])], WANTED) == pytest.approx(2 / 3)


def test_perplexity_predicts_the_next_token() -> None:
    logits = [np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]))]
    assert gguf_check.perplexity(logits, [[0, 1, 0]]) == pytest.approx((0.5 * 0.25) ** -0.5)


def test_what_llama_cpp_is_compared_with(tmp_path: Path) -> None:
    """Of a dense checkpoint the model itself; of packed weights their integers times scales."""
    directory = tiny("qwen2", tmp_path / "dense")
    ids = [[5, 6, 7, 8]]
    plain = AutoModelForCausalLM.from_pretrained(directory).eval()
    wanted, found = (gguf_check.logits_of(one, ids)[0] for one in (plain, gguf_check.decoded_model(directory)))
    assert (wanted == found).all()
    one = packed("llama", tmp_path / "m", lambda name: Scheme(4, 32, False) if "up" in name else None, tokenizer=False)
    model = gguf_check.decoded_model(one)
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight.detach()
    assert len({round(float(w), 9) for w in weight[0, :32]}) <= 16 < len({round(float(w), 9) for w in weight[0]})
    assert weight.dtype == torch.float32


def test_vocabularies_are_put_together_as_they_were() -> None:
    fields = {"tokens": ["<s>", "a", "b", "ab"], "token_type": [3, 1, 1, 1], "merges": ["a b"], "bos_token_id": 0}
    found = byte_level(fields, None)
    assert found["model"]["vocab"] == {"a": 1, "b": 2, "ab": 3} and found["model"]["merges"] == [["a", "b"]]
    assert [one["content"] for one in found["added_tokens"]] == ["<s>"] and found["post_processor"] is None
    spm = {**fields, "tokens": ["<s>", "a", "b", "ab", "aba"], "token_type": [3, 1, 1, 1, 1]}
    merges = sentencepiece({**spm, "scores": [0.0, -3.0, -4.0, -2.0, -1.0]}, None, None)["model"]["merges"]
    assert merges == [["ab", "a"], ["a", "b"]]
