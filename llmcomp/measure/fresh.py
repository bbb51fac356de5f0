"""Run a module of ours in a process of its own and take the JSON object that it prints last.

What this process has imported, cached, freed or set (threads) would otherwise decide times and memory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcomp.errors import RunError, UserError

_POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def pools(threads: int) -> dict[str, str]:
    """Environment variables that give every pool of threads this size."""
    return dict.fromkeys(_POOLS, str(threads))


def ask(
    module: str,
    arguments: Sequence[str],
    what: str,
    *,
    python: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """`python -m module arguments`, offline and with this package on its path.

    Args:
        what: of the sentence on a failure, such as "Measuring the peak memory of model".
        python: another interpreter than this one.
        environment: set on top of this process's.

    Returns:
        The JSON object that the process printed as its last line.

    Raises:
        UserError: it ended with exit status 2; the message is its last line on stderr.
        RunError: it failed otherwise; the message ends with what it said, or the signal that ended it.
    """
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH", "")) if p)
    fixed = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(python or sys.executable), "-m", module, *arguments],
        capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
        env={**os.environ, **fixed, **(environment or {})},
    )  # fmt: skip
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()] or [_ended(done.returncode)]
        if done.returncode == UserError.exit_code:
            raise UserError(said[-1])
        raise RunError(f"{what} failed: {said[-1] if done.returncode > 0 else _ended(done.returncode)}")
    lines = done.stdout.strip().splitlines()
    if not lines:
        raise RunError(f"{what} failed: the process ended without a result.")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _ended(status: int) -> str:
    """
    >>> _ended(-9), _ended(3)
    ('ended by SIGKILL, as a process is that takes more memory than there is', 'exit status 3')
    """
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name
    short = ", as a process is that takes more memory than there is" if name == "SIGKILL" else ""
    return f"ended by {name}{short}"
