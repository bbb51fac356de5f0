"""The command line that every tool's script understands, so that the benchmark can call them alike."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

METHODS = ("gptq", "gptaq", "gptq-mse", "awq", "awq-gptq", "rtn", "rtn-mse", "signround", "gptq-signround", "auto")
# What llmcomp's `--update` does stands behind a method's name.
PRUNING = ("sparsegpt", "alps", "wanda", "magnitude", "sparsegpt-update", "alps-update")
# Methods of low rank: their own, and how llmcomp's command line asks for them.
FACTORS = {
    "svd": ("svd", "--no-update"), "asvd": ("asvd", "--no-update"), "svd-llm": ("svd-llm", "--no-update"),
    "svd-llm-update": ("svd-llm", "--update"), "svd-llm-balanced": ("svd-llm", "--update", "--ranks", "balanced"),
}  # fmt: skip
# Methods that prune: the words of llmcomp's command line.
CUTTING = {
    "cut": ("--method", "activation"), "cut-unfitted": ("--method", "activation", "--option", "compensate=false"),
    "cut-taylor": ("--method", "taylor"), "cut-magnitude": ("--method", "magnitude"),
}  # fmt: skip
# Removing and rounding: in one sweep; ALPS, then GPTQ on the same statistics; one tool after the other, the mask held.
TOGETHER = ("one-sweep", "alps-gptq", "two-steps")
TASKS = ("causal-lm", "classification")


@dataclass(frozen=True)
class Job:
    """One quantization: checkpoint in, windows in, checkpoint out."""

    model: Path
    windows: Path  # safetensors: input_ids [N, T] int64, and attention_mask [N, T] where rows are padded
    bits: int
    group_size: int | None  # None is one scale per output channel
    output: Path
    batch_size: int
    threads: int
    method: str
    task: str
    pattern: str | None  # of methods that remove weights: '2:4', or a share such as '0.5' wherever it lies
    ratio: float | None  # of methods that make factors: the share of bytes kept
    cut: str | None  # of methods that prune: what, as '--mlp 0.25'
    iterations: int  # of learned rounding; 0 leaves a tool its own
    extra: tuple[str, ...]  # words passed through to llmcomp's own command line


def group_size(text: str) -> int | None:
    """`channel` or a positive number, as typed on a command line."""
    if text == "channel":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"group size {text!r} is neither a positive number nor 'channel'")
    return int(text)


def parse(argv: list[str] | None = None) -> Job:
    """Read a job from the command line; argparse ends the process with status 2 on a bad one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--windows", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=group_size, default=128)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--method", choices=(*METHODS, *PRUNING, *FACTORS, *CUTTING, *TOGETHER), default="gptq")
    parser.add_argument("--task", choices=TASKS, default="causal-lm")
    parser.add_argument("--pattern", help="2:4, or a share")
    parser.add_argument("--ratio", type=float, help="share of bytes that factors keep")
    parser.add_argument("--cut", help="what is pruned, such as '--mlp 0.25'")
    parser.add_argument("--iterations", type=int, default=0, help="of learned rounding")
    parser.add_argument("--extra", action="append", default=[], help="one word for llmcomp, repeatable")
    return Job(**{**vars(args := parser.parse_args(argv)), "extra": tuple(args.extra)})


def rows(windows: Path) -> list[list[int]]:
    """The token rows of a windows file, padding taken off."""
    from safetensors.numpy import load_file

    tensors = load_file(windows)
    ids = tensors["input_ids"]
    mask = tensors.get("attention_mask")
    if mask is None:
        return [[int(token) for token in row] for row in ids]
    return [
        [int(t) for t, kept in zip(row, keep, strict=True) if kept]
        for row, keep in zip(ids, mask, strict=True)
    ]
