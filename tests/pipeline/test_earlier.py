"""A weight of any kind is read back from the shard of an earlier run, whatever its tensors are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packed import random_of
from safetensors.torch import save_file

from llmcomp.adapters.base import LinearRef
from llmcomp.formats import FORMATS
from llmcomp.kinds import Kind, LowRank, Sparse
from llmcomp.patterns import Pattern
from llmcomp.pipeline.earlier import earlier_shard
from llmcomp.ranks import World
from llmcomp.schemes import INT8_STATIC, Scheme


@pytest.mark.parametrize(
    "kind",
    [
        Scheme(4, 32), Sparse(Pattern(2, 4)), Sparse(Pattern(4, 8), Scheme(8, activations=INT8_STATIC)), LowRank(3),
        LowRank(4, Scheme(8), None, Scheme(4, 64)),
    ],
    ids=lambda kind: kind.label,
)  # fmt: skip
def test_every_kind_is_decoded_from_a_shard(kind: Kind, tmp_path: Path) -> None:
    ref = LinearRef("m.q", "attention", 0, 8, 64, False)
    layout = FORMATS["llmcomp"]([(ref, kind)])
    weight = random_of(kind, (8, 64))
    others = {"m.q.bias": torch.ones(8), "m.qkv.weight": torch.ones(2)}
    save_file({"of-files." + name: one for name, one in (layout.tensors(ref, weight) | others).items()}, tmp_path / "s")
    with earlier_shard(tmp_path / "s", layout, lambda name: "of-files." + name, World(0, 1)) as shard:
        assert torch.equal(shard.decoded(ref, torch.empty(8, 64)), weight.dense())
