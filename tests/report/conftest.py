"""A report as a real run writes it: 22 Llama blocks, two fallbacks, one module left, everything measured."""

from __future__ import annotations

import math
import random

import pytest

from llmcomp.report.schema import (
    Cost,
    Divergence,
    Interval,
    LayerReport,
    Left,
    Machine,
    Measured,
    Quality,
    Report,
    Size,
    Verification,
)

BLOCKS, WIDTH, INNER, HEADS_KV, VOCABULARY = 22, 2048, 5632, 256, 32000
HEAD = VOCABULARY * WIDTH * 2  # bytes
LINEARS = (
    ("self_attn.q_proj", "attention", WIDTH, WIDTH),
    ("self_attn.k_proj", "attention", HEADS_KV, WIDTH),
    ("self_attn.v_proj", "attention", HEADS_KV, WIDTH),
    ("self_attn.o_proj", "attention", WIDTH, WIDTH),
    ("mlp.gate_proj", "mlp", INNER, WIDTH),
    ("mlp.up_proj", "mlp", INNER, WIDTH),
    ("mlp.down_proj", "mlp", WIDTH, INNER),
)
FALLBACKS = {
    "model.layers.3.mlp.down_proj": "Gram matrix did not factor: clip-searched RTN",
    "model.layers.17.self_attn.k_proj": "Gram matrix did not factor: clip-searched RTN",
}


def make_report() -> Report:
    layers = [layer for block in range(BLOCKS) for layer in block_layers(block)]
    before, after = sizes(layers)
    return Report(
        command="quantize",
        model="tinyllama",
        source="TinyLlama/TinyLlama-1.1B-Chat-v1.0@fe8a4ea1ffedaf415f4da2f062534de366a451e6",
        output="tinyllama-gptq-w4",
        created="2026-11-21T10:41:07+00:00",
        machine=Machine(
            "AMD EPYC 9B14", 2, 25_769_803_776, "cpu", {"torch": "2.13.0", "transformers": "5.23.0"}
        ),
        architecture="LlamaForCausalLM",
        task="causal-lm",
        recipe={
            "steps": [{"kind": "quantize", "method": "gptq", "bits": 4, "targets": ["attention", "mlp"]}],
            "calibration": {"source": "default", "samples": 128, "sequence_length": 512},
            "seed": 0,
            "format": "compressed-tensors",
        },
        format="compressed-tensors (pack-quantized)",
        calibration={
            "description": "WikiText-2 train, 128 samples of 512 tokens (65,536 tokens)",
            "samples": 128,
            "tokens": 65_536,
            "warnings": ["14 of 2,461 rows were duplicates and are read once."],
        },
        layers=layers,
        left=[Left("lm_head", "not in the recipe's targets (attention, mlp)", HEAD)],
        size_before=before,
        size_after=after,
        before=measured(before, Interval(12.4312, 12.1, 12.78), Cost(0.812, 0.8, 0.83, 1, 128, 2_310_000_000, 2)),
        after=measured(after, Interval(12.9021, 12.55, 13.26), Cost(0.841, 0.83, 0.86, 1, 128, 2_290_000_000, 2)),
        divergence=Divergence(Interval(0.0381, 0.0369, 0.0394), 0.412, Interval(0.912, 0.908, 0.916), 65_408),
        verification=Verification(
            True,
            [
                "154 of 154 planned modules are compressed",
                "201 tensor names, shapes and dtypes equal the source's",
                "logits of 4 windows agree with the model in memory",
            ],
            0.0039,
            154,
        ),
        phases={"read": 1.2, "calibrate": 41.0, "solve": 88.4, "save": 3.1, "verify": 14.2, "evaluate": 61.3},
        peak_memory=1_310_000_000,
        labels=[
            "Smaller on disk; plain transformers decompresses it on load, so it is not faster there.",
            "vLLM runs this format with INT4 kernels on a GPU.",
        ],
        notes=["2 of 154 layers fell back to clip-searched RTN."],
        llmcomp_version="0.1.0",
    )


def sizes(layers: list[LayerReport]) -> tuple[Size, Size]:
    before = Size(1_100_048_384, 0, {"attention": 0, "mlp": 0, "embeddings": HEAD, "head": HEAD, "other": 185_000})
    after = Size(before.parameters, 0, dict(before.parts))
    for layer in layers:
        before.parts[layer.role] += layer.bytes_before
        after.parts[layer.role] += layer.bytes_after
    before.bytes_on_disk, after.bytes_on_disk = (sum(size.parts.values()) for size in (before, after))
    return before, after


def measured(size: Size, perplexity: Interval, cost: Cost) -> Measured:
    data = "books/validation.txt, windows of 512 tokens, stride 512"
    return Measured(size, 0.0, Quality({"perplexity": perplexity}, 128, 65_408, data), cost)


def block_layers(block: int) -> list[LayerReport]:
    layers = []
    for number, (suffix, role, rows, columns) in enumerate(LINEARS):
        name = f"model.layers.{block}.{suffix}"
        noise = random.Random(block * 7 + number).uniform(0.7, 1.4)
        error = noise * (0.004 if role == "attention" else 0.012) * math.exp(block / 16)
        fallback = FALLBACKS.get(name)
        layers.append(
            LayerReport(
                name=name,
                block=block,
                role=role,
                shape=(rows, columns),
                scheme="int4 g128",
                method="rtn-clip" if fallback else "gptq",
                bytes_before=rows * columns * 2,
                bytes_after=rows * columns // 2 + rows * columns // 128 * 2,
                error=error * (3.1 if fallback else 1.0),
                damping=None if fallback else 0.01,
                fallback=fallback,
                seconds=0.4,
                dead_columns=3 if number == 6 and block == 5 else 0,
            )
        )
    return layers


@pytest.fixture
def report() -> Report:
    return make_report()
