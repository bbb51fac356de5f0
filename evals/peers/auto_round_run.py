"""Quantize one checkpoint with auto-round (0.16.1), in its own environment.

`signround` is AutoRound as it comes for this scheme (200 iterations over batches of 8 windows, rounding and ranges
tuned, its own learning rates), `--batch-size` windows a batch where it is more than 1; `rtn` is `iters=0`, its
calibrated rounding. Symmetric, linear layers of the blocks only, saved in its own format (`auto_round`), which
transformers opens with this package beside it. Left alone it computes in bf16 where the CPU has units for it.
"""

from __future__ import annotations

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama  # noqa: F401 - what from_pretrained would import later

from evals.common import mark
from evals.peers.arguments import Job, parse, rows

ITERATIONS = {"signround": 200, "rtn": 0}
BATCH = 8


def quantizer(job: Job, model: torch.nn.Module, tokenizer: object) -> AutoRound:
    """The tool, set up for a job."""
    ids = [torch.tensor([row]) for row in rows(job.windows)]
    return AutoRound(
        model,
        tokenizer,
        bits=job.bits,
        group_size=-1 if job.group_size is None else job.group_size,
        sym=True,
        iters=job.iterations or ITERATIONS[job.method],
        batch_size=job.batch_size if job.batch_size > 1 else BATCH,
        nsamples=len(ids),
        seqlen=max(one.shape[1] for one in ids),
        dataset=ids,
        device_map="cpu",
        enable_torch_compile=False,
    )


def main() -> None:
    """Checkpoint in, checkpoint out."""
    mark("IMPORTED")
    job = parse()
    if job.task != "causal-lm" or job.method not in ITERATIONS:
        raise SystemExit(f"auto-round does not run {job.method} on a {job.task} model here")
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    mark("LOADED")
    tool = quantizer(job, model, tokenizer)
    tool.quantize()
    mark("QUANTIZED")
    tool.save_quantized(str(job.output), format="auto_round")
    mark("DONE")


if __name__ == "__main__":
    main()
