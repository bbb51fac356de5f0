"""Where a run computes: a CUDA GPU, one for each process, or the CPU.

The device is a choice of the run, not of its recipe. Weights come to it where a block is made resident
(`pipeline.residency`), windows where lanes start (`calibration.capture`), what has waited in files where its lane
goes on (`calibration.parking`); statistics and solutions are made where their inputs are. Whoever writes a file takes
tensors from wherever they lie (`formats.save`, `formats.witness`, `pipeline.scaling`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmcomp.errors import UserError

CPU = torch.device("cpu")


def choose(name: str, size: int = 1, environment: Mapping[str, str] = os.environ) -> torch.device:
    """The device of this process.

    Args:
        name: 'auto' (a GPU where there is one for each process of this host, else the CPU), 'cpu', 'cuda' (each
            process takes the GPU of its LOCAL_RANK) or 'cuda:1'.
        size: how many processes share the run. environment: what the launcher has set.

    Raises:
        UserError: no such name, no such GPU, or one GPU for several processes.
    """
    found = re.fullmatch(r"auto|cpu|cuda(:(?P<number>\d+))?", name)
    if found is None:
        raise UserError(f"--device {name!r} is none of auto, cpu, cuda and cuda:N, where N counts GPUs from 0.")
    gpus = 0 if name == "cpu" else _visible()
    here = int(environment.get("LOCAL_WORLD_SIZE", size)) if size > 1 else 1
    if name == "cpu" or (name == "auto" and gpus < here):
        return CPU
    if not gpus:
        raise UserError(
            f"--device {name} was asked for, but torch {torch.__version__} sees no CUDA GPU here; install a torch with "
            "CUDA and its driver, or leave --device out to compute on the CPU."
        )
    if found["number"] is not None and size > 1:
        raise UserError(f"--device {name} is one GPU for {size} processes; give cuda, and each takes its own.")
    number = int(found["number"] or (environment.get("LOCAL_RANK", 0) if size > 1 else 0))
    if number >= gpus:
        raise UserError(
            f"--device {name} means GPU {number} here, but torch sees {gpus} (counted from 0); start at most one "
            "process for each GPU of a host, or give --device cpu."
        )
    return torch.device("cuda", number)


def describe(device: torch.device) -> str:
    """What a report says of it, and what an unfinished run goes on with: 'cpu', or 'cuda (NVIDIA H100 80GB HBM3)'.

    Which of like GPUs it was makes no difference.
    """
    return device.type if device.type == "cpu" else f"{device.type} ({torch.cuda.get_device_name(device)})"


@contextlib.contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Make it the current device, with float32 that means float32, while it lasts.

    A GPU's units for TF32 round the factors of a float32 product to ten bits of mantissa: of a Gram matrix that is
    noise in all it is asked for, and small pivots vanish in it. torch leaves them out of products unless the caller's
    program has turned them on (torch.set_float32_matmul_precision), but takes them for convolutions, through which
    images and sound reach the blocks. They are process-wide, hence scoped.
    """
    if device.type == "cpu":
        yield
        return
    backends: Any = torch.backends
    operations = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    before = [one.fp32_precision for one in operations]
    rounded = [(one, was) for one, was in zip(operations, before, strict=True) if was != "ieee"]
    try:
        for one, _ in rounded:
            one.fp32_precision = "ieee"
        with torch.cuda.device(device):
            yield
    finally:
        for one, was in rounded:
            one.fp32_precision = was


@contextlib.contextmanager
def repeatable_attention(device: torch.device) -> Iterator[None]:
    """While it lasts, a GPU computes attention by plain products: the backward passes of its fused kernels add up in
    whatever order their threads come, and a run that is started again would not end with the same bits."""
    if device.type == "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def forget_peak(device: torch.device) -> None:
    """Count the most bytes that tensors take on a device from here on."""
    if device.type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most since; 0 for the CPU, whose memory `pipeline.memory.PeakMemory` tells."""
    return 0 if device.type == "cpu" else torch.cuda.max_memory_allocated(device)


def _visible() -> int:
    """GPUs that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
