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


def labels(plan: Plan, format: str) -> list[str]:
    """Honest words on what the artefact is good for."""
    if format == "dense":
        return [_dense_label(plan)]
    return [*_packed_labels(plan, format), *_sparse_labels(plan, format)]


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
        if all(task.scheme is None for task in plan.assignment.tasks.values()):
            return [
                "Smaller on disk. Only llmcomp (`import llmcomp.hf`, `llmcomp.load`) opens it; `llmcomp export` writes "
                "what other readers can."
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
    patterns = {task.pruning.pattern.label for task in plan.assignment.tasks.values() if task.pruning is not None}
    if not patterns:
        return "As large and as fast as before: dense weights on the quantization grid, for any software."
    size = "Larger by the head, which shared the embeddings' storage" if plan.untied else "As large as before"
    zeros = f"{size}: zeros are stored like any weight, for any software; an archive of it is smaller."
    if patterns == {"2:4"}:
        return (
            f"{zeros} As fast as before: CUDA GPUs since Ampere multiply 2:4 weights faster, once a runtime packs them "
            "(torch.sparse.to_sparse_semi_structured); not run here. CPUs gain nothing."
        )
    return f"{zeros} As fast as before: no common kernel makes use of such patterns."
