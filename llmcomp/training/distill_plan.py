"""What a distillation is to do: flags of `llmcomp distill`, keys of a YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmcomp.building import build, read_settings
from llmcomp.errors import BadRecipe
from llmcomp.kept import BITS
from llmcomp.training.distilling import DIVERGENCES, METHODS, Weights
from llmcomp.training.settings import Optimization, Teaching, optimization_of, said_of
from llmcomp.training.students import parse_cut

SAME, SHARED = VOCABULARIES = ("same", "shared")
_TAUGHT = ("baseline", "ensemble", "assistants", "past", "peer", "teacher_cache")  # what only a teacher is asked with
_LISTS = ("ensemble", "assistants", "head_map")


@dataclass(frozen=True)
class DistillPlan:
    """One distillation.

    Attributes:
        teacher: a directory, Hub id, alias or 'sample:' name. ensemble: further teachers, whose distributions are
            averaged with its.
        assistants: students on the way, each of which is trained by the one before it and teaches the next; written as
            `student`.
        past: the moving average of the student's own weights teaches it, in the teacher's place, of which so much stays
            at each step. peer: a second student, written as `student`, does, and learns from the first.
        teacher_cache: a directory in which the teacher's logits are kept, so that it runs once for all epochs and runs;
            cached_classes: how many of a distribution, the others as one; cached_bits: of a logarithm, 16 or 8.
        student: what is cut from the teacher, such as 'layers=3' (`training.students`), a checkpoint, or a config.json.
        output: the directory to be made.
        vocabulary: 'same', of teacher and student, or 'shared': the tokens that both have are compared.
        data, eval_data, text_column, label_column, samples, sequence_length: as `llmcomp recover`.
        method: one of `distilling.METHODS`, which says how much each loss counts; a `…_weight` says otherwise.
        temperature: T of the soft targets. divergence: forward, reverse or jsd.
        layer_map: uniform, last, skip, or pairs '0:1,1:3'. head_map: teacher's heads, where numbers differ.
        relation_heads: of MiniLM's relations; None for the most that both models' channels divide into.
        baseline: train the same student without a teacher, too, and measure it beside.
        learning_rate and the rest: of the training, as `llmcomp recover`.
    """

    teacher: str
    student: str
    output: str | None = None
    ensemble: tuple[str, ...] = ()
    assistants: tuple[str, ...] = ()
    past: float | None = None
    peer: str | None = None
    teacher_cache: str | None = None
    cached_classes: int = 64
    cached_bits: int = 16
    vocabulary: str = SAME
    data: str = "default"
    eval_data: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    samples: int | None = None
    sequence_length: int = 128
    method: str = "logits"
    temperature: float = 2.0
    divergence: str = "forward"
    hard_weight: float | None = None
    soft_weight: float | None = None
    cosine_weight: float | None = None
    embedding_weight: float | None = None
    hidden_weight: float | None = None
    attention_weight: float | None = None
    relation_weight: float | None = None
    transfer_weight: float | None = None
    layer_map: str = "uniform"
    head_map: tuple[int, ...] = ()
    relation_heads: int | None = None
    baseline: bool = False
    learning_rate: float | None = None
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    weight_decay: float = 0.0
    seed: int = 0
    bf16: bool = False
    evaluate_every: int | None = None
    patience: int | None = None
    save_every: int | None = None
    group_by_length: bool = False
    gradient_checkpointing: bool = False
    powersgd: int | None = None
    track: str | None = None
    device: str = "auto"
    evaluate: bool = True
    verify: bool = True
    overwrite: bool = False

    @property
    def teaching(self) -> Teaching:
        return Teaching(self.teacher, self.temperature)

    @property
    def optimization(self) -> Optimization:
        return optimization_of(self)

    @property
    def weights(self) -> Weights:
        """The method's, and what was said otherwise."""
        names = [one.name for one in dataclasses.fields(Weights)]
        said = {name: getattr(self, f"{name}_weight") for name in names}
        return replace(METHODS[self.method], **{name: value for name, value in said.items() if value is not None})

    @property
    def summary(self) -> str:
        """Such as 'distilbert-layers3', for names of directories."""
        cut = parse_cut(self.student)
        if cut is None:
            return f"{self.method}-student"
        said = {"layers": cut.layers or len(cut.blocks), "hidden": cut.hidden, "heads": cut.heads, "mlp": cut.mlp}
        return "-".join([self.method, *(f"{name}{value}" for name, value in said.items() if value)])

    def check(self) -> None:
        """Refuse what cannot be, before anything is opened.

        Raises:
            BadRecipe: naming the flag.
        """
        if self.method not in METHODS:
            raise BadRecipe(f"--method {self.method} cannot be: choose one of {', '.join(METHODS)}.")
        if self.divergence not in DIVERGENCES:
            raise BadRecipe(f"--divergence {self.divergence} cannot be: choose one of {', '.join(DIVERGENCES)}.")
        for name, value in dataclasses.asdict(self.weights).items():
            if not 0 <= value < float("inf"):
                raise BadRecipe(f"--{name}-weight {value} cannot be: it is a finite number of at least 0.")
        if not self.weights.taught and self.method != "labels":
            raise BadRecipe(
                "With these weights nothing is learned from the teacher; give one a weight above 0, or --method labels."
            )
        self._check_teachers()
        for student in (self.student, *self.assistants, *([] if self.peer is None else [self.peer])):
            parse_cut(student)
        self.teaching.check()
        self.optimization.check()
        numbers = (("samples", 1), ("sequence_length", 2), ("relation_heads", 1), ("cached_classes", 1))
        for name, least in numbers:
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadRecipe(f"--{name.replace('_', '-')} {value} cannot be: it is at least {least}.")

    def _check_teachers(self) -> None:
        """Who teaches, and how that is kept."""
        if not self.weights.taught and (extra := [name for name in _TAUGHT if getattr(self, name)]):
            raise BadRecipe(f"--method labels has no teacher, so --{extra[0].replace('_', '-')} is for another method.")
        if self.past is not None and not 0 <= self.past < 1:
            raise BadRecipe(f"--past {self.past} cannot be: it is at least 0 and below 1, such as 0.999.")
        if self.past is not None and self.peer is not None:
            raise BadRecipe("--past and --peer both stand in the teacher's place; give one of them.")
        if self.assistants and (self.past is not None or self.peer is not None):
            raise BadRecipe("--assistant is for a teacher; leave --past and --peer out.")
        if self.peer is not None and self.weights.inside:
            raise BadRecipe(
                f"Students that teach each other learn from logits, and these weights want {self.weights.inside[0]}, "
                "too; give --method logits."
            )
        if self.vocabulary not in VOCABULARIES:
            raise BadRecipe(f"--vocabulary {self.vocabulary} cannot be: choose one of {', '.join(VOCABULARIES)}.")
        if self.vocabulary == SHARED and self.weights.inside:
            raise BadRecipe(
                f"--vocabulary shared compares logits, and these weights want {self.weights.inside[0]}, which is of "
                "other tokens; give --method logits."
            )
        if self.teacher_cache is None:
            return
        if self.past is not None or self.peer is not None:
            raise BadRecipe("--teacher-cache is for teachers that stay as they are; leave --past and --peer out.")
        if self.weights.inside:
            raise BadRecipe(
                f"--teacher-cache keeps logits alone, and these weights want {self.weights.inside[0]}, too; give "
                "--method logits, or leave the cache out."
            )
        if self.cached_bits not in BITS:
            raise BadRecipe(f"--cached-bits {self.cached_bits} cannot be: choose one of {', '.join(map(str, BITS))}.")

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the teachers that are models of their own, in order."""
        if not self.weights.taught:
            return ()
        return self.ensemble if self.past is not None or self.peer is not None else (self.teacher, *self.ensemble)

    def chain(self) -> list[DistillPlan]:
        """A run for each assistant and the student's; each is taught by what the one before it has made.

        Raises:
            BadRecipe: assistants, and no name for the output, beside which they lie.
        """
        if not self.assistants:
            return [self]
        if self.output is None:
            raise BadRecipe("Assistants lie beside the output; give it a name with --output.")
        found, teacher = [], self.teacher
        for number, student in enumerate(self.assistants, start=1):
            output = f"{self.output}-assistant-{number}"
            found.append(replace(self, teacher=teacher, student=student, output=output, assistants=(), ensemble=(),
                                 baseline=False, evaluate=False))  # fmt: skip
            teacher = output
        return [*found, replace(self, teacher=teacher, assistants=())]

    def said(self) -> dict[str, Any]:
        """What was asked, as plain data; what is left at its default, or changes nothing of the result, left out."""
        return said_of(self)


def read_distill_plan(path: Path, settings: Sequence[str] = (), **defaults: Any) -> DistillPlan:
    """A plan from a YAML file.

    Args:
        settings: 'key=value' each, which say otherwise than the file. defaults: where neither says anything.

    Raises:
        BadRecipe: a file that cannot be read or is no mapping, unknown keys, values that cannot be.
    """
    return distill_plan({**defaults, **read_settings(path, settings)}, str(path))


def distill_plan(data: Mapping[Any, Any], where: str) -> DistillPlan:
    """A checked plan from a mapping.

    Raises:
        BadRecipe: unknown keys, values that cannot be.
    """
    data = dict(data)
    for name, example in (("teacher", "a directory, a Hub id or a 'sample:' name"), ("student", "layers=3")):
        if name not in data:
            raise BadRecipe(f"{where} names no {name}; give {name}: with {example}.")
    for name in _LISTS:
        if name in data:
            kind = int if name == "head_map" else str
            if not isinstance(data[name], list) or not all(isinstance(one, kind) for one in data[name]):
                raise BadRecipe(f"{where}: '{name}' must be a list, got {data[name]!r}.")
            data[name] = tuple(data[name])
    plan: DistillPlan = build(DistillPlan, data, where)
    plan.check()
    return plan
