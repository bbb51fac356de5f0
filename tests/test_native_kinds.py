"""Sparse and low-rank weights in llmcomp's own layout: read as the page on the layout says, and what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import random_of
from torch import Tensor

from llmcomp import native, native_kinds, packing
from llmcomp.errors import BadCheckpoint, BadRecipe, RunError
from llmcomp.formats import FORMATS
from llmcomp.formats.opening import PackedRef
from llmcomp.kinds import Kind, LowRank, Sparse
from llmcomp.patterns import Pattern
from llmcomp.schemes import Scheme

TWO_FOUR, INT4 = Pattern(2, 4), Scheme(4, 32, False)


def bits_of(row: Tensor, width: int, count: int) -> list[int]:
    """Numbers of `width` bits, least significant first, bit by bit from a row of bytes or words."""
    raw = row.contiguous().view(torch.uint8).tolist()
    bits = [byte >> place & 1 for byte in raw for place in range(8)]
    return [sum(bits[n * width + place] << place for place in range(width)) for n in range(count)]


def reference(tensors: dict[str, Tensor], kind: Kind) -> Tensor:
    """The dense weight in float64, from the tensors one number at a time, as docs/layout.md has it."""
    if isinstance(kind, LowRank):
        shape = None
        factors = []
        for part, scheme in (("left", kind.left), ("right", kind.right), ("base", kind.base)):
            own = {name.removeprefix(f"{part}."): one for name, one in tensors.items() if name.startswith(part)}
            if own:
                shape = own[native.SHAPE].tolist() if scheme is not None else None
                factors.append(own["weight"].double() if scheme is None else integers(own, scheme, *shape))
        return factors[0] @ factors[1] + (factors[2] if len(factors) == 3 else 0)
    assert isinstance(kind, Sparse) and kind.pattern.kept is not None and kind.pattern.of is not None
    rows, columns = tensors[native.SHAPE].tolist()
    kept = columns // kind.pattern.of * kind.pattern.kept
    dense = torch.zeros(rows, columns, dtype=torch.float64)
    if kind.values is None:
        values = tensors["weight_values"].double()
    else:
        group = kind.values.group_size or columns
    for row in range(rows):
        places = bits_of(tensors["weight_indices"][row], (kind.pattern.of - 1).bit_length(), kept)
        for n, place in enumerate(places):
            column = n // kind.pattern.kept * kind.pattern.of + place
            if kind.values is None:
                dense[row, column] = values[row, n]
                continue
            number = bits_of(tensors["weight_packed"][row], kind.values.bits, kept)[n]
            signed = number - (number >> 7 << 8) if kind.values.bits == 8 else number - (1 << (kind.values.bits - 1))
            zero = zero_at(tensors, kind.values, row, column // group)
            dense[row, column] = (signed - zero) * float(tensors["weight_scale"][row, column // group])
    return dense


def zero_at(tensors: dict[str, Tensor], scheme: Scheme, row: int, group: int) -> int:
    if scheme.symmetric:
        return 0
    return bits_of(tensors["weight_zero_point"][:, group], scheme.bits, row + 1)[row] - (1 << (scheme.bits - 1))


def integers(tensors: dict[str, Tensor], scheme: Scheme, rows: int, columns: int) -> Tensor:
    values = native.integers(tensors["weight_packed"], scheme.bits, columns).double()
    group = scheme.group_size or columns
    zeros = [[zero_at(tensors, scheme, row, n) for n in range(columns // group)] for row in range(rows)]
    spread = torch.tensor(zeros, dtype=torch.float64).repeat_interleave(group, 1)
    return (values - spread) * tensors["weight_scale"].double().repeat_interleave(group, 1)


KINDS: dict[str, tuple[Kind, int, int]] = {
    "2:4": (Sparse(TWO_FOUR), 5, 44),
    "2:4 one row": (Sparse(TWO_FOUR), 1, 4),
    "4:8": (Sparse(Pattern(4, 8)), 3, 24),
    "1:3": (Sparse(Pattern(1, 3)), 4, 33),
    "3:17": (Sparse(Pattern(3, 17)), 2, 51),
    "2:4 int4 asym": (Sparse(TWO_FOUR, INT4), 5, 96),
    "2:4 int8": (Sparse(TWO_FOUR, Scheme(8)), 3, 20),
    "4:8 int3": (Sparse(Pattern(4, 8), Scheme(3, 64)), 2, 64),
    "2:5 int2 asym": (Sparse(Pattern(2, 5), Scheme(2, None, False)), 4, 35),
    "2:4 w8a8 static": (Sparse(TWO_FOUR, Scheme(8, activations="int8-static")), 3, 32),
    "rank": (LowRank(3), 7, 5),
    "rank 1": (LowRank(1), 1, 9),
    "rank int4 and int8": (LowRank(32, INT4, Scheme(8)), 64, 33),
    "rank on int4": (LowRank(2, None, None, Scheme(4, 32)), 64, 32),
    "all integers": (LowRank(32, Scheme(4, 32), Scheme(3, 32, False), Scheme(2, 64)), 40, 64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_as_the_page_says(name: str, dtype: torch.dtype) -> None:
    kind, rows, columns = KINDS[name]
    weight = random_of(kind, (rows, columns), dtype)
    tensors = native_kinds.to_tensors(weight, kind)
    assert set(tensors) <= set(native_kinds.names_of(kind))
    assert {native_kinds.main_of(kind), native_kinds.floating_of(kind)} <= set(tensors)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    expected, dense = reference(tensors, kind), weight.dense()
    assert (dense.dtype, dense.shape) == (dtype, expected.shape)
    # A sparse weight is itself; an integer is scaled in the weight's dtype, and a product rounded once.
    allowed = 0 if isinstance(kind, Sparse) and kind.values is None else 2 * torch.finfo(dtype).eps
    if isinstance(kind, LowRank) and (kind.left or kind.right or kind.base):
        allowed *= 8  # factors are rounded when they are decoded
    assert float((dense.double() - expected).abs().max()) <= allowed * float(expected.abs().max())
    again = native_kinds.from_tensors(tensors, kind)
    assert again.nbytes == weight.nbytes
    assert torch.equal(again.dense().view(torch.uint8), dense.view(torch.uint8))
    saved = native_kinds.to_tensors(again, kind)
    assert list(saved) == list(tensors)
    assert all(torch.equal(saved[part], tensor) for part, tensor in tensors.items())


@pytest.mark.parametrize("name", KINDS)
def test_bytes_and_headers_are_known_beforehand(name: str) -> None:
    kind, rows, columns = KINDS[name]
    ref = PackedRef("m", "linear", rows, columns, False)
    layout = FORMATS["llmcomp"]([(ref, kind)])
    weight = random_of(kind, (rows, columns), torch.bfloat16)
    tensors = layout.tensors(ref, weight)
    assert layout.nbytes(ref, 2) == sum(tensor.nbytes for tensor in tensors.values())
    blank = layout.blank(ref, kind, torch.bfloat16)
    if not (isinstance(kind, LowRank) and rows == 64):  # 4-bit integers in blocks have another shape
        assert {key: (one.dtype, one.shape) for key, one in blank.items()} == {
            key: (one.dtype, one.shape) for key, one in tensors.items()
        }
    assert torch.equal(layout.decode(ref, tensors), weight.dense())
    turned = PackedRef("m", "linear", rows, columns, True)
    assert torch.equal(layout.decode(turned, tensors), weight.dense().t())
    said = json.loads(json.dumps(layout.config(torch.nn.Linear(1, 1))))
    assert native.kinds_of(said) == {"m": kind}


patterns = st.integers(2, 40).flatmap(lambda of: st.builds(Pattern, st.integers(1, of - 1), st.just(of)))
schemes = st.one_of(st.none(), st.builds(Scheme, st.sampled_from((2, 3, 4, 8)), st.none(), st.booleans()))


@settings(max_examples=60, deadline=None)
@given(patterns, schemes, st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_any_pattern_comes_back(pattern: Pattern, values: Scheme | None, rows: int, groups: int, seed: int) -> None:
    kind, columns = Sparse(pattern, values), groups * (pattern.of or 1)
    weight: Any = random_of(kind, (rows, columns), torch.bfloat16, seed)
    tensors = native_kinds.to_tensors(weight, kind)
    again: Any = native_kinds.from_tensors(tensors, kind)
    assert torch.equal(again.mask, weight.mask) and torch.equal(again.values, weight.values)
    assert sum(one.nbytes for one in tensors.values()) == native_kinds.nbytes(kind, rows, columns, 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 70), st.integers(0, 99))
def test_numbers_of_any_width_in_bytes(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = packing.pack_bytes(numbers, bits)
    assert packed.shape == (rows, -(-columns * bits // 8))
    assert [bits_of(row, bits, columns) for row in packed] == numbers.tolist()
    assert torch.equal(packing.unpack_bytes(packed, bits, columns), numbers)


SPARSE, QUANTIZED, RANK = Sparse(TWO_FOUR), Sparse(TWO_FOUR, INT4), LowRank(32, INT4)
BAD: dict[str, tuple[Kind, Callable[[dict[str, Tensor]], object], str]] = {
    "values": (SPARSE, lambda t: t.pop("weight_values"), "^weight_values is missing$"),
    "indices": (SPARSE, lambda t: t.pop("weight_indices"), "^weight_indices is missing$"),
    "shape": (SPARSE, lambda t: t.pop("weight_shape"), "^weight_shape is missing$"),
    "values cut": (SPARSE, lambda t: t.update(weight_values=t["weight_values"][1:]), r"float32 \[7, 32\], expected"),
    "values whole": (SPARSE, lambda t: t.update(weight_values=t["weight_values"].int()), "int32 .*a floating type"),
    "indices wide": (SPARSE, lambda t: t.update(weight_indices=t["weight_indices"].int()), "expected uint8"),
    "places": (SPARSE, lambda t: t["weight_indices"][3].fill_(0b0001), "does not say which 2 of every 4"),
    "places back": (SPARSE, lambda t: t["weight_indices"][3, 0].fill_(0x1B), "does not say which 2 of every 4"),
    "shape of it": (SPARSE, lambda t: t["weight_shape"].fill_(6), r"\[6, 6\] is no shape of a weight of 2:4"),
    "three": (SPARSE, lambda t: t.update(weight_shape=torch.ones(3, dtype=torch.int64)), "is not that of a weight"),
    "integers": (QUANTIZED, lambda t: t.pop("weight_packed"), "^weight_packed is missing$"),
    "zeros": (QUANTIZED, lambda t: t.pop("weight_zero_point"), "^weight_zero_point is missing$"),
    "scales": (QUANTIZED, lambda t: t.update(weight_scale=t["weight_scale"][:, :1]), "weight_scale is float32"),
    "left": (RANK, lambda t: t.pop("left.weight_packed"), "^left.weight_packed is missing$"),
    "right": (RANK, lambda t: t.pop("right.weight"), "^right.weight is missing$"),
    "rank": (RANK, lambda t: t.update({"right.weight": t["right.weight"][1:]}), r"right.weight is float32 \[31, 64\]"),
    "dtypes": (RANK, lambda t: t.update({"right.weight": t["right.weight"].half()}), "right.weight is float16, and"),
    "left scales": (RANK, lambda t: t.update({"left.weight_scale": t["left.weight_scale"].int()}), "a floating type"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_tensors_that_cannot_be_are_one_sentence(name: str) -> None:
    kind, change, sentence = BAD[name]
    tensors = native_kinds.to_tensors(random_of(kind, (8 if kind is not RANK else 40, 64)), kind)
    change(tensors)
    with pytest.raises(BadCheckpoint, match=sentence) as caught:
        native_kinds.from_tensors(tensors, kind)
    assert "\n" not in str(caught.value)


def test_a_pattern_that_is_no_power_of_two_has_places_that_cannot_be() -> None:
    kind = Sparse(Pattern(1, 3))
    tensors = native_kinds.to_tensors(random_of(kind, (2, 12)), kind)
    tensors["weight_indices"][0] = 0b11  # the fourth of three
    with pytest.raises(BadCheckpoint, match="does not say which 1 of every 3"):
        native_kinds.from_tensors(tensors, kind)


SPARSE_GROUP = {"kind": "sparse", "kept": 2, "of": 4, "values": None, "modules": ["m"]}
LOW_GROUP = {"kind": "low_rank", "rank": 4, "left": None, "right": None, "base": None, "modules": ["m"]}
INSIDE = {"kind": "quantized", "bits": 4, "group_size": None, "symmetric": True, "activations": None}
BAD_GROUPS: dict[str, tuple[dict[str, Any], str]] = {
    "field": ({**SPARSE_GROUP, "block": 4}, "block is no field of sparse"),
    "field of integers": ({**INSIDE, "order": 1, "modules": ["m"]}, "order is no field of quantized"),
    "lacks": ({key: one for key, one in LOW_GROUP.items() if key != "right"}, "it lacks right"),
    "kept": ({**SPARSE_GROUP, "kept": 4}, "4:4 cannot be"),
    "kept as text": ({**SPARSE_GROUP, "kept": "2"}, "kept is '2'"),
    "yes": ({**LOW_GROUP, "rank": True}, "rank is True"),
    "rank": ({**LOW_GROUP, "rank": 0}, "A rank of 0 cannot be"),
    "kind": ({**SPARSE_GROUP, "kind": "blocks"}, "weights of kind 'blocks'"),
    "inside": ({**SPARSE_GROUP, "values": SPARSE_GROUP}, "of kind 'sparse' where this release reads quantized"),
    "modules inside": ({**SPARSE_GROUP, "values": {**INSIDE, "modules": []}}, "modules is no field of quantized"),
    "bits inside": ({**LOW_GROUP, "left": {**INSIDE, "bits": 5}}, "--bits 5 cannot be"),
    "left as number": ({**LOW_GROUP, "left": 4}, "left is 4"),
    "inputs": (
        {**LOW_GROUP, "base": {**INSIDE, "bits": 8, "activations": "int8-dynamic"}}, "Inputs of low-rank weights stay",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_groups_that_cannot_be_are_one_sentence(name: str) -> None:
    group, sentence = BAD_GROUPS[name]
    with pytest.raises(BadCheckpoint, match=sentence):
        native.kinds_of({"quant_method": "llmcomp", "version": 1, "weights": [group]})


REF = PackedRef("m", "linear", 8, 64, False)
REFUSED: dict[str, tuple[str, Kind, PackedRef, str]] = {
    "unstructured": ("llmcomp", Sparse(Pattern(removed=0.5)), REF, "unstructured 50%; take --format dense"),
    "width": ("llmcomp", Sparse(Pattern(2, 3)), REF, "does not fit m of 64 inputs"),
    "groups": ("llmcomp", Sparse(TWO_FOUR, Scheme(4, 128)), REF, "Groups of 128 do not divide the 64 columns of m;"),
    "rank groups": ("llmcomp", LowRank(8, Scheme(4, 32)), REF, "do not divide the 8 columns of m.left"),
    "large rank": ("llmcomp", LowRank(9), REF, "Rank 9 is above the widths of m, 8 × 64"),
    "large groups": ("llmcomp", Sparse(Pattern(2, 512)), REF, "up to M = 256"),
    "looked up": ("llmcomp", LowRank(2), PackedRef("e", "embeddings", 8, 64, False), "e looks rows up"),
    "compressed-tensors": ("compressed-tensors", Sparse(TWO_FOUR), REF, "no form for sparse weights that are not"),
    "their low rank": ("compressed-tensors", LowRank(2), REF, "for low-rank weights, such as m: --format llmcomp"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_format_cannot_store_is_one_sentence(name: str) -> None:
    form, kind, ref, sentence = REFUSED[name]
    with pytest.raises(BadRecipe, match=sentence):
        FORMATS[form]([(ref, kind)])


def test_integers_with_a_mask_lie_as_integers_where_nothing_packs_them() -> None:
    kind = Sparse(TWO_FOUR, INT4)
    weight = random_of(kind, (8, 64))
    layout = FORMATS["compressed-tensors"]([(REF, kind)])
    tensors = layout.tensors(REF, weight)
    assert torch.equal(layout.decode(REF, tensors), weight.dense())
    assert "m.weight_packed" in tensors
    anywhere = FORMATS["llmcomp"]([(REF, Sparse(Pattern(removed=0.5), INT4))])
    assert torch.equal(anywhere.decode(REF, anywhere.tensors(REF, weight)), weight.dense())
    dense = FORMATS["dense"]([(REF, kind), (REF, LowRank(2)), (REF, Sparse(Pattern(removed=0.5)))])
    assert torch.equal(dense.decode(REF, dense.tensors(REF, weight)), weight.dense())


@pytest.mark.parametrize("kind", [SPARSE, QUANTIZED, LowRank(3), LowRank(4, None, Scheme(8)), INT4])
def test_a_weight_of_another_kind_is_refused(kind: Kind) -> None:
    with pytest.raises(RunError, match="is not what was planned"):
        native_kinds.to_tensors(random_of(LowRank(4), (8, 64)), kind)
