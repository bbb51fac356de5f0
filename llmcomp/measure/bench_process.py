"""What one fresh process measures of one checkpoint, whatever computes it.

A process gets a `Job` as JSON and prints a `Sample` as JSON. What it measures is an `Engine`: a transformers model
(`llmcomp.measure.engines`, which is the module that runs), or another runtime's (evals/peers/), so that all figures
come from one loop. Nothing here imports transformers, which other runtimes need not have.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from llmcomp.errors import BadData, LlmcompError
from llmcomp.measure.bandwidth import last_level_cache, read_bandwidth
from llmcomp.measure.holding import Holding
from llmcomp.measure.machine import this_machine
from llmcomp.measure.resident import resident_now, resident_peak
from llmcomp.report.schema import Machine

PREFILL, DECODE, FORWARD = "prefill", "decode", "forward"


@dataclass(frozen=True)
class Job:
    """What one fresh process measures.

    Attributes:
        directory: the checkpoint; task: one of `llmcomp.measure.load.AUTO`, None as config.json says.
        threads: of torch and of every pool.
        shapes: (batch, tokens) of the prompts, or of the forwards where `new_tokens` is 0.
        new_tokens: written after the first prompt of each batch size.
        repeats: of each, after one that is not counted.
        compile: through torch.compile, for these shapes.
        imports: modules that loading will need, so that they count as imports.
        bandwidth: measure how fast this process reads memory, too.
    """

    directory: str
    threads: int
    shapes: tuple[tuple[int, int], ...]
    new_tokens: int
    repeats: int
    task: str | None = None
    compile: bool = False
    imports: tuple[str, ...] = ()
    bandwidth: bool = True


class Engine(Protocol):
    """A model after its first forward, which computes prompts.

    Attributes:
        load_seconds: of opening it, without the first forward; ready_seconds: with it.
    """

    load_seconds: float
    ready_seconds: float

    def prompt(self, batch: int, tokens: int) -> Any:
        """What `read` takes: tokens from a fixed seed."""

    def read(self, prompt: Any) -> None:
        """Compute a whole prompt afresh; of a language model, up to the choice of the first new token."""

    def holding(self) -> Holding | None:
        """Bytes of its tensors; None where the runtime does not show them."""


@runtime_checkable
class WritingEngine(Engine, Protocol):
    """A language model, which also writes tokens."""

    def step(self) -> None:
        """Write one more token after what was read."""


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat of one thing.

    Attributes:
        measure: PREFILL (a prompt, until its first new token is known), DECODE (all tokens after that one) or FORWARD.
        batch, tokens: rows, and tokens of each: of the prompt, or new ones.
    """

    measure: str
    batch: int
    tokens: int
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Sample:
    """One process.

    Attributes:
        load_seconds: of opening the checkpoint; ready_seconds: of that and the first forward (one token).
        timings: in the order they were taken.
        resident_loaded: resident bytes after the first forward over those after imports.
        resident: the same after all forwards. peak: the most between, over those after imports.
        holding: bytes of tensors, None where the runtime does not show them.
        bandwidth: bytes a second that this process reads from memory, None where it was not measured.
        compile_seconds: of the first call of each shape, where the job asked for torch.compile.
        cache: bytes of the last-level cache.
        capability: instructions that torch takes, such as 'AVX512'.
    """

    load_seconds: float
    ready_seconds: float
    timings: tuple[Timing, ...]
    resident_loaded: int
    resident: int
    peak: int
    holding: Holding | None
    bandwidth: float | None
    compile_seconds: float | None
    cache: int
    capability: str
    machine: Machine

    @staticmethod
    def from_json(found: dict[str, Any]) -> Sample:
        timings = tuple(Timing(**{**one, "seconds": tuple(one["seconds"])}) for one in found["timings"])
        held = None if found["holding"] is None else Holding(**found["holding"])
        return Sample(**{**found, "timings": timings, "holding": held, "machine": Machine(**found["machine"])})


def job_from_json(text: str) -> Job:
    """A `Job` as `json.dumps(asdict(job))` wrote it."""
    found = json.loads(text)
    shapes = tuple((int(batch), int(tokens)) for batch, tokens in found["shapes"])
    return Job(**{**found, "shapes": shapes, "imports": tuple(found["imports"])})


def sample(job: Job, open_engine: Callable[[Job], Engine], prepare_engine: Callable[[Job], None]) -> Sample:
    """Measure a job in this process, which should have done nothing else.

    Args:
        open_engine: loads the model and computes one forward.
        prepare_engine: imports what that needs, before memory is counted.

    Raises:
        LlmcompError: as `open_engine`.
    """
    torch.set_num_threads(job.threads)
    prepare_engine(job)
    gc.collect()
    imported = resident_now()
    engine = open_engine(job)
    gc.collect()
    loaded = resident_now() - imported
    compiling, timings = time_engine(engine, job)
    gc.collect()
    resident, peak = resident_now() - imported, resident_peak() - imported
    held, loading, ready = engine.holding(), engine.load_seconds, engine.ready_seconds
    del engine  # the buffer that is read next is large
    gc.collect()
    bandwidth = read_bandwidth() if job.bandwidth else None
    return Sample(
        loading, ready, timings, max(0, loaded), max(0, resident), max(0, peak), held, bandwidth,
        compiling if job.compile else None, last_level_cache(), torch.backends.cpu.get_cpu_capability(),
        this_machine(),
    )  # fmt: skip


def time_engine(engine: Engine, job: Job) -> tuple[float, tuple[Timing, ...]]:
    """Seconds of the calls that are not counted (which compile, where that is asked for), and those that are.

    Raises:
        BadData: the job asks for new tokens of an engine that writes none.
    """
    uncounted, timings = 0.0, []
    for batch, tokens in job.shapes:
        prompt = engine.prompt(batch, tokens)
        first, *seconds = [_seconds(partial(engine.read, prompt)) for _ in range(job.repeats + 1)]
        uncounted += first
        timings.append(Timing(PREFILL if job.new_tokens else FORWARD, batch, tokens, tuple(seconds)))
    if job.new_tokens:
        if not isinstance(engine, WritingEngine):
            raise BadData(f"{job.directory} writes no tokens, and {job.new_tokens} were asked for; ask for none.")
        for batch, tokens in first_of_each_batch(job.shapes):
            prompt = engine.prompt(batch, tokens)
            engine.read(prompt)
            uncounted += _seconds(engine.step)
            seconds = [_writing(engine, prompt, job.new_tokens) for _ in range(job.repeats)]
            timings.append(Timing(DECODE, batch, job.new_tokens, tuple(seconds)))
    return uncounted, tuple(timings)


def first_of_each_batch(shapes: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """The prompt after which tokens are written, for each batch size.

    >>> first_of_each_batch(((1, 128), (1, 512), (4, 128)))
    [(1, 128), (4, 128)]
    """
    found: dict[int, int] = {}
    for batch, tokens in shapes:
        found.setdefault(batch, tokens)
    return list(found.items())


def serve(
    text: str, open_engine: Callable[[Job], Engine], prepare_engine: Callable[[Job], None]
) -> tuple[str, int]:
    """What the process of an engine has to say for a job as JSON, and its exit status: the `Sample` as JSON, or the
    sentence of an error for stderr."""
    try:
        return json.dumps(asdict(sample(job_from_json(text), open_engine, prepare_engine))), 0
    except LlmcompError as error:
        return str(error), error.exit_code


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _writing(engine: WritingEngine, prompt: Any, tokens: int) -> float:
    """Seconds of `tokens` new tokens after the first, the prompt's own time left out."""
    engine.read(prompt)
    start = time.perf_counter()
    for _ in range(tokens):
        engine.step()
    return time.perf_counter() - start
