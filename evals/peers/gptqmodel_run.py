"""Quantize one checkpoint with gptqmodel (7.6.0), in its own environment.

`gptq` is its QuantizeConfig as it comes (group-aware activation order, true-sequential, damping 0.05);
`gptq-mse` sets `mse=2.4`, its own clip search (the exponent that its test-suite uses, and llmcompressor's).
`rtn` is its RTNConfig, without calibration, for times of what it makes. Per channel the group-aware order has no
groups to respect and must be off, which the tool otherwise refuses. Symmetric, linear layers of the blocks only.
GPTQMODEL_CPU_WORKERS is set by the runner to the thread count (two at least).
"""

from __future__ import annotations

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import RTNConfig
from transformers import AutoConfig
from transformers.models.llama import modeling_llama  # noqa: F401 - what loading would import later

from evals.common import mark
from evals.peers.arguments import Job, parse, rows

MSE_NORM = 2.4


def config(job: Job) -> QuantizeConfig | RTNConfig:
    """The tool's configuration of a job."""
    if job.method == "rtn":
        return RTNConfig(bits=job.bits, group_size=job.group_size or -1, sym=True)
    options: dict = {"bits": job.bits, "group_size": job.group_size or -1, "sym": True}
    if job.group_size is None:
        options["act_group_aware"] = False
    if job.method == "gptq-mse":
        options["mse"] = MSE_NORM
    return QuantizeConfig(**options)


def main() -> None:
    """Checkpoint in, checkpoint out."""
    mark("IMPORTED")
    job = parse()
    if job.task != "causal-lm" or not job.method.startswith(("gptq", "rtn")):
        raise SystemExit(f"gptqmodel does not run {job.method} on a {job.task} model here")
    torch.set_num_threads(job.threads)
    # Left alone it rounds every model to bf16 on a CPU before it begins, which the others do not.
    dtype = AutoConfig.from_pretrained(job.model).dtype
    model = GPTQModel.load(str(job.model), config(job), device="cpu", dtype=dtype)
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows(job.windows)]
    mark("LOADED")
    model.quantize(None if job.method == "rtn" else data, batch_size=job.batch_size)
    mark("QUANTIZED")
    model.save(str(job.output))
    mark("DONE")


if __name__ == "__main__":
    main()
