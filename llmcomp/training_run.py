"""What every run that trains does around its training: open, read, teach, put together, verify, measure, publish. As a
run of a recipe (`llmcomp.session`), nothing appears under the output's name before the last.

    .<output>.partial/
        journal.jsonl      whose run this is
        training/          states that a killed run goes on from
        blocks/, checkpoint/, witness/     as `formats.save` has them
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from llmcomp import hub, lora
from llmcomp.calibration.data import Texts
from llmcomp.calibration.media import Media
from llmcomp.devices import choose
from llmcomp.devices import describe as describe_device
from llmcomp.digests import digests
from llmcomp.errors import BadCheckpoint
from llmcomp.feeds import in_dtype
from llmcomp.formats import witness
from llmcomp.formats.save import ShardWriter, partial_of, preflight, publish, writing
from llmcomp.formats.verify import verify
from llmcomp.formats.witness import dtype_name
from llmcomp.matmul import WideProducts
from llmcomp.measure.cost import size_of
from llmcomp.measure.inputs import MEDIA, evaluation_data
from llmcomp.measure.load import load, task_of
from llmcomp.measure.run import Settings, evaluate_model
from llmcomp.packed import decoding
from llmcomp.pipeline.journal import Journal, fingerprint
from llmcomp.pipeline.memory import PeakMemory
from llmcomp.pipeline.streaming import open_streamed
from llmcomp.progress import Progress, Silent
from llmcomp.provenance import origin_of
from llmcomp.ranks import ALONE, World
from llmcomp.report.html import FILE_NAME as PAGE_NAME
from llmcomp.report.html import render
from llmcomp.report.schema import FILE_NAME, Report
from llmcomp.run_options import RunOptions
from llmcomp.training import reading, sharding
from llmcomp.training.data import CLASSIFIERS, IMAGES, Samples
from llmcomp.training.distill_plan import DistillPlan
from llmcomp.training.images import require_taken
from llmcomp.training.pruning_plan import PruningPlan
from llmcomp.training.reading import Learning
from llmcomp.training.settings import Optimization
from llmcomp.training.subject import Subject
from llmcomp.training.trainer import Objective, Teacher, frozen, objective_of


class TrainingRun(ABC):
    """The run of a plan on a checkpoint; what is trained, and what is said of it, is the subclass's.

    Args:
        model: the name that the user gave; path: the directory.
        original: the model whose sample text is the default, where it is a sample.
        output: the directory to be made.
        world: the ranks that train together; the first one alone writes, verifies, measures and reports.

    Attributes:
        wrapped: peft's model around the subject's, where there is an adapter.
    """

    def __init__(
        self, model: str, path: Path, plan: Learning, options: RunOptions, progress: Progress, *,
        original: str, output: Path, world: World = ALONE,
    ) -> None:  # fmt: skip
        self.model, self.path, self.learning, self.options, self.world = model, path, plan, options, world
        self.original, self.output, self.partial = original, output, partial_of(output)
        self.progress = progress if world.first else Silent()
        self.device = choose(options.device, world.size)
        sharding.asked()  # refused before anything is loaded
        self.wrapped: Any = None
        self.phases: dict[str, float] = {}
        self.notes: list[str] = []

    def run(self) -> tuple[Path, Report]:
        """Do it all.

        Raises:
            UserError, RunError: see `llmcomp.recover`.
        """
        with self._timed("prepare"):
            task = task_of(self.path)
            reading.require_trained(task, self.learning, self.options.text_column)
            subject = self._open()
            reader = reading.reader_of(self._reads(), subject.model, task)
            if self.world.first:
                preflight(self.path, self.output, self.options.overwrite, self._room(subject))
            evaluation = self._evaluation_data(task)
            data = self._data(task)
            samples, described = reading.made(data, reader, subject.model, task, self.learning, self.progress)
            self.samples = samples
            teacher = self._teacher(subject, task, reader)
            self._note(f"Training on {described}.")
            for warning in data.warnings:
                self._note(warning)
        with PeakMemory() as memory:
            trained = self._train(subject, samples, reader, task, teacher)
            self.world.part()
            if not self.world.first:
                return self.output, Report.from_json(self.world.conclude(None).decode())
            with self._timed("save"):
                checkpoint = self._assemble(subject, samples)
        report = self._report(subject, trained, task, described, memory.peak)
        if self.options.verify:
            with self._timed("verify"):
                self.progress.phase("verify")
                report.verification = verify(checkpoint, self.partial / "witness")
        if self.options.evaluate:
            self._measure(report, checkpoint, evaluation)
        report.size_after = size_of(checkpoint, subject.role)
        report.phases, report.notes = self.phases, self.notes
        report.origin, report.files = origin_of(self._origin()), digests(checkpoint)
        with writing(checkpoint):
            (checkpoint / FILE_NAME).write_text(report.to_json(), encoding="utf-8")
            (checkpoint / PAGE_NAME).write_text(render(report), encoding="utf-8")
            for name, text in self._beside().items():
                (checkpoint / name).write_text(text, encoding="utf-8")
        publish(self.partial, self.output, self.options.overwrite)
        self.world.conclude(report.to_json().encode())
        return self.output, report

    def _origin(self) -> Path:
        """The directory of what is published as the source, with its licence and commit."""
        return self.path

    # --- what a subclass does ---

    @abstractmethod
    def _open(self) -> Subject:
        """What is trained; refuses what cannot be."""

    @abstractmethod
    def _room(self, subject: Subject) -> int:
        """Bytes of the output, and of the states on the way."""

    @abstractmethod
    def _train(self, subject: Subject, samples: Samples, reader: Any, task: str, teacher: Teacher | None) -> Any:
        """What the training was; `wrapped` is set where there is an adapter. The reader is of `training.reading`."""

    @abstractmethod
    def _report(self, subject: Subject, trained: Any, task: str, data: str, peak: int) -> Report:
        """All but what is measured and verified."""

    @abstractmethod
    def _measure(self, report: Report, checkpoint: Path, texts: Any) -> None:
        """Write into the report what quality and cost are, or a note why not."""

    def _beside(self) -> dict[str, str]:
        """Further files of the output, by name."""
        return {}

    # --- what goes in ---

    def _reads(self) -> Path:
        """The directory that says how data is read."""
        return self.path

    def _data(self, task: str) -> Texts | Media:
        name = self.learning.data
        if name == "default" and self.original.startswith("sample:"):
            name = self.original
        return reading.read(
            name, task, text_column=self.options.text_column, label_column=self.options.label_column,
            gaps=self.learning.teaching.teacher is not None, progress=self.progress,
        )  # fmt: skip

    def _evaluation_data(self, task: str) -> Any:
        options = self.options
        if not options.evaluate or not self.world.first or (task in MEDIA and options.eval_data is None):
            return None  # of images there are none but those that are given, which is said where they are measured
        source = self.options.eval_data or (self.original if self.original.startswith("sample:") else "default")
        return evaluation_data(
            task, source, text_column=self.options.text_column, label_column=self.options.label_column,
            progress=self.progress,
        )  # fmt: skip

    def _teacher(self, subject: Subject, task: str, reader: Any) -> Teacher | None:
        """The teacher, if one is asked for, and if it speaks of the same things.

        Raises:
            BadCheckpoint: another task, vocabulary, processor or other labels.
        """
        name = self.learning.teaching.teacher
        return None if name is None else frozen(self._teacher_model(name, subject, task, reader))

    def _teacher_model(self, name: str, subject: Subject, task: str, reader: Any) -> Any:
        """A teacher on the device; raises as `_teacher`."""
        path = hub.resolve(name, progress=self.progress).path
        if (other := task_of(path)) != task:
            raise BadCheckpoint(f"The teacher {name} is for {other} and {self.model} for {task}; give one for {task}.")
        model: Any = load(path, task)
        own, its = subject.model.config, model.config
        if task in CLASSIFIERS and dict(own.id2label) != dict(its.id2label):
            raise BadCheckpoint(
                f"The teacher {name} has the labels {', '.join(map(str, its.id2label.values()))} and {self.model} has "
                f"{', '.join(map(str, own.id2label.values()))}; give one that was trained for the same."
            )
        same = reading.alike(reading.reader_of(path, model, task), reader, task)
        if task == IMAGES:
            if not same:
                raise BadCheckpoint(
                    f"The teacher {name} reads images otherwise than {self.model} (preprocessor_config.json); give one "
                    "with the same processor."
                )
            require_taken(self.samples.first(), model, f"The teacher {name}")
        elif not same:
            self._of_other_tokens(name, task)
        return model.to(self.device)

    def _of_other_tokens(self, name: str, task: str) -> None:
        """What is done with a teacher of another vocabulary; raises as `_teacher`."""
        raise BadCheckpoint(
            f"The teacher {name} has another vocabulary than {self.model}, so its logits are of other tokens; give "
            "one with the same tokenizer."
        )

    # --- the work ---

    def _own_partial(self, subject: Subject, samples: Samples, plan: Any) -> None:
        """Go on in the partial directory of an earlier run of the same plan, checkpoint and data, or clear it.

        Args:
            plan: in which `save_every` says nothing, since it changes no bit.
        """
        parts = [repr(plan), version("llmcomp"), self._identity(subject), samples.fingerprint(),
                 str(self.world.size), repr(None if samples.labels is None else samples.labels.tolist())]  # fmt: skip
        if self.device.type != "cpu":
            parts.append(describe_device(self.device))
        if Journal(self.partial, fingerprint(*parts), self.world).discarded:
            self._note("An unfinished run of other settings, data or another checkpoint was discarded.")

    def _identity(self, subject: Subject) -> str:
        """What is trained: another one is another run."""
        return subject.checkpoint.fingerprint()

    def _objective(self, subject: Subject, samples: Samples, task: str, teacher: Teacher | None) -> Objective:
        return objective_of(
            self.learning.teaching, teacher, regression=regresses(subject, task),
            labelled=task not in CLASSIFIERS or samples.labels is not None,
        )  # fmt: skip

    def _assemble(self, subject: Subject, samples: Samples) -> Path:
        """The future output in the partial directory, all but the report, and the witness."""
        subject.model.to("cpu").eval()
        wrapped = self.wrapped
        beside = wrapped is not None and subject.beside
        if wrapped is not None and not beside:
            wrapped.merge_and_unload()
        if not beside:
            subject.narrow()
        writer, source = ShardWriter(self.partial), subject.checkpoint
        self._witness(subject, samples, wrapped if beside else None)
        if beside:
            order = writer.adopt(lambda blocks: _copy_weights(subject, blocks))
        else:
            files = subject.stored()
            order = [writer.write(path.stem, tensors).name for path, tensors in sorted(files.items())]
        kept = [file for file in source.copied_files() if file.name not in (FILE_NAME, PAGE_NAME)]
        checkpoint = writer.finish(order, source.config, kept, root=source.path)
        if beside:
            lora.save(wrapped, checkpoint / lora.FOLDER)
        return checkpoint

    def _witness(self, subject: Subject, samples: Samples, wrapped: Any) -> None:
        inputs = in_dtype(subject.model, samples.first())
        evidence = self.partial / "witness"
        shutil.rmtree(evidence, ignore_errors=True)
        adapter = {} if wrapped is None else lora.factors(wrapped)
        with torch.inference_mode(), WideProducts(), decoding(subject.model):
            output = witness.model_output((wrapped or subject.model)(**inputs)).clone()
        dense = subject.dense()
        witness.record(evidence, "whole", dense)
        witness.save(
            evidence,
            compressed={name: kind.label for name, kind in subject.opened.kinds.items()},
            source={name: (tuple(value.shape), dtype_name(value.dtype)) for name, value in dense.items()},
            inputs=inputs,
            output=output,
            adapter=adapter,
            pruned=self._pruned(subject),
        )

    def _pruned(self, subject: Subject) -> Mapping[str, witness.Pruned]:
        """What the fresh process is to count, where zeros are what was made."""
        return {}

    # --- what comes out ---

    def _columns(self) -> dict[str, Any]:
        named = ("eval_data", "text_column", "label_column")
        return {name: value for name in named if (value := getattr(self.options, name)) is not None}

    def _evaluate(self, directory: Path, against: Path | None, texts: Any, *, cost: bool) -> Any:
        return evaluate_model(
            directory, against=against, data=texts, settings=Settings(cost=cost), progress=self.progress,
            streamer=open_streamed,
        )  # fmt: skip

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.progress.note(text)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = perf_counter()
        try:
            yield
        finally:
            self.phases[phase] = self.phases.get(phase, 0.0) + perf_counter() - began


def options_of(plan: DistillPlan | PruningPlan) -> RunOptions:
    """How to run, of a plan that says that, too."""
    return RunOptions(
        output=None if plan.output is None else Path(plan.output), overwrite=plan.overwrite, evaluate=plan.evaluate,
        verify=plan.verify, device=plan.device, eval_data=plan.eval_data, text_column=plan.text_column,
        label_column=plan.label_column,
    )  # fmt: skip


def regresses(subject: Subject, task: str) -> bool:
    """Whether labels are numbers, not classes."""
    return task in CLASSIFIERS and subject.model.config.num_labels == 1


def without_saving(optimization: Optimization) -> Optimization:
    """The same training, however often its states are saved and whoever hears of it; where gradients are compressed,
    what is kept of them between steps is dropped with each state, so that says something."""
    saved = optimization.save_every if optimization.powersgd is not None else None
    return replace(optimization, save_every=saved, track=None)


def _copy_weights(subject: Subject, blocks: Path) -> None:
    """The files of the packed weights, byte for byte."""
    for path in sorted({place.path for place in subject.opened.tensors.values()}):
        shutil.copyfile(path, blocks / path.name)
