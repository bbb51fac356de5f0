"""Compress one checkpoint with llmcomp's own command line, in this process so that imports can be told apart.

What runs is what `llmcomp quantize MODEL …` (or `sparsify`) runs, evaluation off as for every tool. The windows go in
as token ids, sentences as text. Verification is llmcomp's default and reported as its own row: the peers
do nothing like it. llmcomp imports inside its verbs, so all that they would import is imported here before
the IMPORTED mark, as the other tools' modules are.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import llmcomp
from evals.common import mark
from evals.peers.arguments import CUTTING, FACTORS, TOGETHER, Job, parse, rows

LATE = ("compressed_tensors.quantization", "datasets", "matplotlib.figure", "rich.console", "rich.table")
LATE += ("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto")
LATE += ("transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama")
# What our names for a method are called on its command line; its default is left for it to choose.
METHOD_WORDS = {
    "gptq": [], "gptaq": ["--method", "gptaq"], "awq": ["--method", "awq"], "awq-gptq": ["--method", "awq-gptq"],
    "rtn": ["--method", "rtn"],
    "rtn-mse": ["--method", "rtn-clip"], "auto": ["--method", "auto"], "signround": ["--method", "signround"],
    "gptq-signround": ["--method", "gptq-signround"],
}  # fmt: skip


def import_everything() -> None:
    """Every module of llmcomp, and what its functions import when they are called."""
    for module in pkgutil.walk_packages(llmcomp.__path__, "llmcomp."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in LATE:
        importlib.import_module(name)


def command(job: Job) -> list[str]:
    """The words after `llmcomp` for a job."""
    known: dict[str, Any] = METHOD_WORDS if job.ratio is None else FACTORS
    if job.pattern is None and job.method not in (known if job.cut is None else CUTTING):
        raise SystemExit(f"llmcomp has no method {job.method}; expected one of {', '.join(METHOD_WORDS)}")
    group = "channel" if job.group_size is None else str(job.group_size)
    sentences = job.windows.with_suffix(".jsonl")  # what the windows were tokenized from, for classifiers
    calibration = sentences if job.task == "classification" else job.windows
    if job.cut is not None:
        words = ["prune", str(job.model), *job.cut.split(), *CUTTING[job.method]]
    elif job.ratio is not None:
        own, *how = FACTORS[job.method]
        # The product of the factors computes the same, and plain transformers opens it.
        words = ["factorize", str(job.model), "--ratio", str(job.ratio), "--method", own, *how, "--format", "dense"]
    elif job.pattern is None:
        words = ["quantize", str(job.model), "--bits", str(job.bits), "--group-size", group, *METHOD_WORDS[job.method]]
    else:
        share = [] if ":" in job.pattern else ["--sparsity", job.pattern]
        pattern = "unstructured" if share else job.pattern
        own, _, update = job.method.partition("-")
        words = ["sparsify", str(job.model), "--pattern", pattern, *share, "--method", own]
        words += ["--update"] if update else []
    words += ["--calibration", str(calibration), "--samples", str(len(rows(job.windows)))]
    words += ["--output", str(job.output), "--no-evaluate"]
    if job.iterations:
        words += ["--option", f"iterations={job.iterations}"]
    if "signround" in job.method and job.batch_size > 1:
        words += ["--option", f"batch_size={job.batch_size}"]
    return [*words, *job.extra]


def together(job: Job, folder: Path) -> list[list[str]]:
    """The words after `llmcomp`, one command after the other, where weights are removed and what is left is rounded.

    Of two steps the second is given the sparse checkpoint; the weights of least size in it are those that the first has
    removed, so `magnitude` says the mask that GPTQ holds.

    Args:
        folder: for the recipe and for what lies between two steps.
    """
    removing = {"one-sweep": "sparsegpt", "alps-gptq": "alps", "two-steps": "magnitude"}[job.method]
    steps = [
        {"kind": "sparsify", "method": removing, "pattern": job.pattern},
        {"kind": "quantize", "method": "gptq", "bits": job.bits, "group_size": job.group_size or "channel"},
    ]
    windows = rows(job.windows)
    calibration = {"source": str(job.windows), "samples": len(windows), "sequence_length": len(windows[0])}
    recipe = folder / "recipe.yaml"  # JSON is YAML
    recipe.write_text(json.dumps({"steps": steps, "calibration": calibration, "format": "compressed-tensors"}))
    sparse = folder / "sparse"
    model, first = job.model, list[list[str]]()
    if job.method == "two-steps":
        model, first = sparse, [command(replace(job, method="sparsegpt", output=sparse))]
    last = ["compress", str(model), "--recipe", str(recipe), "--output", str(job.output), "--no-evaluate", *job.extra]
    return [*first, last]


def main() -> int:
    """Checkpoint in, checkpoint out."""
    import_everything()
    from llmcomp.cli.main import main as llmcomp_command

    mark("IMPORTED")
    job = parse()
    torch.set_num_threads(job.threads)
    with tempfile.TemporaryDirectory() as folder:
        for words in together(job, Path(folder)) if job.method in TOGETHER else [command(job)]:
            if status := llmcomp_command(words):
                return status
    mark("DONE")
    return 0


if __name__ == "__main__":
    sys.exit(main())
