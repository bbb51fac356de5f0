"""Models of transformers that can be timed: `python -m llmcomp.measure.engines JOB` measures one (`bench_process`).

A language model reads a prompt and then writes token by token, keeping its keys and values; anything else computes
whole forwards. The loop is ours and not `generate`, whose bookkeeping is the same for all and no part of a model.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from llmcomp.feeds import around
from llmcomp.measure.bench_process import Engine, Job, serve
from llmcomp.measure.cost import random_tokens
from llmcomp.measure.holding import Holding, holding
from llmcomp.measure.load import load, prepare


def open_transformers(job: Job) -> Engine:
    """A checkpoint as `llmcomp.measure.load.load` opens it.

    Raises:
        BadCheckpoint: as `load`.
    """
    model, *seconds = _timed_load(job)
    if not job.new_tokens:
        return Forwards(model, *seconds, compiled=job.compile)
    room = max(tokens for _, tokens in job.shapes) + job.new_tokens + 1
    return Writer(model, *seconds, room=room if job.compile else None)


def _timed_load(job: Job) -> tuple[Any, float, float]:
    """The model, which has computed one token; the seconds until that token's forward began, and until it ended."""
    began: list[float] = []

    def note(module: nn.Module, inputs: Any) -> None:
        if not began:
            began.append(time.perf_counter())

    start = time.perf_counter()
    hook = register_module_forward_pre_hook(note)
    try:
        model = load(job.directory, job.task)
    finally:
        hook.remove()
    ended = time.perf_counter()
    return model, (began[0] if began else ended) - start, ended - start


class Forwards:
    """Whole forwards of an encoder, classifier, encoder-decoder …"""

    def __init__(self, model: Any, load_seconds: float, ready_seconds: float, *, compiled: bool) -> None:
        self.model, self.load_seconds, self.ready_seconds = model, load_seconds, ready_seconds
        self.call = torch.compile(model, dynamic=False) if compiled else model

    def prompt(self, batch: int, tokens: int) -> dict[str, Tensor]:
        return around(self.model, random_tokens(self.model, batch, tokens))

    @torch.inference_mode()
    def read(self, prompt: dict[str, Tensor]) -> None:
        self.call(**prompt)

    def holding(self) -> Holding:
        return holding(self.model)


class Writer:
    """A language model that takes the most probable token each time.

    Args:
        room: tokens of a cache of fixed size, compiled with the model; None computes eagerly, with a cache that grows.
    """

    def __init__(self, model: Any, load_seconds: float, ready_seconds: float, *, room: int | None) -> None:
        self.model, self.load_seconds, self.ready_seconds, self.room = model, load_seconds, ready_seconds, room
        self.call = model if room is None else torch.compile(model, dynamic=False)
        # Logits of the last position alone, as in `generate`: the head's product is a part of a prompt's time.
        takes = inspect.signature(model.forward).parameters
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.cache: Any = None
        self.newest: Tensor = torch.empty(0)  # [batch, 1], the token chosen last

    def prompt(self, batch: int, tokens: int) -> Tensor:
        return random_tokens(self.model, batch, tokens)

    def read(self, prompt: Tensor) -> None:
        self.cache = self._fresh_cache()
        self._forward(prompt)

    def step(self) -> None:
        self._forward(self.newest)

    def holding(self) -> Holding:
        return holding(self.model)

    def _fresh_cache(self) -> Any:
        if self.room is None:
            return None
        from transformers import StaticCache

        return StaticCache(config=self.model.config, max_cache_len=self.room)

    @torch.inference_mode()
    def _forward(self, ids: Tensor) -> None:
        out = self.call(input_ids=ids, past_key_values=self.cache, use_cache=True, **self.last)
        self.cache = out.past_key_values
        self.newest = out.logits[:, -1:].argmax(-1)


def prepare_transformers(job: Job) -> None:
    """Import what transformers will need to open the job's checkpoint."""
    for name in (*job.imports, *(("torch._dynamo", "torch._inductor.compile_fx") if job.compile else ())):
        importlib.import_module(name)
    prepare(job.directory, job.task)


def _main() -> int:
    said, status = serve(sys.argv[1], open_transformers, prepare_transformers)
    print(said, file=sys.stderr if status else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(_main())
