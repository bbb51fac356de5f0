"""Honest words: where a checkpoint is faster, and where only smaller."""

from __future__ import annotations

from llmcomp import native
from llmcomp.pipeline.assign import Task
from llmcomp.pipeline.job import Plan

_ZEROS = (
    "Removed weights are stored as integers like any other, so removing them makes the checkpoint neither smaller nor "
    "faster than rounding alone."
)
_PLACES = (
    "Of N:M weights only what is kept is stored, with its places. llmcomp puts it in its columns when it loads them, "
    "so in memory and in time nothing is gained by what was removed."
)
_SEMI = "CUDA GPUs since Ampere multiply 2:4 weights of 16 bits by torch's semi-structured kernels; not run here."


_FACTORS = (
    "Two thin factors in the place of a matrix are fewer bytes and fewer multiplications. One token by a 2048 × 2048 "
    "matrix of float32 took a CPU 0.24 ms at rank 128 and 0.8 at rank 512, dense 0.83 (docs/formats.md): small ranks "
    "are faster, large ones only smaller; `llmcomp bench` measures the model here. On GPUs it was not run."
)
_ON_TOP = "Factors that correct integers are a little more to store and to compute than the integers alone."


def labels(plan: Plan, format: str) -> list[str]:
    """Honest words on what the artefact is good for."""
    if format == "dense":
        return [_dense_label(plan)]
    return [*_packed_labels(plan, format), *_sparse_labels(plan, format), *_factor_labels(plan)]


def _factor_labels(plan: Plan) -> list[str]:
    found = [task.factoring for task in plan.assignment.tasks.values() if task.factoring is not None]
    said = [_FACTORS] if any(one.bits is None for one in found) else []
    return [*said, *([_ON_TOP] if any(one.bits is not None for one in found) else [])]


def _sparse_labels(plan: Plan, format: str) -> list[str]:
    tasks = [(task.pruning.pattern, task.scheme) for task in plan.assignment.tasks.values() if task.pruning is not None]
    packed = [(pattern, scheme) for pattern, scheme in tasks if format == native.METHOD and pattern.group is not None]
    said = [_ZEROS] if len(packed) < len(tasks) else []
    floating = any(scheme is None and pattern.label == "2:4" for pattern, scheme in packed)
    return [*said, *([_PLACES] if packed else []), *([_SEMI] if floating else [])]


def _packed_labels(plan: Plan, format: str) -> list[str]:
    if plan.whole:
        return [
            "Smaller on disk and in memory: plain transformers with bitsandbytes computes with the packed weights. "
            "Made for CUDA GPUs; on a CPU the kernels are there, fast ones for nf4 only with AVX512-BF16."
        ]
    if format == native.METHOD:
        tasks = plan.assignment.tasks.values()
        if all(task.scheme is None for task in tasks):
            memory = " and in memory" if any(task.factoring is not None for task in tasks) else ""
            return [
                f"Smaller on disk{memory}. Only llmcomp (`import llmcomp.hf`, `llmcomp.load`) opens it; "
                "`llmcomp export` writes what other readers can."
            ]
        return [
            "Smaller on disk and in memory: llmcomp (`import llmcomp.hf`, `llmcomp.load`) computes with the packed "
            "weights on a CPU; `llmcomp bench` measures how fast that is here. Other readers cannot open it; "
            "`llmcomp export` writes what they can."
        ]
    said = [
        "Smaller on disk and to download. Plain transformers decompresses it to dense weights on a CPU at load or "
        "at the first forward, so there it is neither smaller in memory nor faster."
    ]
    tasks = plan.assignment.tasks.values()
    if any(task.activations for task in tasks):
        said.append(
            "W8A8: vLLM multiplies 8-bit integers on CUDA GPUs; not run here. On a CPU plain transformers only "
            "simulates the rounded activations, which takes time."
        )
    elif all(_common(task) for task in tasks):
        said.append("A format for which vLLM has packed kernels on CUDA GPUs; not run here.")
    else:
        said.append("Not a format for which packed kernels are common: expect smaller, not faster, on GPUs.")
    return said


def _common(task: Task) -> bool:
    """Whether packed kernels for such a weight are common."""
    scheme = task.scheme
    return scheme is not None and scheme.bits in (4, 8) and scheme.symmetric and not task.ref.transposed


def _dense_label(plan: Plan) -> str:
    if any(task.factoring is not None and task.factoring.bits is None for task in plan.assignment.tasks.values()):
        size = "Larger by the head, which shared the embeddings' storage," if plan.untied else "As large as before"
        return f"{size} and as fast: each matrix is the product of its factors, for any software."
    if plan.reduction is not None and not plan.assignment.tasks:
        return (
            "Smaller on disk and in memory, with fewer multiplications, for any software: an ordinary dense model. "
            "`llmcomp bench` measures how much faster it is here."
        )
    patterns = {task.pruning.pattern.label for task in plan.assignment.tasks.values() if task.pruning is not None}
    if not patterns:
        less = "Smaller and with fewer multiplications by what was pruned; no smaller and no faster by rounding"
        size = "As large and as fast as before" if plan.reduction is None else less
        return f"{size}: dense weights on the quantization grid, for any software."
    size = "Larger by the head, which shared the embeddings' storage" if plan.untied else "As large as before"
    zeros = f"{size}: zeros are stored like any weight, for any software; an archive of it is smaller."
    if patterns == {"2:4"}:
        return (
            f"{zeros} As fast as before: CUDA GPUs since Ampere multiply 2:4 weights faster, once a runtime packs them "
            "(torch.sparse.to_sparse_semi_structured); not run here. CPUs gain nothing."
        )
    return f"{zeros} As fast as before: no common kernel makes use of such patterns."
