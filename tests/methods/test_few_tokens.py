"""Which method is best when few tokens have reached an expert: on inputs that it has not seen."""

from __future__ import annotations

import pytest
import torch
from reference.layers import inputs, stats_of, weights

from llmcomp.methods import METHODS
from llmcomp.schemes import Scheme

WIDTH = 256


def held_out(method: str, tokens: int, bits: int) -> float:
    """Squared error of a layer's outputs on 4096 unseen tokens, over four layers."""
    total = 0.0
    for seed in range(4):
        x = inputs(tokens + 4096, WIDTH, seed)
        weight = weights(128, WIDTH, seed)
        entry = METHODS[method]
        scheme = Scheme(bits, 64, symmetric=True)
        found = entry.function(weight.clone(), stats_of(x[:tokens]), scheme, torch.float32, entry.config())
        total += float((x[tokens:].double() @ (found.weight.dense() - weight).double().T).square().sum())
    return total


@pytest.mark.parametrize("bits", [3, 4])
def test_below_one_token_a_column_a_search_generalizes_better(bits: int) -> None:
    """What `pipeline.solve._affordable` goes by."""
    for tokens in (8, WIDTH // 4, WIDTH // 2):
        assert held_out("rtn-clip", tokens, bits) < 0.9 * held_out("gptq", tokens, bits)
    for tokens in (WIDTH, 4 * WIDTH):
        assert held_out("gptq", tokens, bits) < 0.9 * held_out("rtn-clip", tokens, bits)
    assert held_out("rtn-clip", 8, bits) < 0.8 * held_out("rtn", 8, bits)
