"""One recovery, from a compressed checkpoint to a better one of the same form: open, train, put together, verify,
measure, publish. As a run of a recipe (`llmcomp.session`), nothing appears under the output's name before the last.

    .<output>.partial/
        journal.jsonl      whose run this is
        training/          states that a killed run goes on from
        blocks/, checkpoint/, witness/     as `formats.save` has them
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcomp import hub, lora
from llmcomp.calibration.data import Texts, describe, read_texts
from llmcomp.calibration.data import fingerprint as data_fingerprint
from llmcomp.devices import choose
from llmcomp.devices import describe as describe_device
from llmcomp.errors import BadCheckpoint, LlmcompError
from llmcomp.formats import witness
from llmcomp.formats.save import ShardWriter, partial_of, preflight, publish, writing
from llmcomp.formats.verify import verify
from llmcomp.formats.witness import dtype_name
from llmcomp.matmul import WideProducts
from llmcomp.measure.cost import size_of
from llmcomp.measure.inputs import default_against, evaluation_data, original_model
from llmcomp.measure.load import load, load_tokenizer, task_of
from llmcomp.measure.machine import this_machine
from llmcomp.measure.run import Settings, evaluate_model
from llmcomp.pipeline.journal import Journal, fingerprint
from llmcomp.pipeline.memory import PeakMemory
from llmcomp.pipeline.streaming import open_streamed
from llmcomp.progress import Progress, Silent
from llmcomp.ranks import ALONE, World
from llmcomp.report.html import FILE_NAME as PAGE_NAME
from llmcomp.report.html import render
from llmcomp.report.schema import FILE_NAME, Recovery, Report
from llmcomp.report.summary import won_back
from llmcomp.session import default_output
from llmcomp.training.data import Samples, collator, samples_of
from llmcomp.training.settings import FULL, LORA, Plan
from llmcomp.training.subject import Subject, open_subject
from llmcomp.training.trainer import Teacher, Trained, frozen, objective_of, train

if TYPE_CHECKING:
    from llmcomp.api import RunOptions

_RATES = {FULL: 5e-5, LORA: 2e-4}  # the highest rate, where none is given
_WITNESSES, _WITNESS_TOKENS = 4, 64
_PEFT_TASKS = {"causal-lm": "CAUSAL_LM"}
_BESIDE_LABEL = (
    "The adapter stays beside the packed weights: `llmcomp.load` puts it on, as does peft (docs/recovery.md). Other "
    "readers of the weights do not see it."
)


class Recovering:
    """The run of a plan on a compressed checkpoint.

    Args:
        model: the name that the user gave; path: the directory.
        world: the ranks that train together; the first one alone writes, verifies, measures and reports.
    """

    def __init__(
        self, model: str, path: Path, plan: Plan, options: RunOptions, progress: Progress, world: World = ALONE
    ) -> None:
        self.model, self.path, self.plan, self.options, self.world = model, path, plan, options, world
        self.progress = progress if world.first else Silent()
        self.device = choose(options.device, world.size)
        self.output = Path(options.output or default_output(model, "recovered"))
        self.partial = partial_of(self.output)
        self.phases: dict[str, float] = {}
        self.notes: list[str] = []

    def run(self) -> tuple[Path, Report]:
        """Do it all.

        Raises:
            UserError, RunError: see `llmcomp.recover`.
        """
        with self._timed("prepare"):
            subject = open_subject(self.path)
            subject.require(self.plan.method)
            targets = subject.targets(self.plan.lora) if self.plan.method == LORA else []
            task = task_of(self.path)
            tokenizer = load_tokenizer(self.path)
            if self.world.first:
                preflight(self.path, self.output, self.options.overwrite, self._room(subject))
            evaluation = self._evaluation_data(task)
            texts = self._texts(subject)
            samples = samples_of(
                texts, tokenizer, subject.model, task, length=self.plan.sequence_length, count=self.plan.samples,
                seed=self.plan.optimization.seed, taught=self.plan.teaching.teacher is not None,
            )  # fmt: skip
            teacher = self._teacher(subject, task, tokenizer)
            described = describe(texts, samples.windows, tokenizer, task)
            self._note(f"Training on {described}.")
            for warning in texts.warnings:
                self._note(warning)
        with PeakMemory() as memory:
            trained, wrapped = self._train(subject, targets, samples, tokenizer, task, teacher)
            self.world.part()
            if not self.world.first:
                return self.output, Report.from_json(self.world.conclude(None).decode())
            with self._timed("save"):
                checkpoint = self._assemble(subject, samples, wrapped)
        report = self._report(subject, trained, task, described, memory.peak)
        if self.options.verify:
            with self._timed("verify"):
                self.progress.phase("verify")
                report.verification = verify(checkpoint, self.partial / "witness")
        if self.options.evaluate:
            self._measure(report, checkpoint, evaluation)
        report.size_after = size_of(checkpoint, subject.role)
        report.phases, report.notes = self.phases, self.notes
        with writing(checkpoint):
            (checkpoint / FILE_NAME).write_text(report.to_json(), encoding="utf-8")
            (checkpoint / PAGE_NAME).write_text(render(report), encoding="utf-8")
        publish(self.partial, self.output, self.options.overwrite)
        self.world.conclude(report.to_json().encode())
        return self.output, report

    def _room(self, subject: Subject) -> int:
        """Bytes of the output, and of the states on the way: three of weights and two moments in float32."""
        weights = sum(value.numel() for value in subject.model.parameters()) if self.plan.method == FULL else 0
        return 2 * subject.checkpoint.nbytes + 3 * 3 * 4 * weights

    # --- what goes in ---

    def _texts(self, subject: Subject) -> Texts:
        name, original = self.plan.data, original_model(self.path)
        if name == "default" and original.startswith("sample:"):
            name = original
        return read_texts(
            name, text_column=self.options.text_column, label_column=self.options.label_column, progress=self.progress
        )

    def _evaluation_data(self, task: str) -> Any:
        if not self.options.evaluate or not self.world.first:
            return None
        original = original_model(self.path)
        source = self.options.eval_data or (original if original.startswith("sample:") else "default")
        return evaluation_data(
            task, source, text_column=self.options.text_column, label_column=self.options.label_column,
            progress=self.progress,
        )  # fmt: skip

    def _teacher(self, subject: Subject, task: str, tokenizer: Any) -> Teacher | None:
        """The teacher, if one is asked for, and if it speaks of the same things.

        Raises:
            BadCheckpoint: another task, vocabulary or other labels.
        """
        name = self.plan.teaching.teacher
        if name is None:
            return None
        path = hub.resolve(name, progress=self.progress).path
        if (other := task_of(path)) != task:
            raise BadCheckpoint(f"The teacher {name} is for {other} and {self.model} for {task}; give one for {task}.")
        model: Any = load(path, task)
        own, its = subject.model.config, model.config
        if task == "sequence-classification" and dict(own.id2label) != dict(its.id2label):
            raise BadCheckpoint(
                f"The teacher {name} has the labels {', '.join(map(str, its.id2label.values()))} and {self.model} has "
                f"{', '.join(map(str, own.id2label.values()))}; give one that was trained for the same."
            )
        if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
            raise BadCheckpoint(
                f"The teacher {name} has another vocabulary than {self.model}, so its logits are of other tokens; give "
                "one with the same tokenizer."
            )
        return frozen(model.to(self.device))

    # --- the work ---

    def _train(
        self, subject: Subject, targets: list[str], samples: Samples, tokenizer: Any, task: str, teacher: Teacher | None
    ) -> tuple[Trained, Any]:
        """What the training was, and peft's model around the subject's where there is an adapter."""
        plan = self.plan
        parts = [repr(replace(plan, optimization=replace(plan.optimization, save_every=None))), version("llmcomp"),
                 subject.checkpoint.fingerprint(), data_fingerprint(samples.windows), str(self.world.size),
                 repr(None if samples.labels is None else samples.labels.tolist())]  # fmt: skip
        if self.device.type != "cpu":
            parts.append(describe_device(self.device))
        journal = Journal(self.partial, fingerprint(*parts), self.world)
        if journal.discarded:
            self._note("An unfinished run of other settings, data or another checkpoint was discarded.")
        if not (plan.method == LORA and subject.beside):
            subject.widen()
        torch.manual_seed(plan.optimization.seed)
        model, wrapped = subject.model, None
        if plan.method == LORA:
            wrapped = model = lora.wrap(
                model, targets, rank=plan.lora.rank, alpha=plan.lora.scale,
                dropout=plan.lora.dropout, task=_PEFT_TASKS.get(task), masks=subject.masks,
            )  # fmt: skip
        else:
            model.requires_grad_(True)
        config = subject.model.config
        regression = task == "sequence-classification" and config.num_labels == 1
        objective = objective_of(
            plan.teaching, teacher, regression=regression,
            labelled=task != "sequence-classification" or samples.labels is not None,
        )  # fmt: skip
        with self._timed("train"):
            trained = train(
                model, samples, collator(task, tokenizer, regression), objective, plan.optimization,
                self.partial / "training", self.progress, learning_rate=_RATES[plan.method],
                masks=subject.parameters_under_masks() if plan.method == FULL else None, device=self.device.type,
            )  # fmt: skip
        if trained.resumed:
            self._note(f"Resumed at step {trained.resumed} of an unfinished run.")
        return trained, wrapped

    def _assemble(self, subject: Subject, samples: Samples, wrapped: Any) -> Path:
        """The future output in the partial directory, all but the report, and the witness."""
        subject.model.to("cpu").eval()
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
        inputs = {"input_ids": _first_tokens(samples.windows)}
        evidence = self.partial / "witness"
        shutil.rmtree(evidence, ignore_errors=True)
        adapter = {} if wrapped is None else lora.factors(wrapped)
        with torch.inference_mode(), WideProducts():
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
        )

    # --- what comes out ---

    def _report(self, subject: Subject, trained: Trained, task: str, data: str, peak: int) -> Report:
        before, plan = subject.report, self.plan
        beside = plan.method == LORA and subject.beside
        kept = "All weights" if plan.method == FULL else f"LoRA of rank {plan.lora.rank}"
        under = " under the mask" if subject.masks else ""
        kept += ", kept beside the packed weights" if beside else f", merged{under}" if plan.method == LORA else under
        original = default_against(self.path)
        return Report(
            command="recover",
            model=self.model,
            source=str(self.path),
            output=str(self.output),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            machine=this_machine(describe_device(self.device)),
            architecture=before.architecture,
            task=task,
            recipe=plan.flags() | self._columns(),
            format=before.format,
            calibration={},
            layers=[replace(layer, error=None, seconds=0.0, block_error=None, block_error_start=None)
                    for layer in before.layers],
            left=before.left,
            size_before=size_of(self.path, subject.role),
            peak_memory=peak,
            labels=[*before.labels, *([_BESIDE_LABEL] if beside else [])],
            recovery=Recovery(
                method=plan.method, kept=kept, model=original_model(self.path), source=original, data=data,
                teacher=plan.teaching.teacher, parameters=trained.parameters, steps=trained.steps,
                resumed=trained.resumed, history=trained.history,
            ),
            llmcomp_version=version("llmcomp"),
        )  # fmt: skip

    def _columns(self) -> dict[str, Any]:
        named = ("eval_data", "text_column", "label_column")
        return {name: value for name in named if (value := getattr(self.options, name)) is not None}

    def _measure(self, report: Report, checkpoint: Path, texts: Any) -> None:
        """Original, compressed and recovered, with the same code on the same data."""
        found = report.recovery
        assert found is not None
        with self._timed("evaluate"):
            try:
                original = None if found.source is None else hub.resolve(found.source).path
                if original is None:
                    both = self._evaluate(checkpoint, self.path, texts, cost=True)
                    report.before, report.after = both.before, both.after
                    self._note("The model that was compressed is not there any more, so nothing is compared with it.")
                else:
                    old = self._evaluate(self.path, original, texts, cost=False)
                    new = self._evaluate(checkpoint, original, texts, cost=False)
                    report.before, report.after, report.divergence = old.after, new.after, new.divergence
                    found.original, found.divergence = old.before, old.divergence
                    both = new
            except LlmcompError as error:
                self._note(f"Not evaluated: {error}")
                return
        found.won_back = won_back(report)
        for note in both.notes:
            self._note(note)

    def _evaluate(self, directory: Path, against: Path, texts: Any, *, cost: bool) -> Any:
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


def _first_tokens(windows: Any) -> Tensor:
    """Of the longest windows, as one rectangle [windows, tokens]."""
    longest = sorted(windows, key=len, reverse=True)[:_WITNESSES]
    length = min(_WITNESS_TOKENS, *(len(window) for window in longest), _WITNESS_TOKENS)
    return torch.stack([window[:length] for window in longest])


def _copy_weights(subject: Subject, blocks: Path) -> None:
    """The files of the packed weights, byte for byte."""
    for path in sorted({place.path for place in subject.opened.tensors.values()}):
        shutil.copyfile(path, blocks / path.name)
