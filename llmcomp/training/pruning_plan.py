"""What a training that prunes is to do: keys of a YAML file, named as `llmcomp recover`'s flags are, and its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcomp.building import build, read_settings
from llmcomp.errors import BadRecipe
from llmcomp.patterns import UNSTRUCTURED, Pattern
from llmcomp.recipe import Override, Recipe, SparsifyStep
from llmcomp.recipe import check as check_recipe
from llmcomp.training.pruning import Span
from llmcomp.training.settings import Optimization, Teaching, optimization_of, said_of

GRADUAL, MOVEMENT, SOFT, LOTTERY = METHODS = ("gradual", "movement", "soft-movement", "lottery")
_SPANNING = (GRADUAL, MOVEMENT, SOFT)
_LEARNING = (MOVEMENT, SOFT)
_OF_METHODS = {
    "begin": _SPANNING, "end": _SPANNING, "every": _SPANNING, "initial_sparsity": (GRADUAL, MOVEMENT),
    "score_learning_rate": _LEARNING, "threshold": (SOFT,), "penalty": (SOFT,),
    "rounds": (LOTTERY,), "rewind": (LOTTERY,), "scope": (GRADUAL, MOVEMENT, LOTTERY),
    "pattern": (GRADUAL, MOVEMENT, LOTTERY), "sparsity": (GRADUAL, MOVEMENT, LOTTERY),
}  # fmt: skip


@dataclass(frozen=True)
class PruningPlan:
    """One training that prunes.

    Attributes:
        model: a dense model: a directory, Hub id, alias or 'sample:' name. output: the directory to be made.
        data, eval_data, text_column, label_column, samples, sequence_length: as `llmcomp recover`.
        method: one of `METHODS`.
        pattern, sparsity: what is removed at the end, as `llmcomp sparsify`; soft movement finds its own share.
        targets, skip: roles, blocks:A-B, last parts of names, or re:PATTERN.
        scope: 'layer', the share holds for each matrix, or 'global', for all of them together.
        begin, end: shares of all steps between which more and more is removed. every: steps between changes.
        initial_sparsity: the share at the begin.
        score_learning_rate: the highest, of the scores of movement.
        threshold, penalty: of soft movement: σ(S) that is kept, and the strength of the mean of σ(S) in the loss.
        rounds: how often a lottery ticket is pruned; rewind: share of a round's steps whose state it goes back to.
        teacher, temperature, soft_weight: as `llmcomp recover`, as the rest, which is a training's.
        weight_decay: of all that is trained, as AdamW has it.
    """

    model: str
    output: str | None = None
    data: str = "default"
    eval_data: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    samples: int | None = None
    sequence_length: int = 256
    method: str = GRADUAL
    pattern: str = UNSTRUCTURED
    sparsity: float | None = None
    targets: tuple[str, ...] = ("attention", "mlp")
    skip: tuple[str, ...] = ()
    scope: str = "layer"
    begin: float = 0.1
    end: float = 0.7
    every: int = 1
    initial_sparsity: float = 0.0
    score_learning_rate: float = 1e-2
    threshold: float = 0.1
    penalty: float = 20.0
    rounds: int = 5
    rewind: float = 0.1
    teacher: str | None = None
    temperature: float = 2.0
    soft_weight: float = 0.5
    learning_rate: float | None = None
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    weight_decay: float = 0.0
    seed: int = 0
    bf16: bool = False
    evaluate_every: int | None = None
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
        return Teaching(self.teacher, self.temperature, self.soft_weight)

    @property
    def optimization(self) -> Optimization:
        return optimization_of(self)

    @property
    def step(self) -> SparsifyStep:
        """What it removes, and where, as a step of a recipe."""
        skipped = tuple(Override(target, skip=True) for target in self.skip)
        return SparsifyStep("magnitude", self.pattern, self.sparsity, self.targets, skipped)

    @property
    def span(self) -> Span:
        return Span(self.begin, self.end, self.every, self.initial_sparsity)

    @property
    def summary(self) -> str:
        """Such as 'movement-85pct', for names of directories."""
        return self.method if self.method == SOFT else self.step.summary.replace("magnitude", self.method)

    def check(self) -> None:
        """Refuse what cannot be, before anything is opened.

        Raises:
            BadRecipe: naming the key.
        """
        if self.method not in METHODS:
            raise BadRecipe(f"method {self.method} cannot be: choose one of {', '.join(METHODS)}.")
        for name, methods in _OF_METHODS.items():
            default = next(one.default for one in dataclasses.fields(self) if one.name == name)
            if self.method not in methods and getattr(self, name) != default:
                raise BadRecipe(f"{name} is of {' and '.join(methods)}, not of method {self.method}; leave it out.")
        if self.scope not in ("layer", "global"):
            raise BadRecipe(f"scope {self.scope} cannot be: choose layer or global.")
        check_recipe(Recipe((self.step,), format="dense"))
        self._check_span()
        self.teaching.check()
        self.optimization.check()
        for name in ("samples", "sequence_length", "rounds"):
            value, least = getattr(self, name), 1 + (name == "sequence_length")
            if value is not None and value < least:
                raise BadRecipe(f"{name} {value} cannot be: it is at least {least}.")
        if not 0 <= self.rewind < 1:
            raise BadRecipe(f"rewind {self.rewind} cannot be: it is a share of the steps below 1, such as 0.1.")

    def _check_span(self) -> None:
        if not 0 <= self.begin < self.end <= 1:
            raise BadRecipe(
                f"begin {self.begin} and end {self.end} cannot be: they are shares of the steps, the begin first, such "
                "as 0.1 and 0.7."
            )
        if self.every < 1:
            raise BadRecipe(f"every {self.every} cannot be: it is at least 1.")
        final = Pattern.parse(self.pattern, self.sparsity).sparsity
        if not 0 <= self.initial_sparsity <= final:
            raise BadRecipe(f"initial_sparsity {self.initial_sparsity} cannot be: it lies between 0 and {final:g}.")
        for name, most in (("score_learning_rate", 1), ("threshold", 1)):
            if not 0 < getattr(self, name) < most:
                raise BadRecipe(f"{name} {getattr(self, name)} cannot be: it is above 0 and below {most}.")
        for name in ("penalty", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise BadRecipe(f"{name} {getattr(self, name)} cannot be: it is at least 0.")

    def said(self) -> dict[str, Any]:
        """What was asked, as plain data; what is left at its default, or changes nothing of the result, left out."""
        return said_of(self)


def read_plan(path: Path, settings: Sequence[str] = ()) -> PruningPlan:
    """A plan from a YAML file.

    Args:
        settings: 'key=value' each, which say otherwise than the file.

    Raises:
        BadRecipe: a file that cannot be read or is no mapping, unknown keys, values that cannot be.
    """
    data = read_settings(path, settings)
    if "model" not in data:
        raise BadRecipe(f"{path} names no model; give model: with a directory, a Hub id, an alias or a 'sample:' name.")
    for name in ("targets", "skip"):
        if name in data:
            if not isinstance(data[name], list) or not all(isinstance(one, str) for one in data[name]):
                raise BadRecipe(f"{path}: '{name}' must be a list such as [attention, mlp], got {data[name]!r}.")
            data[name] = tuple(data[name])
    plan: PruningPlan = build(PruningPlan, data, str(path))
    plan.check()
    return plan
