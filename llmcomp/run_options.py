"""How a run is to be done, and what comes back from it: what `llmcomp.api` takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmcomp.report.schema import Report

ACTIVATION_MEMORY = 8 * 2**20


@dataclass(frozen=True)
class CompressResult:
    """Where the checkpoint lies and everything that is known of it."""

    output: Path
    report: Report


@dataclass(frozen=True)
class ExportResult:
    """Where the export lies, and sentences on what is in it."""

    output: Path
    notes: list[str]


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what to do: none of it changes a bit of the result, but for the device, whose products
    are summed in another order.

    Attributes:
        output: default `./<model>-<method>-w<bits>`.
        overwrite: replace an existing checkpoint there.
        evaluate: measure the model before and after.
        verify: reload the checkpoint in a fresh process and compare.
        device: where to compress: 'auto' (a CUDA GPU where there is one for each process, else the CPU), 'cpu',
            'cuda' or 'cuda:1'. Verification and evaluation are the CPU's.
        activation_memory: bytes of waiting activations, on the device or not, beyond which they go to mapped files.
        eval_data, text_column, label_column: a labelled or plain file to measure on.
        trust_remote_code, allow_pickle: load what is refused otherwise.
        revision: of a Hub model.
    """

    output: Path | None = None
    overwrite: bool = False
    evaluate: bool = True
    verify: bool = True
    device: str = "auto"
    activation_memory: int = ACTIVATION_MEMORY
    eval_data: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    revision: str | None = None
