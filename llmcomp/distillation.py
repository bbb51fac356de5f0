"""One distillation: a student made from a teacher, trained by it, verified, and measured beside it.

`llmcomp.training_run` is how it runs, `llmcomp.training.distilling` what is learned. The student is written as a
checkpoint into a temporary folder first, which is then trained as any other; it is made anew, with the same bits, where
a killed run goes on.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from llmcomp import hub
from llmcomp.adapters.discover import discover, skeleton
from llmcomp.building import write_yaml
from llmcomp.calibration.data import Texts
from llmcomp.calibration.media import Media
from llmcomp.checkpoint import Checkpoint
from llmcomp.devices import describe as describe_device
from llmcomp.errors import BadCheckpoint, BadData, BadRecipe, LlmcompError
from llmcomp.experts import split_experts
from llmcomp.formats.opening import open_checkpoint
from llmcomp.formats.save import ShardWriter
from llmcomp.inner_losses import head_map, layer_map
from llmcomp.loading import load_opened
from llmcomp.measure.cost import size_of
from llmcomp.measure.load import load, load_tokenizer, task_of
from llmcomp.measure.machine import this_machine
from llmcomp.progress import Progress
from llmcomp.ranks import ALONE, World
from llmcomp.report.schema import FILE_NAME, Distillation, Report
from llmcomp.report.summary import DISTILL_NAME
from llmcomp.session import default_output
from llmcomp.training import reading
from llmcomp.training.data import CLASSIFIERS, Samples, collator
from llmcomp.training.distill_plan import SHARED, DistillPlan
from llmcomp.training.distilling import Guide, Layers, Weights
from llmcomp.training.images import require_same_patches
from llmcomp.training.remembered import Asked, content, remembered, vocabulary_sha256
from llmcomp.training.states import held_state, put_back
from llmcomp.training.students import configured_student, cut_student, headed_student, parse_cut, written
from llmcomp.training.subject import Subject
from llmcomp.training.teachers import Room, read_own_tokens, taught
from llmcomp.training.trainer import Objective, Rules, Trained, slow_products, train
from llmcomp.training_run import TrainingRun, options_of, regresses

_BODIES = ("masked-lm", "encoder")  # tasks whose models are, without their heads, a start for others
_RATE = 5e-5  # the highest, where none is given
_LABEL = "A smaller dense model of the same kind: faster and smaller wherever its teacher runs."


class Distilling(TrainingRun):
    """The run of a plan.

    Args:
        teacher: the directory of the plan's teacher.
        whole: the plan that was given, where this one is a stage of it: its teacher is what the last stage's student is
            held against.
    """

    def __init__(
        self, plan: DistillPlan, teacher: Path, progress: Progress, world: World = ALONE,
        whole: DistillPlan | None = None,
    ) -> None:  # fmt: skip
        options = options_of(plan)
        output = Path(options.output or default_output(plan.teacher, plan.summary))
        super().__init__(
            plan.teacher, teacher, plan, options, progress, original=(whole or plan).teacher, output=output, world=world
        )
        self.plan, self.teacher = plan, teacher
        self.whole = whole if whole is not None and whole.output == plan.output else plan
        self.against = hub.resolve(self.whole.teacher).path
        self.bare: dict[str, Tensor] | None = None  # weights of the student that was trained without a teacher
        self.without: Trained | None = None
        self.foreign: dict[str, Any] = {}  # tokenizers of teachers that read other tokens

    def run(self) -> tuple[Path, Report]:
        """Do it all; raises as `TrainingRun.run`."""
        with TemporaryDirectory(prefix="llmcomp-student-") as folder:
            self.scratch = Path(folder)
            return super().run()

    # --- the student ---

    def _open(self) -> Subject:
        """The student before it is trained.

        Raises:
            BadRecipe, BadCheckpoint: one that cannot be made, or does not fit its teacher.
        """
        self.adapter = discover(skeleton(self.teacher))
        task = task_of(self.teacher)
        self.path, self.described, self.model = self._made(
            self.plan.student, task, self.plan.seed, self.scratch / "student"
        )
        if (other := task_of(self.path)) != task:
            raise BadCheckpoint(
                f"The teacher {self.plan.teacher} is for {task} and {self.model} for {other}; give one for {task}."
            )
        own = discover(skeleton(self.path))
        self.blocks = [block.name for block in own.blocks], [block.name for block in self.adapter.blocks]
        opened = open_checkpoint(self.path)
        if opened.kinds:
            raise BadRecipe(f"--student {self.plan.student} is compressed already; llmcomp recover trains it.")
        model = load_opened(opened)
        split_experts(model)
        roles = {ref.name: ref.role for ref in own.refs}
        return Subject(Checkpoint.open(self.path), opened, self._blank(task), model, {}, roles)

    def _made(self, name: str, task: str, seed: int, folder: Path) -> tuple[Path, str, str]:
        """A student's directory, what it started from, and how it is called."""
        said, cut = Path(name), parse_cut(name)
        if cut is None and not said.is_file():
            described = f"the checkpoint {name}"
            path = hub.resolve(name, progress=self.progress).path
            if task_of(path) not in _BODIES or task in _BODIES:
                return path, described, name
            made = headed_student(load(self.teacher, task), path, seed)
            return written(made, path, folder), f"{described} under a fresh head", name
        teacher = load(self.teacher, task)
        if cut is not None:
            found = cut_student(teacher, self.adapter, cut, seed)
        else:
            found = configured_student(teacher, self.adapter, said, seed)
        return written(found.model, self.teacher, folder), found.described, self.plan.teacher

    def _origin(self) -> Path:
        """A student that was cut from its teacher, or has its weights where they fit, is a derivative of it."""
        name = self.plan.student
        of_teacher = parse_cut(name) is not None or Path(name).is_file()
        return self.teacher if of_teacher else hub.resolve(name).path

    def _peer(self, subject: Subject, task: str, reader: Any) -> Any:
        """The second student, in float32; None where there is none.

        Raises:
            BadRecipe: one that is compressed.
        """
        if self.plan.peer is None or not self.plan.weights.taught:
            return None
        path, described, _ = self._made(self.plan.peer, task, self.plan.seed + 1, self.scratch / "peer")
        if open_checkpoint(path).kinds:
            raise BadRecipe(f"--peer {self.plan.peer} is compressed already; give a dense one, which can be trained.")
        self._note(f"The second student started from {described}; it is not kept.")
        return self._teacher_model(str(path), subject, task, reader).float().requires_grad_(True)

    def _identity(self, subject: Subject) -> str:
        """Of the teachers and, where it is no part of this run, of the student."""
        found = [Checkpoint.open(self.teacher).fingerprint(), subject.checkpoint.fingerprint(times=False)]
        found += [Checkpoint.open(hub.resolve(name).path).fingerprint() for name in self.plan.ensemble]
        for student in (self.plan.student, self.plan.peer or self.plan.student):
            if Path(student).is_file():
                found.append(Path(student).read_text(encoding="utf-8"))
            elif parse_cut(student) is None:
                found.append(Checkpoint.open(hub.resolve(student).path).fingerprint())
        return " ".join(found)

    def _room(self, subject: Subject) -> int:
        """With the states on the way, those of a baseline too."""
        weights = sum(value.numel() for value in subject.model.parameters())
        return 2 * subject.checkpoint.nbytes + (1 + self.plan.baseline) * 3 * 3 * 4 * weights

    # --- the teacher ---

    def _teacher(self, subject: Subject, task: str, reader: Any) -> Any:
        """The student and who teaches it; raises as `TrainingRun`'s."""
        models = [self._teacher_model(name, subject, task, reader) for name in self.plan.asked]
        for model in models:
            if not getattr(model, "is_quantized", False) and slow_products(model):
                model.float()
        whole = self.adapter.model if self.against == self.teacher else skeleton(self.against)
        own, its = (sum(value.numel() for value in model.parameters()) for model in (subject.model, whole))
        if own > its:
            self._note(f"The student has {own:,} parameters and its teacher {its:,}: it is no smaller.")
        self.parameters = own, its
        return Room(subject.model, self.blocks[0], models, self.blocks[1], self._peer(subject, task, reader))

    def _of_other_tokens(self, name: str, task: str) -> None:
        if self.plan.vocabulary != SHARED:
            raise BadCheckpoint(
                f"The teacher {name} has another vocabulary than {self.model}, so its logits are of other tokens; give "
                "one with the same tokenizer, or --vocabulary shared."
            )
        if task not in ("causal-lm", "sequence-classification") or (task == "causal-lm" and len(self.plan.asked) > 1):
            what = "an ensemble" if task == "causal-lm" else f"models for {task}"
            raise BadRecipe(f"--vocabulary shared is for classifiers, or one teacher of a decoder, not for {what}.")
        self.foreign[name] = load_tokenizer(hub.resolve(name).path)

    def _reads(self) -> Path:
        """Where a student has its tokenizer or processor from, of which it gets a copy."""
        return hub.resolve(self.model).path

    def _data(self, task: str) -> Texts | Media:
        self.data = super()._data(task)
        return self.data

    def _layers(self, room: Room, weights: Weights) -> Layers:
        """Which layers are compared.

        Raises:
            BadRecipe: maps that do not fit both models, widths that a loss cannot compare.
        """
        plan, own = self.plan, len(room.blocks)
        if not weights.taught or room.peer is not None:
            return Layers((), (0, 0))
        student, teacher = room.student, room.student if plan.past is not None else room.teachers[0]
        its = own if plan.past is not None else len(room.teacher_blocks)
        inside = weights.hidden or weights.attention or weights.transfer
        pairs = layer_map(plan.layer_map, own, its) if inside or plan.layer_map != "uniform" else ()
        one, other = student.config, teacher.config
        if weights.inside:
            require_same_patches(one, other)
        if weights.cosine and one.hidden_size != other.hidden_size:
            raise BadRecipe(
                f"Between hidden states of {one.hidden_size} and {other.hidden_size} channels there is no cosine; "
                "give --cosine-weight 0, or --method tinybert, which projects them."
            )
        heads = (head_map(plan.head_map, one.num_attention_heads, other.num_attention_heads)
                 if weights.attention else [])  # fmt: skip
        relation = plan.relation_heads or _relation_heads(one, other)
        return Layers(pairs, (own - 1, its - 1), heads, relation)

    # --- the work ---

    def _train(self, subject: Subject, samples: Samples, reader: Any, task: str, teacher: Any) -> Trained:
        plan, model, room = self.plan, subject.model, teacher
        regression = regresses(subject, task)
        labelled = task not in CLASSIFIERS or samples.labels is not None
        if not labelled and (plan.baseline or not plan.weights.taught):
            raise BadData(f"Training without a teacher needs labels; {reading.label_hint(task)}.")
        weights = plan.weights if labelled else replace(plan.weights, hard=0.0)
        layers = self._layers(room, weights)
        told = {name: value for name, value in plan.said().items() if name != "eval_data"}
        self._own_partial(subject, samples, told)
        subject.widen()
        model.requires_grad_(True)
        model.to(self.device)
        collate = collator(task, reader, regression, None if plan.teacher_cache is None else plan.seed)
        collate = read_own_tokens(plan, room, self.foreign, self.data, samples, reader, task, collate, self._note)

        def one(objective: Objective, states: str, rules: Rules) -> Trained:
            alone = states == "baseline" or not weights.taught  # by labels, which some samples may not have
            read = samples.labelled() if alone else samples
            return train(
                model, read, collate, objective, plan.optimization, self.partial / states, self.progress,
                learning_rate=_RATE, device=self.device.type, rules=rules,
            )  # fmt: skip

        if plan.baseline:
            with self._timed("train the baseline"):
                start = held_state(model)
                self.without = one(Objective(regression=regression), "baseline", Rules())
                self.bare = held_state(model)
                put_back(model, start)
        torch.manual_seed(plan.seed)

        def cached(guide: Guide) -> Guide:
            asked = self._asked(room, task, regression)
            with self._timed("ask the teacher"), torch.autocast(self.device.type, torch.bfloat16, plan.bf16):
                return remembered(guide, samples, collate, asked, self.progress, device=self.device, world=self.world)

        with taught(plan, room, weights, layers, regression, cached if plan.teacher_cache else None) as (by, rules):
            model.to(self.device)
            with self._timed("train"):
                trained = one(by, "training", rules)
        if trained.resumed:
            self._note(f"Resumed at step {trained.resumed} of an unfinished run.")
        self.weights = weights
        return trained

    def _asked(self, room: Room, task: str, regression: bool) -> Asked:
        """What of the teachers' answers is kept, and all that they depend on."""
        plan = self.plan
        size = "num_labels" if task in CLASSIFIERS else "vocab_size"
        identity: dict[str, Any] = {"teachers": [content(hub.resolve(name).path) for name in plan.asked], "task": task}
        if task == "masked-lm":
            identity["masks"] = plan.seed
        if plan.bf16:
            identity["dtype"] = "bfloat16"
        if self.foreign:
            tokenizers = (load_tokenizer(self.path), *self.foreign.values())
            identity["tokens"] = [vocabulary_sha256(one.get_vocab()) for one in tokenizers]
            identity["length"] = plan.sequence_length
        compared = [room.student, *([] if self.foreign and task == "causal-lm" else room.teachers)]
        classes = min(getattr(model.config, size) for model in compared)
        return Asked(
            Path(str(plan.teacher_cache)), identity, classes,
            plan.cached_classes, plan.cached_bits, plan.temperature, regression,
        )  # fmt: skip

    # --- what comes out ---

    def _blank(self, task: str) -> Report:
        """A report of what is known before anything is done."""
        return Report(
            command="distill", model=self.whole.teacher, source=str(self.against), output=str(self.output), created="",
            machine=this_machine("cpu"), architecture=self.adapter.architecture, task=task,
            recipe=self.whole.said(), format="dense", calibration={}, llmcomp_version=version("llmcomp"),
        )  # fmt: skip

    def _teachers(self) -> list[str]:
        """In words."""
        plan = self.plan
        first = [] if plan.past is None else [f"the student's own past ({plan.past:g})"]
        return [*first, *([] if plan.peer is None else [f"a second student ({plan.peer})"]), *plan.asked]

    def _report(self, subject: Subject, trained: Trained, task: str, data: str, peak: int) -> Report:
        counted = {name: value for name, value in dataclasses.asdict(self.weights).items() if value}
        self.subject = subject
        return replace(
            subject.report,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            machine=this_machine(describe_device(self.device)),
            size_before=size_of(self.against, subject.role),
            peak_memory=peak,
            labels=[_LABEL],
            distillation=Distillation(
                method=self.plan.method, losses=counted, student=self.described,
                teachers=self._teachers(), data=data, parameters=self.parameters[0],
                teacher_parameters=self.parameters[1], steps=trained.steps, resumed=trained.resumed,
                history=trained.history, baseline_history=[] if self.without is None else self.without.history,
            ),
        )  # fmt: skip

    def _measure(self, report: Report, checkpoint: Path, texts: Any) -> None:
        """Teacher and student, and the student that had no teacher, with the same code on the same data."""
        found = report.distillation
        assert found is not None
        one, other = (reading.reader_of(path, self.subject.model, report.task) for path in (self.against, self.path))
        apart = not reading.alike(one, other, report.task)
        against = None if apart else self.against  # what reads otherwise is measured on its own
        with self._timed("evaluate"):
            try:
                both = self._evaluate(checkpoint, against, texts, cost=True)
                report.before, report.after, report.divergence = both.before, both.after, both.divergence
                if apart:
                    report.before = self._evaluate(self.against, None, texts, cost=True).after
                if self.bare is not None:
                    bare = self._evaluate(self._bare_checkpoint(), against, texts, cost=False)
                    found.baseline, found.baseline_divergence = bare.after, bare.divergence
            except LlmcompError as error:
                self._note(f"Not evaluated: {error}")
                return
        if apart and report.task == "causal-lm":
            self._note("Perplexity is per token, and teacher and student read other tokens: they cannot be compared.")
        for note in both.notes:
            self._note(note)

    def _bare_checkpoint(self) -> Path:
        """The baseline in the form that the student has, for its measurement."""
        assert self.bare is not None
        put_back(self.subject.model, self.bare)
        writer, source = ShardWriter(self.scratch / "baseline"), self.subject.checkpoint
        files = sorted(self.subject.stored().items())
        order = [writer.write(path.stem, tensors).name for path, tensors in files]
        return writer.finish(order, source.config, source.copied_files(), root=source.path)

    def _beside(self) -> dict[str, str]:
        """The plan, so that the run can be done again."""
        said = {**self.whole.said(), "method": self.whole.method}  # scripts have defaults of their own
        return {DISTILL_NAME: write_yaml(said)}


def made_before(plan: DistillPlan, world: World) -> tuple[Path, Report] | None:
    """What an earlier run of a plan has finished, by its report; rank 0 looks for all."""
    if plan.overwrite or plan.output is None:
        return None
    path, found = Path(plan.output), b""
    if world.first and (path / FILE_NAME).is_file():
        report = Report.read(path)
        found = report.to_json().encode() if report.recipe == plan.said() else b""
    text = world.message(found if world.first else None)
    return (path, Report.from_json(text.decode())) if text else None


def _relation_heads(one: Any, other: Any) -> int:
    """The most relation heads that divide all channels of both, up to the teacher's heads."""
    channels = 0
    for config in (one, other):
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        channels = math.gcd(channels, heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size)
    return max(count for count in range(1, other.num_attention_heads + 1) if channels % count == 0)
