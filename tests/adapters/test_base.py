"""The adapter's own arithmetic: refs in order, blocks by parameter name, look-up by name."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from llmcomp.adapters.base import Adapter, Block, LinearRef
from llmcomp.errors import UnknownArchitecture


def adapter(blocks: int = 12, head: bool = True) -> Adapter:
    def block(index: int) -> Block:
        name = f"body.h.{index}"
        qkv = tuple(LinearRef(f"{name}.attn.{part}", "attention", index, 4, 4) for part in "qkv")
        return Block(index, name, (qkv, (LinearRef(f"{name}.mlp", "mlp", index, 8, 4),)))

    return Adapter(
        model=nn.Identity(),
        config=None,
        task="causal-lm",
        blocks=tuple(block(index) for index in range(blocks)),
        embeddings=LinearRef("body.wte", "embeddings", None, 32, 4),
        head=LinearRef("head", "head", None, 32, 4) if head else None,
        ties={},
        uncompressed={},
    )


@given(st.integers(0, 11), st.sampled_from(["attn.q.weight", "mlp.bias", "ln.weight"]))
def test_block_of_a_parameter(index: int, leaf: str) -> None:
    assert adapter().block_of(f"body.h.{index}.{leaf}") == index


@pytest.mark.parametrize("name", ["body.wte.weight", "head.weight", "body.h.12.mlp.weight", "a.body.h.1.x"])
def test_outside_of_the_blocks(name: str) -> None:
    assert adapter().block_of(name) is None


@pytest.mark.parametrize("head", [True, False])
def test_refs_run_from_the_embeddings_to_the_head(head: bool) -> None:
    names = [ref.name for ref in adapter(2, head).refs]
    inside = [f"body.h.{i}.{part}" for i in range(2) for part in ("attn.q", "attn.k", "attn.v", "mlp")]
    assert names == ["body.wte", *inside, *(["head"] if head else [])]


def test_ref_by_name() -> None:
    found = adapter().ref("body.h.3.mlp")
    assert (found.block, found.role, found.weights) == (3, "mlp", 32)
    with pytest.raises(UnknownArchitecture) as caught:
        adapter().ref("body.h.3.gate")
    assert str(caught.value) == "Identity has no compressible module called body.h.3.gate."


def test_stages_are_known_unless_the_trace_failed() -> None:
    assert adapter().stages_known
    assert not dataclasses.replace(adapter(), trace_problem="RuntimeError: meta").stages_known
