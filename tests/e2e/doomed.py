"""Processes that are killed at a chosen operation on the file system, forked from a warm server.

A run touches its partial directory and its output some hundred times: every opening, renaming, linking and
removing there is a moment at which SIGKILL may strike, numbered in their order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.chmod", "os.rmdir", "shutil.rmtree"}
_WARM = ["torch", "transformers", "compressed_tensors", "safetensors.torch", "llmcomp.session"]


def _run(arguments: list[str], watched: str, moment: int, counted: str) -> None:
    """`llmcomp ARGUMENTS`, killed at the moment-th operation on a path that holds `watched`; 0 never."""
    import torch

    from llmcomp.cli.main import main

    torch.set_num_threads(1)
    seen = 0

    def hook(event: str, operands: tuple[object, ...]) -> None:
        nonlocal seen
        if event in EVENTS and any(watched in str(operand) for operand in operands[:2]):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    status = main(arguments)
    Path(counted).write_text(str(seen))
    sys.exit(status)


class Doom:
    """Runs `llmcomp` in forked processes; `scratch` is a directory for their counts."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_WARM)

    def run(self, arguments: list[str], watched: str, moment: int = 0) -> int:
        """Run, killed at `moment` (0: never).

        Returns:
            The exit status; -9 after a kill.
        """
        count = str(self._scratch / "count")
        child = self._context.Process(target=_run, args=(arguments, watched, moment, count))
        child.start()
        child.join(timeout=240)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise TimeoutError(f"llmcomp {' '.join(arguments)} hung")
        return child.exitcode

    def moments(self) -> int:
        """How many operations the last run that ended by itself made."""
        return int((self._scratch / "count").read_text())
