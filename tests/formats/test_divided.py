"""Rows divided in the file: whatever form a weight has there, it decodes to the weight divided."""

from __future__ import annotations

import pytest
import torch
from packed import random_of

from llmcomp.adapters.base import LinearRef
from llmcomp.formats import FORMATS
from llmcomp.formats.base import divide_rows
from llmcomp.kinds import Kind, LowRank, Sparse, integers_of
from llmcomp.patterns import Pattern
from llmcomp.schemes import Scheme

KINDS: list[Kind] = [
    Scheme(8), Scheme(4, 32, False), Scheme(3), Sparse(Pattern(2, 4)), Sparse(Pattern(2, 4), Scheme(4, 32)),
    LowRank(6), LowRank(32, Scheme(8), Scheme(4, 32)),
    LowRank(4, None, None, Scheme(4, 32)), LowRank(5, Scheme(8), Scheme(8), Scheme(3)),
]  # fmt: skip

CASES = [(format, kind) for format in ("dense", "llmcomp") for kind in KINDS]
CASES += [("compressed-tensors", kind) for kind in KINDS if integers_of(kind) is not None]


@pytest.mark.parametrize("shape", [(64, 64), (33, 64), (96, 32)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("format", "kind"), CASES, ids=lambda one: one if isinstance(one, str) else one.label)
def test_what_is_decoded_is_divided(kind: Kind, format: str, transposed: bool, shape: tuple[int, int]) -> None:
    ref = LinearRef("a.b", "mlp", 0, *shape, transposed)
    layout = FORMATS[format]([(ref, kind)])
    assert not layout.dense
    before = layout.tensors(ref, random_of(kind, shape))
    divisor = torch.exp2(torch.randint(-3, 4, shape[:1], generator=torch.Generator().manual_seed(1)).float())
    after = divide_rows(ref, before, divisor)
    forms = [{name: (one.shape, one.dtype) for name, one in tensors.items()} for tensors in (before, after)]
    assert forms[0] == forms[1]
    divided = layout.decode(ref, before) / (divisor if transposed else divisor.unsqueeze(1))
    assert torch.equal(layout.decode(ref, after), divided)
    back = divide_rows(ref, after, 1 / divisor)
    assert all(torch.equal(back[name], one) for name, one in before.items())
