"""Every kernel against float64, by whatever route it takes: few rows, many rows, odd widths, padding, no rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcomp import native, packing
from llmcomp.activations import quantized
from llmcomp.kernels import KERNELS, int4, kernel_for, rounded, tiles
from llmcomp.kernels.tiles import Grid
from llmcomp.schemes import Scheme
from llmcomp.weights import QuantizedWeight

# Relative error of a product: factors rounded to bf16 (2^-9 each) and a result in bf16.
BF16 = 6e-3


def made(
    scheme: Scheme, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, scheme.groups(columns))
    values = torch.randint(scheme.qmin, scheme.qmax + 1, (rows, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand(shape, generator=generator) + 0.5).mul(0.02).to(dtype)
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(scheme.qmin, scheme.qmax + 1, shape, generator=generator, dtype=torch.int8)
    static = torch.tensor([0.03], dtype=dtype) if scheme.activations == "int8-static" else None
    return QuantizedWeight(values, scale, zero, scheme, static)


def reference(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x W' in float64, from integers, scales and zero points one by one."""
    columns = weight.values.shape[1]
    group = columns // weight.scale.shape[1]
    dense = weight.values.double()
    if weight.zero_point is not None:
        dense -= weight.zero_point.double().repeat_interleave(group, 1)
    dense *= weight.scale.double().repeat_interleave(group, 1)
    if weight.scheme.activations:
        x = quantized(x, weight.input_scale)
    return x.double() @ dense.t()


def product(x: Tensor, weight: QuantizedWeight, kernel: str | None = None) -> tuple[Tensor, str]:
    rows, columns = weight.values.shape
    name = kernel or kernel_for(weight.scheme, rows, columns, "cpu")
    grid = Grid(weight.scheme, columns, weight.scale, weight.zero_point, weight.input_scale)
    words = packing.pack(weight.values, weight.scheme.bits)
    forms = {one.dtype: one for one in (native.stored(weight, False), native.stored(weight, True), words)}
    found = []
    for stored in forms.values():
        held = KERNELS[name].hold(stored, grid)
        assert torch.equal(KERNELS[name].values(held, grid), weight.values)
        found.append(KERNELS[name].product(x, held, grid))
    assert all(torch.equal(one, found[0]) for one in found)
    return found[0], name


def error(found: Tensor, expected: Tensor) -> float:
    """Of the norm, against a float64 reference of the same shape."""
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def close(found: Tensor, expected: Tensor, allowed: float = BF16) -> None:
    assert error(found, expected) < allowed


SCHEMES = {
    "int4": [Scheme(4, 128), Scheme(4, 32), Scheme(4), Scheme(4, 64, False), Scheme(3, 128), Scheme(2, 64, False)],
    "int8": [Scheme(8)],
    "a8": [Scheme(8, activations="int8-dynamic"), Scheme(8, activations="int8-static")],
    "plain": [Scheme(8, 128), Scheme(8, symmetric=False)],
}


FEW = {tiles.few_rows(bits) for bits in (4, 8)}


@pytest.mark.parametrize("rows", sorted({1, 3, *FEW, *(few + 1 for few in FEW), 150}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kernel", "scheme"), [(name, one) for name, some in SCHEMES.items() for one in some])
def test_a_product_is_that_of_the_decoded_weight(
    kernel: str, scheme: Scheme, dtype: torch.dtype, rows: int
) -> None:
    weight = made(scheme, 192, 256, dtype)
    x = torch.randn(1, rows, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, name = product(x, weight)
    assert name == kernel
    assert found.dtype == dtype
    close(found, reference(x, weight))


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (7, 64), (65, 96), (130, 288), (64, 1056)])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("scheme", [Scheme(4), Scheme(4, 32), Scheme(8), Scheme(8, activations="int8-dynamic")])
def test_widths_that_no_block_divides(scheme: Scheme, tokens: int, rows: int, columns: int) -> None:
    weight = made(scheme, rows, columns)
    x = torch.randn(1, tokens, columns, generator=torch.Generator().manual_seed(2)).bfloat16()
    found, name = product(x, weight)
    assert name != "plain"
    close(found, reference(x, weight), 2 * BF16)


@pytest.mark.parametrize("columns", [12, 20, 33])
@pytest.mark.parametrize(
    "scheme", [Scheme(4), Scheme(8), Scheme(3, symmetric=False), Scheme(8, activations="int8-dynamic")]
)
def test_widths_that_operators_read_past_go_the_plain_way(scheme: Scheme, columns: int) -> None:
    weight = made(scheme, 5, columns, torch.float32)
    x = torch.randn(1, 3, columns, generator=torch.Generator().manual_seed(3))
    found, name = product(x, weight)
    assert name == "plain"
    close(found, reference(x, weight))


@pytest.mark.parametrize("scheme", [Scheme(4), Scheme(8), Scheme(8, activations="int8-dynamic"), Scheme(8, 128)])
def test_inputs_that_are_views(scheme: Scheme) -> None:
    weight = made(scheme, 2, 256)
    whole = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(6)).bfloat16()
    for x in (whole[:, -1:], whole[:, 1:3], whole.transpose(0, 1)):
        found, _ = product(x, weight)
        close(found, reference(x, weight), 2 * BF16)
        assert found.is_contiguous()


@pytest.mark.parametrize("scheme", [one for some in SCHEMES.values() for one in some])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_operands_that_begin_anywhere(scheme: Scheme, tokens: int) -> None:
    """A file puts integers at any multiple of 8 bytes, and one row of a wider tensor is contiguous where it is: torch's
    operator for 8 bits faults on either."""
    weight = made(scheme, 192, 256)
    grid = Grid(weight.scheme, 256, weight.scale, weight.zero_point, weight.input_scale)
    stored = native.stored(weight, True)
    moved = torch.empty(stored.numel() + 8 // stored.element_size(), dtype=stored.dtype)[-stored.numel() :]
    kernel = KERNELS[kernel_for(scheme, 192, 256, "cpu")]
    held = kernel.hold(moved.copy_(stored.view(-1)).view(stored.shape), grid)
    x = torch.randn(tokens * 256 + 3, generator=torch.Generator().manual_seed(7)).bfloat16()[3:].view(tokens, 256)
    close(kernel.product(x, held, grid), reference(x, weight), 2 * BF16)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 2, 9, 128])
@pytest.mark.parametrize("looked_up", [False, True])
def test_what_is_stored_is_read_back(bits: int, rows: int, looked_up: bool) -> None:
    weight = made(Scheme(bits, 32, symmetric=False), rows, 64)
    again = native.read(native.to_tensors(weight, looked_up), weight.scheme, transposed=False)
    assert torch.equal(again.values, weight.values)
    assert torch.equal(again.zero_point, weight.zero_point)


def test_int4_tiles_are_what_the_operator_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = made(Scheme(4, 64, False), 160, 512)
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(4)).bfloat16()
    operator, _ = product(x, weight, "int4")
    monkeypatch.setattr(int4, "few_rows", lambda bits: 0)
    monkeypatch.setattr(int4, "tile_rows", lambda columns, step: 2 * step)  # three tiles, the last one smaller
    tiled, _ = product(x, weight, "int4")
    assert error(tiled, operator.double()) < (2e-2 if tiles.product_dtype() == torch.bfloat16 else BF16)


@pytest.mark.parametrize("units", [True, False])
def test_rounded_inputs_with_and_without_units_for_int8(monkeypatch: pytest.MonkeyPatch, units: bool) -> None:
    monkeypatch.setattr(rounded, "multiplies_int8", lambda: units)
    weight = made(Scheme(8, activations="int8-dynamic"), 48, 1024, torch.float32)
    for tokens in (1, 40):
        x = torch.randn(1, tokens, 1024, generator=torch.Generator().manual_seed(5))
        found, _ = product(x, weight, "a8")
        exact = units or (tokens > tiles.few_rows(8) and tiles.product_dtype() == torch.float32)
        assert error(found, reference(x, weight)) < (1e-6 if exact else BF16)


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([2, 3, 4]), symmetric=st.booleans(), rows=st.integers(1, 140), words=st.integers(1, 9),
    tokens=st.integers(1, 60), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_int4_shape(bits: int, symmetric: bool, rows: int, words: int, tokens: int, seed: int) -> None:
    weight = made(Scheme(bits, 32, symmetric), rows, 32 * words, torch.float32, seed)
    x = torch.randn(1, tokens, 32 * words, generator=torch.Generator().manual_seed(seed))
    found, name = product(x, weight)
    assert name == "int4"
    # Each of input, scale, offset and result is rounded to bf16, 2^-9 of itself; sums may cancel, so each term counts.
    terms = weight.values.abs().double() + 8
    if weight.zero_point is not None:
        terms += weight.zero_point.abs().double().repeat_interleave(32, 1)
    bound = x.abs().double() @ (terms * weight.scale.double().repeat_interleave(32, 1)).t()
    assert bool(((found.double() - reference(x, weight)).abs() <= 2**-7 * bound).all())


def by_definition(values: Tensor, order: int4.Order) -> Tensor:
    """uint8 [rows / block, columns, block / 2], nibble by nibble."""
    nibbles = (values + 8).to(torch.uint8).view(-1, order.block, values.shape[1])
    packed = torch.empty(len(nibbles), values.shape[1], order.block // 2, dtype=torch.uint8)
    rows = list(range(order.block))
    for byte, (low, high) in enumerate(zip(rows[order.low], rows[order.high], strict=True)):
        packed[:, :, byte] = nibbles[:, low] + 16 * nibbles[:, high]
    return packed


@settings(max_examples=20, deadline=None)
@given(blocks=st.integers(1, 4), columns=st.integers(1, 70), seed=st.integers(0, 99))
def test_blocks_of_files_are_those_of_vectors(blocks: int, columns: int, seed: int) -> None:
    """AVX2's blocks as they are, and two of them as one of AVX512's, whatever machine this is."""
    values = made(Scheme(4), 64 * blocks, columns, seed=seed).values
    stored = packing.pack_blocks(values)
    assert torch.equal(stored, by_definition(values, int4.AVX2))
    assert torch.equal(packing.unpack_blocks(stored), values)
    assert torch.equal(int4.paired(stored), by_definition(values, int4.AVX512))


def test_blocks_of_files_are_computed_with_where_they_lie() -> None:
    """Where they are the machine's, and wherever the file happens to place them."""
    weight = made(Scheme(4, 64), 128, 256)
    grid = Grid(weight.scheme, 256, weight.scale, None, None)
    room = torch.empty(128 * 128 + 32, dtype=torch.uint8)
    for offset in (0, 8, 3):
        stored = room[offset : offset + 128 * 128].view(4, 256, 16).copy_(packing.pack_blocks(weight.values))
        held = int4.hold(stored, grid)
        assert torch.equal(int4.values(held, grid), weight.values)
        same = held["packed"].data_ptr() == stored.data_ptr()
        assert same == (offset % 8 == 0 and int4.order() == int4.AVX2)
        x = torch.randn(40, 256).bfloat16()
        close(int4.product(x, held, grid), reference(x, weight))


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(8, activations="int8-dynamic")])
def test_bytes_are_computed_with_wherever_they_and_the_inputs_lie(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AVX512's loads fault where an address is no multiple of their width; a file maps weights at any multiple of 8."""
    monkeypatch.setattr(rounded, "multiplies_int8", lambda: False)  # whose own route takes any address
    weight = made(scheme, 48, 64)
    grid, name = Grid(scheme, 64, weight.scale, None, None), kernel_for(scheme, 48, 64, "cpu")
    room, inputs = torch.empty(48 * 64 + 64, dtype=torch.int8), torch.randn(3 * 64 + 64).bfloat16()
    start = -room.data_ptr() % 64
    for offset in (0, 8, 16, 3):
        stored = room[start + offset : start + offset + 48 * 64].view(48, 64).copy_(weight.values)
        held = KERNELS[name].hold(stored, grid)
        assert offset % 16 or held["integers"].data_ptr() == stored.data_ptr()
        for place in (0, 4, 8, 1):
            x = inputs[place : place + 3 * 64].view(3, 64)
            close(KERNELS[name].product(x, held, grid), reference(x, weight))


def test_order_covers_every_row_of_a_block() -> None:
    order = int4.order()
    assert order is not None
    rows = list(range(order.block))
    assert sorted(rows[order.low] + rows[order.high]) == rows


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_order_of_lesser_machines_is_found_too(capability: str) -> None:
    """What torch lays out depends on the instruction set, which an environment variable lowers."""
    code = (
        "import torch, test_kernels as t\n"
        "from llmcomp.schemes import Scheme\n"
        "w = t.made(Scheme(4, 64, False), 80, 256)\n"
        "for n in (2, 50):\n"
        "    x = torch.randn(n, 256).bfloat16()\n"
        "    t.close(t.product(x, w, 'int4')[0], t.reference(x, w), 2e-2)\n"
        "for scheme in (Scheme(8), Scheme(8, activations='int8-dynamic')):\n"
        "    for n in (1, 2, 5):\n"
        "        t.test_operands_that_begin_anywhere(scheme, n)\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)}
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
