"""Quantize one checkpoint with llmcompressor (0.14.0.1), in its own environment.

`gptq` is GPTQModifier as it comes (static activation order, damping 0.01, min-max scales); `gptq-mse` sets
the weight observer to `mse`, the tool's own clip search, which is its best GPTQ on every text measured;
`rtn-mse` is that observer without GPTQ; `awq` and `awq-gptq` put AWQModifier with `duo_scaling: both`, its most
thorough search, before `rtn-mse` and `gptq-mse`. Symmetric, linear layers of the blocks only. `sparsegpt` and `wanda`
are its modifiers as they come, with the pattern. `two-steps` is `sparsegpt` and then `gptq-mse`, each with a
calibration of its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier, gptq_quantize
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.bert import modeling_bert  # noqa: F401 - what from_pretrained would import later
from transformers.models.llama import modeling_llama  # noqa: F401

from evals.common import mark
from evals.peers.arguments import Job, parse, rows

# llmcompressor matches by name or pattern; everything outside the blocks stays as it is.
OUTSIDE_BLOCKS = ["lm_head", "classifier", "re:.*pooler.*"]
INSIDE_BLOCKS = [r"re:.*_proj$", r"re:.*encoder\.layer\..*(query|key|value|dense)$"]  # of Llama, of BERT


def recipe(job: Job) -> list[Modifier]:
    """The modifiers for a job, in order."""
    if job.method == "two-steps":
        return [*recipe(replace(job, method="sparsegpt")), *recipe(replace(job, method="gptq-mse", pattern=None))]
    if job.pattern is not None:
        kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[job.method]
        counts = job.pattern.split(":") if ":" in job.pattern else None
        share = 1 - int(counts[0]) / int(counts[1]) if counts else float(job.pattern)
        # These modifiers do not leave a head out by its name in `ignore`: the model was far worse (77.6 for 58.6).
        return [kind(sparsity=share, mask_structure=job.pattern if counts else "0:0", targets=INSIDE_BLOCKS)]
    scaled = job.method.startswith("awq")
    method = {"awq": "rtn-mse", "awq-gptq": "gptq-mse"}.get(job.method, job.method)
    method, _, observer = method.partition("-")
    weights = QuantizationArgs(
        num_bits=job.bits,
        type="int",
        symmetric=True,
        strategy="channel" if job.group_size is None else "group",
        group_size=job.group_size,
        observer="mse" if observer else "memoryless_minmax",
    )
    groups = {"linears": QuantizationScheme(targets=["Linear"], weights=weights)}
    kind = GPTQModifier if method == "gptq" else QuantizationModifier
    found = kind(config_groups=groups, ignore=OUTSIDE_BLOCKS)
    return [AWQModifier(duo_scaling="both"), found] if scaled else [found]


def pin_only_where_there_is_an_accelerator() -> None:
    """AWQModifier of 0.14.0.1 pins what it caches in any case, which torch refuses on a machine with only a CPU."""
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda self, batch_index: None


def hold_zeros() -> None:
    """GPTQModifier of 0.14.0.1 no longer keeps at zero what an earlier modifier has removed, as releases before it did,
    so what it leaves is no 2:4. Here a removed weight is set to zero in its turn, and that error made up for, too."""
    ordering, rounded = gptq_quantize.apply_activation_ordering, gptq_quantize.fake_quantize
    removed: list[torch.Tensor] = []  # of the weights that are being swept [batch, rows, columns], in their order

    def remember(weights: torch.Tensor, *others: object) -> tuple:
        found = ordering(weights, *others)
        removed[:] = (found[0] == 0).unbind(-1)
        return found

    def round_column(column: torch.Tensor, *others: object) -> torch.Tensor:
        return rounded(column, *others).masked_fill(removed.pop(0).transpose(0, 1), 0)

    gptq_quantize.apply_activation_ordering = remember
    gptq_quantize.fake_quantize = round_column


def main() -> None:
    """Checkpoint in, checkpoint out."""
    mark("IMPORTED")
    job = parse()
    pin_only_where_there_is_an_accelerator()
    if job.method == "two-steps":
        hold_zeros()
    torch.set_num_threads(job.threads)
    auto = AutoModelForCausalLM if job.task == "causal-lm" else AutoModelForSequenceClassification
    model = auto.from_pretrained(job.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    ids = rows(job.windows)
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    mark("LOADED")
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe(job),
        dataset=data,
        batch_size=job.batch_size,
        num_calibration_samples=len(ids),
        max_seq_length=max(len(row) for row in ids),
        # Same windows in the same order for every tool; GPTQ's sums do not depend on it beyond rounding.
        shuffle_calibration_samples=False,
    )
    mark("QUANTIZED")
    model.save_pretrained(job.output, save_compressed=True)
    tokenizer.save_pretrained(job.output)
    mark("DONE")


if __name__ == "__main__":
    main()
