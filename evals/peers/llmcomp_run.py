"""Quantize one checkpoint with llmcomp's own command line, in this process so that imports can be told apart.

What runs is what `llmcomp quantize MODEL …` runs, evaluation off as for every tool. The windows go in as
token ids, sentences as text. Verification is llmcomp's default and reported as its own row: the peers
do nothing like it.
"""

from __future__ import annotations

import importlib
import sys

import compressed_tensors  # noqa: F401 - imported before the mark, as the others' modules are
import datasets  # noqa: F401
import safetensors.torch  # noqa: F401
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401
from transformers.models.bert import modeling_bert  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

from evals.common import mark
from evals.peers.arguments import Job, parse, rows
from llmcomp.cli.main import main as llmcomp

importlib.import_module("llmcomp.api")  # loaded by the verb otherwise, after the mark


def command(job: Job) -> list[str]:
    """The words after `llmcomp` for a job; `gptq` is llmcomp's default and is left for it to choose."""
    group = "channel" if job.group_size is None else str(job.group_size)
    sentences = job.windows.with_suffix(".jsonl")  # what the windows were tokenized from, for classifiers
    calibration = sentences if job.task == "classification" else job.windows
    words = ["quantize", str(job.model), "--bits", str(job.bits), "--group-size", group]
    words += ["--calibration", str(calibration), "--samples", str(len(rows(job.windows)))]
    words += ["--output", str(job.output), "--no-evaluate"]
    if job.method != "gptq":
        words += ["--method", job.method]
    return [*words, *job.extra]


def main() -> int:
    """Checkpoint in, checkpoint out."""
    mark("IMPORTED")
    job = parse()
    torch.set_num_threads(job.threads)
    status = int(llmcomp(command(job)))
    if status == 0:
        mark("DONE")
    return status


if __name__ == "__main__":
    sys.exit(main())
