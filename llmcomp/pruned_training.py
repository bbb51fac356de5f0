"""One training that removes weights on its way, from a dense checkpoint to a sparse one that is stored dense.

`llmcomp.training_run` is how it runs, `llmcomp.training.pruning` what is removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcomp.adapters.base import LinearRef
from llmcomp.building import write_yaml
from llmcomp.checkpoint import Checkpoint
from llmcomp.devices import describe as describe_device
from llmcomp.errors import BadRecipe, LlmcompError
from llmcomp.experts import split_experts
from llmcomp.formats.opening import open_checkpoint
from llmcomp.formats.witness import Pruned
from llmcomp.loading import load_opened
from llmcomp.measure.cost import size_of
from llmcomp.measure.machine import this_machine
from llmcomp.patterns import UNSTRUCTURED, Pattern, check_mask
from llmcomp.pipeline.job import Source, open_source, plan_recipe
from llmcomp.pipeline.labels import labels
from llmcomp.progress import Progress
from llmcomp.ranks import ALONE, World
from llmcomp.recipe import Recipe
from llmcomp.report.schema import LayerReport, Pruning, Report
from llmcomp.report.summary import PLAN_NAME
from llmcomp.session import default_output, left_alone
from llmcomp.training.data import Samples, collator
from llmcomp.training.pruner import Pruner, Softly, draw_tickets
from llmcomp.training.pruning import fold, put_masks, under_masks
from llmcomp.training.pruning_plan import GRADUAL, LOTTERY, SOFT, PruningPlan
from llmcomp.training.subject import PLAIN, Subject
from llmcomp.training.trainer import Rules, Teacher, Trained, train
from llmcomp.training_run import TrainingRun, options_of, regresses

_NOTHING = (
    "No weight was removed: no score has come below the threshold; take more steps, or a larger score_learning_rate, "
    "penalty or threshold."
)
_RATE = 5e-5  # the highest, where none is given


class PrunedTraining(TrainingRun):
    """The run of a plan on a dense checkpoint.

    Args:
        path: of the model that the plan names.
    """

    def __init__(
        self, plan: PruningPlan, path: Path, progress: Progress, world: World = ALONE
    ) -> None:
        options = options_of(plan)
        output = Path(options.output or default_output(plan.model, plan.summary))
        super().__init__(
            plan.model, path, plan, options, progress, original=plan.model, output=output, world=world
        )
        self.plan = plan

    def _open(self) -> Subject:
        """The model with all its weights, and which of them are to go under masks.

        Raises:
            BadCheckpoint: compressed already, or not whole.
            BadRecipe: targets that match nothing, widths that the pattern does not divide, a matrix that is tied.
        """
        source = open_source(self.path)
        self.assigned = plan_recipe(Recipe((self.plan.step,), format="dense"), source.adapter)
        if self.assigned.untied:
            raise BadRecipe(
                f"{self.plan.model} shares its head's weights with its embeddings, so no mask can be of one of them: "
                "leave head out of targets."
            )
        self.refs: dict[str, LinearRef] = {task.ref.name: task.ref for task in self.assigned.assignment.tasks.values()}
        self.left = left_alone(source, self.assigned)
        opened = open_checkpoint(self.path)
        model = load_opened(opened)
        split_experts(model)
        roles = {ref.name: ref.role for ref in source.adapter.refs}
        report = _blank(self.plan, source)
        forms = dict.fromkeys(self.refs, PLAIN)
        return Subject(Checkpoint.open(self.path), opened, report, model, forms, roles)

    def _room(self, subject: Subject) -> int:
        """With the states on the way, of which a lottery keeps one more, and scores."""
        weights = sum(value.numel() for value in subject.model.parameters())
        states = 4 if self.plan.method == LOTTERY else 3
        return 2 * subject.checkpoint.nbytes + states * 3 * 4 * weights * (1 if self._magnitudes else 2)

    @property
    def _magnitudes(self) -> bool:
        return self.plan.method in (GRADUAL, LOTTERY)

    # --- the work ---

    def _train(
        self, subject: Subject, samples: Samples, reader: Any, task: str, teacher: Teacher | None
    ) -> list[Trained]:
        plan, model = self.plan, subject.model
        told = {name: value for name, value in plan.said().items() if name not in ("eval_data", "model")}
        self._own_partial(subject, samples, told)
        subject.widen()
        torch.manual_seed(plan.seed)
        model.requires_grad_(True)
        put_masks(model, {name: ref.transposed for name, ref in self.refs.items()}, learned=not self._magnitudes)
        model.to(self.device)  # before an optimizer and rules know its parameters
        pruner = self._pruner(model)
        scores = [under.held.scores for under in under_masks(model).values()]
        rates = {one: plan.score_learning_rate for one in scores if one is not None}
        penalty = pruner.loss if isinstance(pruner, Softly) else None
        objective = self._objective(subject, samples, task, teacher)

        def one(states: Path, callbacks: list[Any]) -> Trained:
            return train(
                model, samples, collator(task, reader, regresses(subject, task)), objective, plan.optimization,
                states, self.progress, learning_rate=_RATE, device=self.device.type,
                rules=Rules(tuple(callbacks), rates, penalty),
            )  # fmt: skip

        folder = self.partial / "training"
        with self._timed("train"):
            if plan.method == LOTTERY:
                done = draw_tickets(model, pruner, plan.rounds, plan.rewind, folder, one)
            else:
                done = [one(folder, [pruner])]
        if any(each.resumed for each in done):
            self._note("Resumed from the last state of an unfinished run.")
        subject.masks = {name: mask.cpu() for name, mask in fold(model).items()}
        self._check(subject)
        if not any(bool((~mask).any()) for mask in subject.masks.values()):
            self._note(_NOTHING)
        return done

    def _pruner(self, model: Any) -> Pruner:
        plan = self.plan
        if plan.method == SOFT:
            return Softly(
                model, plan.span, threshold=plan.threshold, strength=plan.penalty, world=self.world
            )
        pattern = Pattern.parse(plan.pattern, plan.sparsity)
        return Pruner(
            model, pattern, plan.span, learned=not self._magnitudes, together=plan.scope == "global", world=self.world
        )

    def _check(self, subject: Subject) -> None:
        """Refuse masks that are not what was asked for: N:M is exact in every row.

        Raises:
            RunError: one that is not.
        """
        pattern = Pattern.parse(self.plan.pattern, self.plan.sparsity)
        for name, mask in subject.masks.items():
            check_mask(pattern, self._seen(name, mask))

    def _seen(self, name: str, tensor: Tensor) -> Tensor:
        """[out, in] of what the module holds."""
        return tensor.t() if self.refs[name].transposed else tensor

    def _pruned(self, subject: Subject) -> Mapping[str, Pruned]:
        pattern = Pattern.parse(self.plan.pattern, self.plan.sparsity)
        return {
            f"{name}.weight": Pruned(
                int((subject.model.get_submodule(name).weight == 0).sum()), pattern.kept, pattern.of,
                self.refs[name].transposed,
            )
            for name in subject.masks
        }  # fmt: skip

    # --- what comes out ---

    def _report(self, subject: Subject, trained: list[Trained], task: str, data: str, peak: int) -> Report:
        plan, removed = self.plan, {name: int((~mask).sum()) for name, mask in subject.masks.items()}
        history = [{**entry, **({"round": number} if len(trained) > 1 else {})}
                   for number, each in enumerate(trained) for entry in each.history]  # fmt: skip
        return replace(
            subject.report,
            output=str(self.output),
            source=str(self.path),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            machine=this_machine(describe_device(self.device)),
            task=task,
            layers=[self._layer(subject, name, count) for name, count in removed.items()],
            left=self.left,
            size_before=size_of(self.path, subject.role),
            peak_memory=peak,
            labels=labels(self.assigned, "dense"),
            pruning=Pruning(
                method=plan.method, removed=sum(removed.values()) / sum(ref.weights for ref in self.refs.values()),
                data=data, teacher=plan.teacher, parameters=trained[-1].parameters,
                steps=sum(each.steps for each in trained), resumed=max(each.resumed for each in trained),
                rounds=len(trained), history=history,
            ),
        )  # fmt: skip

    def _layer(self, subject: Subject, name: str, removed: int) -> LayerReport:
        ref, weight = self.refs[name], subject.model.get_submodule(name).weight
        nbytes = weight.numel() * weight.element_size()
        pattern = Pattern.parse(self.plan.pattern, self.plan.sparsity)
        scheme = f"{UNSTRUCTURED} {100 * removed / ref.weights:.4g}%" if pattern.group is None else pattern.label
        return LayerReport(
            name, ref.block, ref.role, (ref.out_features, ref.in_features), scheme, self.plan.method, nbytes, nbytes
        )

    def _measure(self, report: Report, checkpoint: Path, texts: Any) -> None:
        """Before and after with the same code on the same data."""
        with self._timed("evaluate"):
            try:
                found = self._evaluate(checkpoint, self.path, texts, cost=True)
            except LlmcompError as error:
                self._note(f"Not evaluated: {error}")
                return
        report.before, report.after, report.divergence = found.before, found.after, found.divergence
        for note in found.notes:
            self._note(note)

    def _beside(self) -> dict[str, str]:
        """The plan, so that the run can be done again."""
        said = self.plan.said()
        return {PLAN_NAME: write_yaml(said)}


def _blank(plan: PruningPlan, source: Source) -> Report:
    """A report of what is known before anything is done."""
    return Report(
        command="prune-in-training", model=plan.model, source=plan.model, output="", created="",
        machine=this_machine("cpu"), architecture=source.adapter.architecture, task=source.adapter.task,
        recipe=plan.said(), format="dense", calibration={}, llmcomp_version=version("llmcomp"),
    )  # fmt: skip
