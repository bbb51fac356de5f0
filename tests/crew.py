"""Several ranks on this machine, forked from a warm server, as a launcher would start them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_WARM = ["torch", "transformers", "compressed_tensors", "safetensors.torch", "llmcomp.session"]


@dataclass(frozen=True)
class Ended:
    """How one rank ended. `sentences`: what it said why, each once."""

    status: int | None
    out: str
    err: str

    @property
    def sentences(self) -> list[str]:
        return [line.removeprefix("llmcomp: ") for line in self.err.splitlines() if line.startswith("llmcomp: ")]


def _rank(environment: dict[str, str], said: str, function: Callable[..., int], arguments: Sequence[Any]) -> None:
    import torch

    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{said}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    torch.set_num_threads(1)
    status = function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Crew:
    """Runs a function in `size` ranks; `scratch` is a directory for what they say."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_WARM)

    def run(
        self, function: Callable[..., int], *arguments: Sequence[Any], until: Callable[[], bool] | None = None,
        struck: Sequence[int] = (1,), by: signal.Signals = signal.SIGKILL, limit: float = 240,
    ) -> list[Ended]:
        """Run `function` once a rank, with that rank's `arguments`.

        Args:
            until: when it says so, the ranks `struck` get the signal `by`.
            limit: seconds; a rank that takes longer has hung.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children: list[BaseProcess] = []
        for rank, own in enumerate(arguments):
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(arguments)),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            child = self._context.Process(
                target=_rank, args=(environment, str(self._scratch / str(rank)), function, own)
            )
            child.start()
            children.append(child)
        deadline = time.monotonic() + limit
        if until is not None:
            while not until() and all(child.is_alive() for child in children) and time.monotonic() < deadline:
                time.sleep(0.005)
            for rank in struck:
                os.kill(children[rank].pid or 0, by)
        for child in children:
            child.join(timeout=max(0, deadline - time.monotonic()))
        hung = [rank for rank, child in enumerate(children) if child.exitcode is None]
        for child in children:
            child.kill()
        ended = [
            Ended(child.exitcode, *((self._scratch / f"{rank}.{name}").read_text() for name in ("out", "err")))
            for rank, child in enumerate(children)
        ]
        assert not hung, f"ranks {hung} hung: {ended}"
        return ended
