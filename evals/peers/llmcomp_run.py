"""Compress one checkpoint with llmcomp's own command line, in this process so that imports can be told apart.

What runs is what `llmcomp quantize MODEL …` (or `sparsify`) runs, evaluation off as for every tool. The windows go in
as token ids, sentences as text. Verification is llmcomp's default and reported as its own row: the peers
do nothing like it. llmcomp imports inside its verbs, so all that they would import is imported here before
the IMPORTED mark, as the other tools' modules are.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any

import torch

import llmcomp
from evals.common import mark
from evals.peers.arguments import CUTTING, FACTORS, Job, parse, rows

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


def main() -> int:
    """Checkpoint in, checkpoint out."""
    import_everything()
    from llmcomp.cli.main import main as llmcomp_command

    mark("IMPORTED")
    job = parse()
    torch.set_num_threads(job.threads)
    status = llmcomp_command(command(job))
    if status == 0:
        mark("DONE")
    return status


if __name__ == "__main__":
    sys.exit(main())
