"""Measure a checkpoint, alone or against the one it was made from: size, sparsity, quality, divergence, cost.

    evaluate_model("bert-gptq-w4", against="bert").divergence.kl_mean.value

Both models are loaded as a user would load them and run side by side on the same inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from llmcomp import lora
from llmcomp.calibration.media import Media, read_media
from llmcomp.errors import BadCheckpoint, RunError
from llmcomp.matmul import WideProducts
from llmcomp.measure import cost, harness, load, quality
from llmcomp.measure.embeddings import read_head
from llmcomp.measure.forward import BYTES_AT_ONCE
from llmcomp.measure.inputs import (
    MEDIA,
    Inputs,
    default_texts,
    make_inputs,
    media_inputs,
    sentence_inputs,
)
from llmcomp.measure.machine import this_machine
from llmcomp.progress import Progress, Silent
from llmcomp.report.schema import Cost, Divergence, Measured, Quality, Report
from llmcomp.sentences import is_sentence_encoder
from llmcomp.shards import read_json_object

# Opens a checkpoint that memory does not hold: the model, and a walk through its parameters.
Streamer = Callable[[Path], tuple[nn.Module, Callable[[], Iterable[Tensor]]]]
_STREAMED_TOKENS = 8192  # of a batch: each batch reads the whole model again


@dataclass(frozen=True)
class Settings:
    """How much is measured. The defaults take a small model on two cores about a minute.

    Attributes:
        windows: of running text, evenly spaced; a sentence encoder reads eight paragraphs in place of each.
        sequence_length: tokens of a window, clipped to the model's positions.
        rows: of a table, evenly spaced.
        tokens_per_batch: rows × longest row of one forward.
        seed: which windows, which masked tokens, which bootstrap resamples.
        latency_batch, latency_sequence, latency_repeats: the timed forward.
        cost: measure latency and peak memory (a fresh process for each model).
        lm_eval: tasks of lm-eval (names, or paths to a task's YAML), run on each model as an extra.
    """

    windows: int = 64
    sequence_length: int = 512
    rows: int = 2000
    tokens_per_batch: int = 2048
    seed: int = 0
    latency_batch: int = 1
    latency_sequence: int = 128
    latency_repeats: int = 10
    cost: bool = True
    lm_eval: tuple[str, ...] = ()


@dataclass
class Evaluation:
    """What was measured; `before` and `divergence` are None without an original to compare with."""

    directory: str
    against: str | None
    task: str
    after: Measured
    before: Measured | None = None
    divergence: Divergence | None = None
    phases: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_report(self) -> Report:
        """The same as the report that tables, pages and `--json` show."""
        config = read_json_object(Path(self.directory) / "config.json")
        quantization = config.get("quantization_config") or {}
        machine = this_machine()
        return Report(
            command="evaluate",
            model=self.against or self.directory,
            source=self.against or self.directory,
            output=self.directory,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            machine=machine,
            architecture=str((config.get("architectures") or [""])[0]),
            task=self.task,
            recipe={},
            format=str(quantization.get("format") or quantization.get("quant_method") or "dense"),
            calibration={},
            size_before=self.before.size if self.before else None,
            size_after=self.after.size,
            before=self.before,
            after=self.after,
            divergence=self.divergence,
            phases=self.phases,
            notes=self.notes,
            llmcomp_version=machine.versions.get("llmcomp", ""),
        )


def evaluate_model(
    directory: str | Path,
    *,
    against: str | Path | None = None,
    data: Any | None = None,
    settings: Settings | None = None,
    task: str | None = None,
    role: Callable[[str], str] | None = None,
    progress: Progress | None = None,
    streamer: Streamer | None = None,
    allow_pickle: bool = False,
) -> Evaluation:
    """Measure the checkpoint in `directory`, side by side with the one in `against` where that is given.

    Args:
        directory, against: local directories (`llmcomp.hub.resolve` turns names into them).
        data: `llmcomp.calibration.data.Texts` to measure on; None takes `inputs.default_texts`.
        task: see `load.AUTO`; None reads it off config.json.
        role: tensor name → role, for `Size.parts`.
        progress: hears of the phases 'measure memory', 'evaluate', 'time' and 'lm-eval'.
        streamer: opens models that do not fit into memory; their cost is then not measured. Without one they
            are an error.
        allow_pickle: measure pytorch_model.bin where there are no safetensors.

    Raises:
        BadCheckpoint: a directory without a loadable model, or two that do not belong together.
        BadData: data that gives nothing to measure on.
        NumericalError: outputs that are not finite.
        RunError: the models do not fit into memory.
    """
    settings, progress = settings or Settings(), progress or Silent()
    task = task or load.task_of(directory)
    if settings.lm_eval:
        harness.require(task)
    paths = [Path(directory)] if against is None else [Path(against), Path(directory)]
    if len(paths) == 2 and (other := load.task_of(paths[0])) != load.task_of(directory):
        raise BadCheckpoint(
            f"{directory} is for {task} and {against} for {other}; compare models of one task."
        )
    measured = [Measured(cost.size_of(path, role, allow_pickle=allow_pickle), sparsity=0.0) for path in paths]
    result = Evaluation(str(directory), None if against is None else str(against), task, measured[-1])
    result.before = measured[0] if against is not None else None
    measuring = _Measuring(result, measured, paths, data, settings, progress)
    lacking = _lacking_memory(paths, allow_pickle)
    if lacking is None:
        measuring.loaded()
    elif streamer is None or any(map(lora.beside, paths)):  # an adapter is put on whole models only
        raise RunError(f"{lacking}; close other programs, use a larger machine, or skip this with --no-evaluate.")
    else:
        measuring.streamed(streamer)
        result.notes.append(f"{lacking}, so blocks were read as they were needed; no latency or memory was measured.")
    return result


@dataclass(frozen=True)
class _Measuring:
    """One evaluation under way: `measured` of each of `paths`, and `result`, are filled in."""

    result: Evaluation
    measured: list[Measured]
    paths: list[Path]
    data: Any | None
    settings: Settings
    progress: Progress

    def loaded(self) -> None:
        """Models held whole."""
        peaks: list[int] = []
        if self.settings.cost:
            with self._timed("memory"):
                peaks = _peaks(self.paths, self.result.task, self.settings, self.progress)
        with self._timed("evaluate"):
            models = [load.load(path, self.result.task) for path in self.paths]
            tokenizer = self._quality(models, self.settings)
        with self._timed("time"):
            if self.settings.cost:
                _cost(self.measured, models, peaks, self.settings, self.progress)
            for one, model, path in zip(self.measured, models, self.paths, strict=True):
                one.sparsity = cost.sparsity_of(cost.weights_of(model, path))
        if self.settings.lm_eval:
            with self._timed("lm-eval"):
                _lm_eval(self.measured, models, tokenizer, self.settings, self.progress)

    def streamed(self, streamer: Streamer) -> None:
        """Models of which memory holds a block at a time."""
        with self._timed("evaluate"):
            opened = [streamer(path) for path in self.paths]
            tokens = max(self.settings.tokens_per_batch, _STREAMED_TOKENS)
            self._quality([model for model, _ in opened], replace(self.settings, tokens_per_batch=tokens))
            for one, (_, parameters) in zip(self.measured, opened, strict=True):
                one.sparsity = cost.sparsity_of(parameters())
        if self.settings.lm_eval:
            self.result.notes.append("lm-eval's tasks were left out: they need the models in memory.")

    def _quality(self, models: list[nn.Module], settings: Settings) -> Any:
        """Quality and divergence; the tokenizer."""
        result, measured = self.result, self.measured
        if result.task in MEDIA:
            tokenizer, texts = None, self.data
            if not isinstance(texts, Media):
                texts = read_media("default", MEDIA[result.task])  # there is none, which it says
            inputs = media_inputs(texts, self.paths[0], models[0], result.task, settings)
        else:
            tokenizer = load.load_tokenizer(self.paths[0])
            texts = self.data if self.data is not None else default_texts(result.directory, self.progress)
            inputs = self._of_text(texts, tokenizer, models[0], settings)
        result.notes += [*texts.warnings, *inputs.notes]
        self.progress.phase("evaluate", sum(len(batch.input_ids) for batch in inputs.batches))
        with WideProducts():
            if len(models) == 1:
                measured[0].quality = quality.assess(models[0], inputs.batches, inputs.subject, self.progress)
            else:
                found = quality.compare(models[0], models[1], inputs.batches, inputs.subject, self.progress)
                measured[0].quality, measured[1].quality, result.divergence = found
        if measured[-1].quality is None and result.divergence is None:
            needed = "labels (--eval-data with --label-column)"
            if inputs.subject.sentences is not None:
                needed = "scored pairs (--text-column first,second --label-column score)"
            result.notes.append(
                f"No quality was measured: {result.task} needs {needed} or a model to compare with (--against)."
            )
        return tokenizer

    def _of_text(self, texts: Any, tokenizer: Any, model: nn.Module, settings: Settings) -> Inputs:
        if self.result.task == "encoder" and any(map(is_sentence_encoder, self.paths)):
            heads = tuple(read_head(path) for path in self.paths)
            return sentence_inputs(texts, tokenizer, model, heads, settings)
        return make_inputs(texts, tokenizer, model, self.result.task, settings)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.result.phases[phase] = time.perf_counter() - start


def _peaks(paths: Sequence[Path], task: str, settings: Settings, progress: Progress) -> list[int]:
    progress.phase("measure memory", len(paths))
    peaks = []
    for path in paths:
        sequence = settings.latency_sequence
        peaks.append(cost.peak_memory(path, task=task, batch=settings.latency_batch, sequence=sequence))
        progress.step()
    return peaks


def _cost(
    measured: list[Measured],
    models: list[nn.Module],
    peaks: list[int],
    settings: Settings,
    progress: Progress,
) -> None:
    progress.phase("time", len(models))
    batch, sequence = settings.latency_batch, settings.latency_sequence
    times = cost.latency(models, batch, sequence, settings.latency_repeats)
    for one, taken, peak in zip(measured, times, peaks, strict=True):
        threads = torch.get_num_threads()
        one.cost = Cost(taken.median, taken.low, taken.high, batch, sequence, peak, threads)
        progress.step()


def _lm_eval(
    measured: list[Measured], models: list[nn.Module], tokenizer: Any, settings: Settings, progress: Progress
) -> None:
    progress.phase("lm-eval", len(models))
    for one, model in zip(measured, models, strict=True):
        found = harness.run(model, tokenizer, settings.lm_eval, settings.seed)
        one.quality = one.quality or Quality({}, 0, 0, "lm-eval")
        one.quality.metrics.update(found)
        progress.step()


def _lacking_memory(paths: Sequence[Path], allow_pickle: bool) -> str | None:
    """All models are held whole and dense; where that cannot be, how much is lacking, as a clause."""
    needed = sum(cost.loaded_bytes(path, allow_pickle=allow_pickle) + 4 * BYTES_AT_ONCE for path in paths)
    available = psutil.virtual_memory().available
    if needed <= available:
        return None
    what = "The model" if len(paths) == 1 else "The two models together"
    return (
        f"{what} would need {needed / 1e9:.1f} GB of memory to be evaluated and {available / 1e9:.1f} GB are available"
    )
