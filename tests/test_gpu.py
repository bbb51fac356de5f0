"""Every method on a CUDA device: what it makes of tensors there is what the CPU makes of the same ones.

    python -m pytest -m gpu

These are the parts that do not care where they are; the loop over blocks is in tests/e2e/test_gpu_runs.py.
"""

from __future__ import annotations

import pytest
import torch
from packed import random_of
from test_packed_kinds import module_of
from tiny import build

from llmcomp import native_kinds
from llmcomp.adapters.discover import discover
from llmcomp.calibration.stats import GramAccumulator, InputStats
from llmcomp.kinds import Kind, LowRank, Sparse
from llmcomp.methods import METHODS
from llmcomp.patterns import Pattern
from llmcomp.pipeline.assign import Task, assign
from llmcomp.pipeline.solve import solve_stage
from llmcomp.recipe import QuantizeStep
from llmcomp.schemes import Scheme

WIDTH = 256
SCHEMES = [(4, 128, True), (3, 64, False), (2, 64, True), (8, "channel", True)]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def tasks(method: str, bits: int, group_size: int | str, symmetric: bool) -> list[Task]:
    adapter = discover(build("llama", hidden_size=WIDTH))
    step = QuantizeStep(method=method, bits=bits, group_size=group_size, symmetric=symmetric)  # type: ignore[arg-type]
    found = assign(adapter, step).tasks
    return [found[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"]


def statistics(device: str) -> InputStats:
    accumulator = GramAccumulator()
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    for _ in range(3):
        accumulator.add((torch.randn(400, WIDTH, generator=generator) @ mixing).to(device))
    return accumulator.finish("q_proj")


def weights(wanted: list[Task], device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(task.ref.out_features, task.ref.in_features) for task in wanted]
    return [(0.05 * torch.randn(shape, generator=generator)).to(device) for shape in shapes]


def test_statistics() -> None:
    there, here = statistics("cuda"), statistics("cpu")
    assert there.gram is not None and here.gram is not None and there.gram.is_cuda
    torch.testing.assert_close(there.gram.cpu(), here.gram, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(there.absmax.cpu(), here.absmax)
    assert there.tokens == here.tokens


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), SCHEMES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, bits: int, group_size: int | str, symmetric: bool) -> None:
    """Products are summed in another order, so a few weights go the other way at a rounding edge; the error that the
    method is to keep small is the same."""
    wanted = tasks(method, bits, group_size, symmetric)
    there, here = (solve_stage(wanted, weights(wanted, device), statistics(device), {}) for device in ("cuda", "cpu"))
    for cuda, cpu in zip(there, here, strict=True):
        assert cuda.solution.weight.values.is_cuda and cuda.solution.weight.scale.is_cuda
        torch.testing.assert_close(cuda.solution.weight.scale.cpu(), cpu.solution.weight.scale, rtol=0.05, atol=0)
        same = (cuda.solution.weight.values.cpu() == cpu.solution.weight.values).double().mean()
        assert same > 0.9
        if cpu.solution.row_error is not None and cuda.solution.row_error is not None:
            assert float(cuda.solution.row_error.nansum()) == pytest.approx(
                float(cpu.solution.row_error.nansum()), rel=0.02
            )


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.scale is not None])
def test_every_search_for_scales(method: str) -> None:
    entry, wanted = METHODS[method], tasks(method, 4, 128, True)
    assert entry.scale is not None
    schemes, channels = [task.scheme for task in wanted], torch.arange(WIDTH)
    found = [
        entry.scale(weights(wanted, device), schemes, statistics(device), channels, entry.config())
        for device in ("cuda", "cpu")
    ]
    assert found[0].is_cuda
    assert float((found[0].cpu() == found[1]).double().mean()) > 0.95


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [
        (Sparse(Pattern(2, 4)), "semi-structured"), (Sparse(Pattern(4, 8)), "dense"),
        (Sparse(Pattern(2, 4), Scheme(4, 64)), "plain"), (LowRank(32), "dense"),
        (LowRank(32, Scheme(4), Scheme(8)), "plain"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_and_low_rank_modules(kind: Kind, kernel: str, dtype: torch.dtype) -> None:
    """There and back again: what is computed there is near float64, and what is saved there is the file."""
    if kernel == "semi-structured" and not torch.backends.cusparselt.is_available():
        pytest.skip("this torch has no cuSPARSELt")
    weight = random_of(kind, (256, 512), dtype)
    tensors = native_kinds.to_tensors(weight, kind)
    module = module_of(kind, weight).to("cuda")
    assert module.kernel == kernel
    for tokens in (1, 17):
        x = torch.randn(2, tokens, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
        expected = x.double() @ weight.dense().double().t()
        found = module(x.to("cuda")).detach()
        assert float((found.cpu().double() - expected).norm() / expected.norm()) < 2e-2
    state = module.state_dict()
    assert all(torch.equal(state[part].cpu(), one) for part, one in tensors.items())
    assert torch.equal(module.to("cpu").dense(), weight.dense())
