"""One recovery, from a compressed checkpoint to a better one of the same form; how it runs: `llmcomp.training_run`."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llmcomp import hub, lora
from llmcomp.devices import describe as describe_device
from llmcomp.errors import LlmcompError
from llmcomp.measure.cost import size_of
from llmcomp.measure.inputs import default_against, original_model
from llmcomp.measure.machine import this_machine
from llmcomp.progress import Progress
from llmcomp.ranks import ALONE, World
from llmcomp.report.schema import Recovery, Report
from llmcomp.report.summary import won_back
from llmcomp.run_options import RunOptions
from llmcomp.session import default_output
from llmcomp.training.data import Samples, collator
from llmcomp.training.settings import FULL, LORA, QAT, Plan
from llmcomp.training.subject import Subject, open_subject
from llmcomp.training.trainer import Teacher, Trained, train
from llmcomp.training_run import TrainingRun, regresses, without_saving

_RATES = {FULL: 5e-5, LORA: 2e-4, QAT: 1e-4}  # the highest rate, where none is given
_PEFT_TASKS = {"causal-lm": "CAUSAL_LM"}
_BESIDE_LABEL = (
    "The adapter stays beside the packed weights: `llmcomp.load` puts it on, as does peft (docs/methods/recovery.md). "
    "Other readers of the weights do not see it."
)


class Recovering(TrainingRun):
    """The run of a plan on a compressed checkpoint.

    Args:
        model: the name that the user gave; path: the directory.
        world: the ranks that train together; the first one alone writes, verifies, measures and reports.
    """

    def __init__(
        self, model: str, path: Path, plan: Plan, options: RunOptions, progress: Progress, world: World = ALONE
    ) -> None:
        output = Path(options.output or default_output(model, "recovered"))
        super().__init__(
            model, path, plan, options, progress, original=original_model(path), output=output, world=world
        )
        self.plan = plan

    def _open(self) -> Subject:
        subject = open_subject(self.path)
        subject.require(self.plan.method)
        self.targets = subject.targets(self.plan.lora) if self.plan.method == LORA else []
        return subject

    def _room(self, subject: Subject) -> int:
        """With the states on the way: three of weights and two moments in float32."""
        weights = sum(value.numel() for value in subject.model.parameters()) if self.plan.method != LORA else 0
        return 2 * subject.checkpoint.nbytes + 3 * 3 * 4 * weights

    def _train(
        self, subject: Subject, samples: Samples, reader: Any, task: str, teacher: Teacher | None
    ) -> Trained:
        plan = self.plan
        self._own_partial(subject, samples, replace(plan, optimization=without_saving(plan.optimization)))
        if plan.method == QAT:
            self._put_on_grids(subject)
        if not (plan.method == LORA and subject.beside):
            subject.widen()
        torch.manual_seed(plan.optimization.seed)
        model = subject.model
        if plan.method == LORA:
            self.wrapped = model = lora.wrap(
                model, self.targets, rank=plan.lora.rank, alpha=plan.lora.scale,
                dropout=plan.lora.dropout, task=_PEFT_TASKS.get(task), masks=subject.masks,
            )  # fmt: skip
        else:
            model.requires_grad_(True)
        objective = self._objective(subject, samples, task, teacher)
        with self._timed("train"):
            trained = train(
                model, samples, collator(task, reader, regresses(subject, task)), objective, plan.optimization,
                self.partial / "training", self.progress, learning_rate=_RATES[plan.method],
                masks=None if plan.method == LORA else subject.parameters_under_masks(), device=self.device.type,
            )  # fmt: skip
        if trained.resumed:
            self._note(f"Resumed at step {trained.resumed} of an unfinished run.")
        return trained

    def _report(self, subject: Subject, trained: Trained, task: str, data: str, peak: int) -> Report:
        before, plan = subject.report, self.plan
        beside = plan.method == LORA and subject.beside
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
            calibration={key: said for key, said in before.calibration.items() if key != "warnings"},
            layers=[replace(layer, error=None, seconds=0.0, block_error=None, block_error_start=None)
                    for layer in before.layers],
            left=before.left,
            removed=before.removed,
            size_before=size_of(self.path, subject.role),
            peak_memory=peak,
            labels=[*before.labels, *([_BESIDE_LABEL] if beside else [])],
            recovery=Recovery(
                method=plan.method, kept=self._kept(subject), model=original_model(self.path), source=original,
                data=data, teacher=plan.teaching.teacher, parameters=trained.parameters, steps=trained.steps,
                resumed=trained.resumed, history=trained.history,
            ),
            llmcomp_version=version("llmcomp"),
        )  # fmt: skip

    def _put_on_grids(self, subject: Subject) -> None:
        source = default_against(self.path)
        found = subject.put_on_grids(None if source is None else hub.resolve(source).path, self.plan.learn_scales)
        if not found:
            self._note("The dense model's weights are not there, so training starts from the integers alone.")

    def _kept(self, subject: Subject) -> str:
        """In words what became of what was trained."""
        plan, under = self.plan, " under the mask" if subject.masks else ""
        if plan.method == QAT:
            scales = "with scales that were trained, too" if plan.learn_scales else "on the grid that it had"
            return f"All weights{under}, integers {scales}"
        if plan.method == FULL:
            return f"All weights{under}"
        kept = "kept beside the packed weights" if subject.beside else f"merged{under}"
        return f"LoRA of rank {plan.lora.rank}, {kept}"

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
