"""How fast a checkpoint runs and what it takes in memory, alone or beside another one.

Every figure comes from a fresh process (`llmcomp.measure.engines`), since threads, caches and memory that one
model leaves behind would be the next one's. Checkpoints take turns round by round, each second round in the
opposite order, so that what else the machine does falls on all; a ratio is of two runs of the same round, and its
interval resamples rounds. Weight files are read once before, so that all load from the page cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llmcomp.errors import BadData, LlmcompError
from llmcomp.measure.bench_process import Job, Sample
from llmcomp.measure.figures import Result, figures, ratios
from llmcomp.measure.fresh import ask, pools
from llmcomp.measure.load import task_of
from llmcomp.native import is_native, unwrap
from llmcomp.progress import Progress, Silent
from llmcomp.report.schema import Machine
from llmcomp.shards import read_json_object, read_shard, weight_files

WRITES = "causal-lm"
LENGTHS = {True: (128, 512), False: (128,)}  # tokens of prompts by default, and of an encoder's forwards
BATCHES = {True: (1,), False: (1, 32)}


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        threads: each is measured by itself; none are all cores.
        prompt_tokens: of prompts, or of an encoder's forwards; none are `LENGTHS`, as far as the model has positions.
        batch_sizes: rows of each; none are `BATCHES`.
        new_tokens: written after a prompt, batch by batch.
        compile: through torch.compile.
        rounds: fresh processes for each checkpoint and number of threads; repeats: of each thing in one of them.
    """

    threads: tuple[int, ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    new_tokens: int = 32
    compile: bool = False
    rounds: int = 3
    repeats: int = 3


@dataclass(frozen=True)
class Subject:
    """One that takes part.

    Attributes:
        name: in tables. job: what its process measures, but for the threads.
        module: that the process runs; python: its interpreter, this one by default.
    """

    name: str
    job: Job
    module: str = "llmcomp.measure.engines"
    python: Path | None = None


@dataclass(frozen=True)
class Benchmark:
    """Everything that was measured, and where.

    Attributes:
        model, against: the directories.
        shapes: (batch, tokens) of the prompts or forwards; new_tokens: 0 for models that write none.
        capability: instructions that torch takes. cache: bytes of the last-level cache.
        results: of `model`, with ratios to `against`, then of `against`, for each number of threads.
    """

    model: str
    against: str | None
    shapes: tuple[tuple[int, int], ...]
    new_tokens: int
    compiled: bool
    rounds: int
    machine: Machine
    capability: str
    cache: int
    results: tuple[Result, ...]

    def to_json(self) -> str:
        """As one JSON object."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def bench(
    directory: Path, *, against: Path | None = None, settings: Settings = Settings(), progress: Progress | None = None
) -> Benchmark:
    """Measure a checkpoint, side by side with `against` where that is given.

    Raises:
        BadData: prompts longer than a model's positions, or two models that do not do the same.
        UserError: as loading the checkpoint in the fresh process.
        RunError: that process failed.
    """
    directories = [directory, *([against] if against is not None else [])]
    writes = {one: task_of(one) == WRITES for one in directories}
    if len(set(writes.values())) > 1:
        raise BadData(
            f"{directory} and {against} cannot be compared: only one of them is a language model; give --against a "
            "checkpoint of the same architecture."
        )
    shapes = shapes_of(directories, settings, writes[directory])
    new_tokens = settings.new_tokens if writes[directory] else 0
    job = Job(str(directory), 1, shapes, new_tokens, settings.repeats, compile=settings.compile)
    names = (str(directory), f"{against} (against)" if against == directory else str(against))
    subjects = [Subject(name, replace(job, directory=str(one))) for name, one in zip(names, directories, strict=False)]
    read_into_cache(file for one in directories for file in _weights(one))
    samples: dict[tuple[str, int], list[Sample]] = {}
    threads = settings.threads or (cores(),)
    for subject, count, sample in take_turns(subjects, threads, settings.rounds, progress or Silent()):
        samples.setdefault((subject.name, count), []).append(sample)
    first = next(iter(samples.values()))[0]
    return Benchmark(
        str(directory), None if against is None else str(against), shapes, new_tokens, settings.compile,
        settings.rounds, first.machine, first.capability, first.cache, _results(subjects, threads, samples),
    )  # fmt: skip


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shapes_of(directories: Sequence[Path], settings: Settings, writes: bool) -> tuple[tuple[int, int], ...]:
    """(batch, tokens) of the prompts or forwards: what was asked for, else defaults that all models have positions for.

    Raises:
        BadData: a length that was asked for, with the new tokens, goes beyond a model's positions.
    """
    positions = min((n for n in map(_positions, directories) if n is not None), default=None)
    room = None if positions is None else positions - (settings.new_tokens if writes else 0)
    lengths = settings.prompt_tokens
    if room is not None and (room < 1 or any(length > room for length in lengths)):
        wanted = f"{max(lengths, default=1)} tokens" + (f" and {settings.new_tokens} new ones" if writes else "")
        raise BadData(
            f"{' and '.join(map(str, directories))}: {positions} positions hold no input of {wanted}; "
            "give fewer with --prompt-tokens" + (" or --new-tokens." if writes else ".")
        )
    if not lengths:
        fitting = [length for length in LENGTHS[writes] if room is None or length <= room]
        lengths = tuple(fitting) or (room or 1,)
    return tuple((batch, length) for batch in settings.batch_sizes or BATCHES[writes] for length in lengths)


def _positions(directory: Path) -> int | None:
    config = read_json_object(directory / "config.json")
    config = unwrap(config) if is_native(config) else config
    config = config.get("text_config", config)
    found = (config.get(name) for name in ("max_position_embeddings", "n_positions", "max_sequence_length"))
    return next((value for value in found if isinstance(value, int)), None)


def read_into_cache(files: Iterable[Path]) -> None:
    """Read files to their end, so that the first load is as warm as the others."""
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def _weights(directory: Path) -> list[Path]:
    """The weight files, whose headers are whole.

    Raises:
        BadCheckpoint: there are none, or one is truncated.
    """
    _, files = weight_files(directory, False)
    for file in files:
        read_shard(file)
    return files


def take_turns(
    subjects: Sequence[Subject],
    threads: Sequence[int],
    rounds: int,
    progress: Progress,
    refused: Callable[[Subject, LlmcompError], None] | None = None,
) -> Iterator[tuple[Subject, int, Sample]]:
    """Measure all subjects with each number of threads, once a round; yields each sample as it is taken.

    Args:
        refused: hears of a subject that cannot be measured, which then takes no further part; None raises instead.
    """
    left = list(subjects)
    for number in range(rounds):
        progress.phase(f"round {number + 1} of {rounds}", len(left) * len(threads))
        for count in threads:
            for subject in left if number % 2 == 0 else left[::-1]:
                if subject not in left:
                    continue
                try:
                    sample = measure(subject, count)
                except LlmcompError as error:
                    if refused is None:
                        raise
                    refused(subject, error)
                    left = [one for one in left if one != subject]
                    continue
                progress.step()
                yield subject, count, sample


def measure(subject: Subject, threads: int) -> Sample:
    """One sample of a subject, from a fresh process.

    Raises:
        UserError: the checkpoint cannot be loaded.
        RunError: the process failed otherwise.
    """
    job = json.dumps(asdict(replace(subject.job, threads=threads)))
    found = ask(
        subject.module, [job], f"Measuring {subject.name}", python=subject.python, environment=pools(threads)
    )
    return Sample.from_json(found)


def _results(
    subjects: Sequence[Subject], threads: Sequence[int], samples: dict[tuple[str, int], list[Sample]]
) -> tuple[Result, ...]:
    """For each number of threads the figures of all subjects; the first has ratios to the second, if there is one."""
    results = []
    for count in threads:
        found = [figures(samples[subject.name, count]) for subject in subjects]
        for number, (subject, own) in enumerate(zip(subjects, found, strict=True)):
            compared = ratios(own, found[1]) if number == 0 and len(found) > 1 else ()
            results.append(Result(subject.name, count, own, compared))
    return tuple(results)
