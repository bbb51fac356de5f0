"""What is stored of a weight and how it decodes: against float64 versions of the papers, and bitsandbytes itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import bnb_float64 as reference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmcomp import bnb

KINDS = {"nf4": bnb.NF4, "int8": bnb.INT8}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal, rows of very different size, one of them zero where there are several."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=generator)
    made *= torch.logspace(-3, 1, rows)[:, None]
    if rows > 2:
        made[1] = 0
    return made.to(dtype)


def decoded(kind: bnb.Kind, dense: Tensor, transposed: bool = False) -> Tensor:
    """bitsandbytes would compile its code anew for shapes that it has not met, seconds for each."""
    with torch.compiler.set_stance("force_eager"):
        return bnb.Stored(kind, torch.float32, transposed).decode(bnb.encode(kind, dense))


shapes = st.tuples(st.integers(1, 9), st.integers(1, 150), st.integers(0, 99))


@given(shapes)
@example((1, 2, 0))
@example((2, 1, 0))
@settings(max_examples=40, deadline=None)
def test_nf4_is_the_papers(shape: tuple[int, int, int]) -> None:
    """Each weight within float32 of the nearest level, whatever the width: blocks run on over rows."""
    dense = weight(*shape)
    wanted, _, absmax = reference.nf4(dense)
    got = decoded(bnb.NF4, dense).double().numpy()
    scale = np.repeat(absmax, 64)[: dense.numel()].reshape(dense.shape)
    best = np.abs(wanted - dense.double().numpy())
    assert (np.abs(got - dense.double().numpy()) <= best + 1e-6 * scale).all()
    assert (np.abs(got - wanted) > 1e-6 * scale).mean() < 0.02, "more than ties differ"


@given(shapes)
@settings(max_examples=40, deadline=None)
def test_int8_is_the_papers(shape: tuple[int, int, int]) -> None:
    dense = weight(*shape)
    wanted, _, absmax = reference.int8(dense)
    got, half = decoded(bnb.INT8, dense).double().numpy(), dense.half().double().numpy()
    step = absmax[:, None] / 127
    assert (np.abs(got - half) <= np.abs(wanted - half) + 1e-4 * step).all()
    assert (np.abs(got - wanted) > 1e-4 * step).mean() < 0.02, "more than ties differ"


def test_levels_are_those_that_are_stored() -> None:
    stored = bnb.encode(bnb.NF4, weight(4, 64, 0))["weight.quant_map"]
    assert stored.double().numpy() == pytest.approx(reference.nf4_levels(), abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_decodes_as_bitsandbytes_does(kind: str, dtype: torch.dtype) -> None:
    dense = weight(16, 128, 3, dtype)
    if kind == "nf4":
        packed, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
        wanted = functional.dequantize_4bit(packed, state)
    else:
        values, scales, _ = functional.int8_vectorwise_quant(dense.half())
        wanted = functional.int8_vectorwise_dequant(values, scales).to(dtype)
    stored = bnb.Stored(KINDS[kind], dtype)
    got = stored.decode(bnb.encode(KINDS[kind], dense))
    assert got.dtype == dtype and torch.equal(got, wanted)
    turned = bnb.Stored(KINDS[kind], dtype, transposed=True).decode(bnb.encode(KINDS[kind], dense))
    assert torch.equal(turned, wanted.t()) and turned.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_names(kind: str) -> None:
    made = {f"a.b.{name}" for name in bnb.encode(KINDS[kind], weight(4, 64, 0))}
    assert made <= set(bnb.Stored(KINDS[kind], torch.float32).names("a.b"))
    assert bnb.modules([*made, "a.c.weight", "a.norm.weight"]) == {"a.b": KINDS[kind]}
    assert {name for name in made if not name.endswith(bnb.BESIDE)} == {"a.b.weight"}


def test_the_shape_behind_packed_values() -> None:
    made = {f"a.{name}": tensor for name, tensor in bnb.encode(bnb.NF4, weight(6, 100, 0)).items()}
    assert bnb.weight_shape("a.weight", made, made.__getitem__) == [6, 100]
    assert bnb.weight_shape("a.weight.absmax", made, made.__getitem__) is None
    assert bnb.weight_shape("b.weight", {"b.weight": torch.ones(2)}, made.__getitem__) is None


def test_convertible_is_what_transformers_replaces() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(
        {"plain": nn.Linear(2, 3), "conv": Conv1D(3, 2), "own": Own(2, 3), "table": nn.Embedding(4, 2)}
    )
    assert bnb.convertible(model) == {"plain": False, "conv": True}
