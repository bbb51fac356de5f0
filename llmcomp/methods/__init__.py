"""METHODS: every method that llmcomp has, written out. To add one: its file, one line here, one test.

A method is a function (weight [rows, in], stats, scheme, dtype, config) → Solution. It touches nothing else.
Rows are solved independently given the statistics, so linears that share an input are stacked and solved
together.

SPARSE: those that remove weights, (weight [rows, in], stats, pattern, dtype, config, mask) → Solution; mask: of an
earlier step or None, and what it has removed stays removed. Rows are independent but where they compete for what an
unstructured pattern keeps (`SparseMethod.by_row`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmcomp.methods.alps import ALPSConfig, alps, alps_flops
from llmcomp.methods.awq import AWQConfig, AWQGPTQConfig, awq, awq_gptq, search_scale
from llmcomp.methods.gptaq import GPTAQConfig, aim, gptaq
from llmcomp.methods.gptq import GPTQConfig, gptq
from llmcomp.methods.lowrank import ASVDConfig, SVDConfig, SVDLLMConfig, asvd, svd, svd_llm
from llmcomp.methods.rtn import RTNConfig, rtn, rtn_clip
from llmcomp.methods.signround import SignRoundConfig, Tuned, clip_start, gptq_start, tune
from llmcomp.methods.solution import Solution
from llmcomp.methods.sparsegpt import CHUNK_WEIGHTS, GROUPED_WEIGHTS, SparseGPTConfig, sparsegpt
from llmcomp.methods.wanda import MagnitudeConfig, WandaConfig, magnitude, wanda


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        calibrated: whether it reads statistics at all (and so needs calibration data).
        scale: how it chooses scales of its input, where it wants them: (weights, schemes, stats, channels, config)
            → [in]. Weights and statistics reach `function` scaled.
        factorizes: whether it factorizes the Gram matrix.
        tune: how it goes on from what `function` gives, all weights of a block together, where it does:
            ({name: (weight, start)}, descend, loss, batches, config, seed) → Tuned.
        aim: what `function` is given in the place of a weight behind compressed blocks, where that is another one:
            (weight [out, in], Gram matrix, cross-Gram matrix with the source's inputs, config) → [out, in].
    """

    function: Callable[..., Solution]
    config: type[Any]
    calibrated: bool
    summary: str
    scale: Callable[..., Tensor] | None = None
    factorizes: bool = False
    tune: Callable[..., Tuned] | None = None
    aim: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class SparseMethod:
    """One method that removes weights.

    Attributes:
        calibrated: whether it reads statistics at all (and so needs calibration data).
        by_row: whether an unstructured pattern is met in each row by itself. Else the rows of what is given compete,
            and weights that are to keep their own sparsity must not be stacked. N:M is always met in each row.
        factorizes: whether it factorizes the Gram matrix, so that the next weight finds the factor in its place.
        squares: float32 matrices [in, in] that it makes beside the Gram matrix.
        copies: float32 copies of a chunk of rows that it holds at once.
        flops: (config, rows, in) → operations beyond one pass over the weights, and what is counted for factorizing.
        grouped: weights of the rows that it takes at a time by N:M.
    """

    function: Callable[..., Solution]
    config: type[Any]
    calibrated: bool
    summary: str
    by_row: bool = False
    factorizes: bool = False
    squares: int = 0
    copies: int = 0
    flops: Callable[[Any, float, float], float] = lambda config, rows, columns: 0.0
    grouped: int = CHUNK_WEIGHTS


METHODS: dict[str, Method] = {
    "gptq": Method(gptq, GPTQConfig, True, "errors of each column compensated in those that follow", factorizes=True),
    "gptaq": Method(
        gptaq, GPTAQConfig, True, "GPTQ, some way towards what the source gives there", factorizes=True, aim=aim
    ),
    "awq": Method(awq, AWQConfig, True, "channels that carry more are rounded more finely", search_scale),
    "awq-gptq": Method(awq_gptq, AWQGPTQConfig, True, "AWQ's scales, GPTQ's rounding", search_scale, factorizes=True),
    "signround": Method(
        clip_start, SignRoundConfig, True, "rounding and ranges learned from each block's output", tune=tune
    ),
    "gptq-signround": Method(
        gptq_start, SignRoundConfig, True, "the same, from GPTQ's rounding on", factorizes=True, tune=tune
    ),
    "rtn-clip": Method(rtn_clip, RTNConfig, True, "round to nearest, clipping searched by activation-weighted error"),
    "rtn": Method(rtn, RTNConfig, False, "round to nearest on the full range; no calibration"),
}

SPARSE: dict[str, SparseMethod] = {
    "sparsegpt": SparseMethod(
        sparsegpt, SparseGPTConfig, True, "what is removed is made up for in the columns that follow", factorizes=True,
        grouped=GROUPED_WEIGHTS,
    ),
    "alps": SparseMethod(
        alps, ALPSConfig, True, "the mask searched by ADMM, the best weights on it solved for", squares=1, copies=6,
        flops=alps_flops,
    ),
    "wanda": SparseMethod(wanda, WandaConfig, True, "what carries least of its input is removed", by_row=True),
    "magnitude": SparseMethod(magnitude, MagnitudeConfig, False, "the smallest are removed; no calibration"),
}

# What `--method auto` takes at each width, by perplexity on the small trained decoder of evals/RESULTS.md: books, which
# it was trained and is calibrated on, and WikiText. At 3 bits gptaq takes gptq's 48.01 on books to 47.75
# (WikiText: 122.76 to 124.16); at 4 bits all come out alike on books, and gptq nearest to the original on WikiText; at
# 2 bits learning is far ahead of gptq (53.2 for 57.7; 148.8 for 137.6). 8 bits: nothing to gain.
AUTO: dict[int, str] = {2: "gptq-signround", 3: "gptaq", 4: "gptq", 8: "gptq"}

# What it takes where blocks cannot be tuned as a whole, or weights not aim at the source's outputs.
AUTO_ALONE = "gptq"


@dataclass(frozen=True)
class LowRankMethod:
    """One method of `LOW_RANK`: (weight [out, in], stats, rank, dtype, config) → Solution of a LowRankWeight. Weights
    that share an input are factorized one by one; statistics are only read.

    Attributes:
        calibrated: whether it reads statistics at all.
    """

    function: Callable[..., Solution]
    config: type[Any]
    calibrated: bool
    summary: str


LOW_RANK: dict[str, LowRankMethod] = {
    "svd-llm": LowRankMethod(svd_llm, SVDLLMConfig, True, "the rank-r factors of least output error"),
    "asvd": LowRankMethod(asvd, ASVDConfig, True, "SVD with inputs weighted by their size"),
    "svd": LowRankMethod(svd, SVDConfig, False, "the factors nearest to the weight itself; no calibration"),
}
