"""Low rank and structured pruning where weight and statistics lie on a GPU: nothing crosses over, the CPU's bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pretend import PretendGPU
from reference.layers import inputs, stats_of, weights
from torch import Tensor

from llmcomp.calibration.stats import InputStats
from llmcomp.methods import LOW_RANK, structured
from llmcomp.methods.factors import correct, quantize_factors
from llmcomp.methods.gptq import gptq
from llmcomp.methods.lowrank import refit, spectrum, svd_llm
from llmcomp.schemes import Scheme
from llmcomp.weights import LowRankWeight


def low_rank(weight: Tensor, stats: InputStats) -> list[Tensor]:
    found = []
    for entry in LOW_RANK.values():
        found += entry.function(weight, stats, 9, torch.float32, entry.config()).weight.factors()
    held = svd_llm(weight, stats, 9, torch.float32).weight
    assert isinstance(held, LowRankWeight)
    for fixed in ("left", "right"):
        found += refit(weight, held, stats.gram, 0.9 * stats.gram, fixed).factors()
    return [*found, spectrum(weight, stats).energies]


def integers(weight: Tensor, stats: InputStats) -> list[Tensor]:
    held = svd_llm(weight, stats, 9, torch.float32).weight
    four = quantize_factors(weight, held, stats, (Scheme(4), Scheme(4, 32)), torch.float32)
    base = gptq(weight, stats, Scheme(3, 32), torch.float32).weight
    corrected = correct(weight, base, stats, 4, torch.float32)
    return [*four.weight.factors(), four.row_error, corrected.weight.dense(), corrected.row_norm]


def structures(weight: Tensor, stats: InputStats) -> list[Tensor]:
    units, gram = structured.head_units(64, 8), stats.gram
    scores = structured.importance(weight, gram, units)
    kept = structured.choose(weight, gram, units, 5)
    return [
        scores,
        structured.compensated_importance(weight, gram, units),
        structured.taylor_importance(weight, [weight * 2], units),
        structured.most_important(scores, 3),
        kept,
        structured.compensate(weight, gram, units[kept.cpu()].flatten()),
    ]


@pytest.mark.parametrize("compute", [low_rank, integers, structures])
@pytest.mark.parametrize("rows", [48, 96])
def test_nothing_crosses_over_and_the_bits_are_the_cpus(
    compute: Callable[[Tensor, InputStats], list[Tensor]], rows: int
) -> None:
    weight, x = weights(rows, 64, 1), inputs(300, 64, 1)
    wanted = compute(weight, stats_of(x))
    with PretendGPU() as gpu:
        stats = stats_of(x)
        there = replace(
            stats, gram=stats.gram.to("cuda"), absmax=stats.absmax.to("cuda"), diagonal=stats.diagonal.to("cuda")
        )
        found = compute(weight.to("cuda"), there)
        assert all(gpu.holds(one) for one in found)
        found = [one.cpu() for one in found]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
