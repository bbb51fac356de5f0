"""How a model is trained, apart from what it is and what it reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from llmcomp.errors import BadRecipe

FULL, LORA, QAT = "full", "lora", "qat"
METHODS = (LORA, FULL, QAT)
TENSORBOARD, WANDB = "tensorboard", "wandb"
TRACKERS = (TENSORBOARD, WANDB)  # by the names of their packages


@dataclass(frozen=True)
class Optimization:
    """The course of a training.

    Attributes:
        learning_rate: the highest, after a warmup of 3% of the steps and before a cosine that ends at zero; None takes
            what the method usually wants.
        epochs: passes over the data; steps: optimizer steps instead.
        batch_size: samples of one forward of one process; accumulate: forwards of one step.
        seed: order, dropout and fresh weights.
        bf16: forwards and gradients under bf16 autocast; weights and optimizer stay in float32.
        evaluate_every: steps between losses on a held-out part of the data, None for none; patience: how many of them
            may be no better than the best before training ends, whose weights are then taken.
        save_every: steps between the states that a killed run resumes from, None for a tenth of all.
        group_by_length: samples of like length are read together, as `training.order` draws them.
        weight_decay: of matrices, as AdamW has it.
        gradient_checkpointing: what blocks compute is computed again on the way back, instead of held.
        powersgd: rank of the matrices that processes exchange instead of gradients (`training.compression`), None for
            gradients as they are.
        track: 'tensorboard' or 'wandb', which hears of losses as well; None for neither.
    """

    learning_rate: float | None = None
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    seed: int = 0
    bf16: bool = False
    evaluate_every: int | None = None
    patience: int | None = None
    save_every: int | None = None
    group_by_length: bool = False
    weight_decay: float = 0.0
    gradient_checkpointing: bool = False
    powersgd: int | None = None
    track: str | None = None

    def check(self) -> None:
        """Refuse numbers that cannot be.

        Raises:
            BadRecipe: naming the flag.
        """
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise BadRecipe(f"--learning-rate {self.learning_rate} cannot be: it is above 0 and below 1, such as 1e-4.")
        if self.steps is None and not self.epochs > 0:
            raise BadRecipe(f"--epochs {self.epochs} cannot be: it is above 0, such as 1 or 0.5.")
        for name in ("steps", "batch_size", "accumulate", "evaluate_every", "patience", "save_every", "powersgd"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadRecipe(f"--{name.replace('_', '-')} {value} cannot be: it is at least 1.")
        if self.patience is not None and self.evaluate_every is None:
            raise BadRecipe("--patience counts evaluations; give --evaluate-every, too.")
        if self.track is not None and self.track not in TRACKERS:
            raise BadRecipe(f"--track {self.track} cannot be: choose one of {', '.join(TRACKERS)}.")
        if self.track is not None and find_spec(self.track) is None:
            raise BadRecipe(f"--track {self.track} needs the package {self.track}; `pip install {self.track}` gets it.")


@dataclass(frozen=True)
class Teaching:
    """What is learned from a teacher's logits: L = (1 - w) hard + w soft (`llmcomp.losses`).

    Attributes:
        teacher: a directory, Hub id, alias or 'sample:' name; None for labels alone.
        temperature: T of the soft targets.
        weight: w, the share of the soft targets; without labels all of it.
    """

    teacher: str | None = None
    temperature: float = 2.0
    weight: float = 0.5

    def check(self) -> None:
        """Refuse numbers that cannot be.

        Raises:
            BadRecipe: naming the flag.
        """
        if not self.temperature > 0:
            raise BadRecipe(f"--temperature {self.temperature} cannot be: it is above 0, such as 2.")
        if not 0 < self.weight <= 1:
            raise BadRecipe(f"--soft-weight {self.weight} cannot be: it is above 0 and at most 1.")


@dataclass(frozen=True)
class Lora:
    """Two thin factors beside each linear, W x + (alpha / rank) B A x (arXiv:2106.09685).

    Attributes:
        rank: of B A. alpha: None is twice the rank.
        dropout: on what the factors read.
        targets: roles (attention, mlp, head) or last parts of modules' names; empty for all compressed linears.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """alpha as it is used."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def check(self) -> None:
        """Refuse numbers that cannot be.

        Raises:
            BadRecipe: naming the flag.
        """
        if self.rank < 1:
            raise BadRecipe(f"--rank {self.rank} cannot be: it is at least 1.")
        if self.alpha is not None and not self.alpha > 0:
            raise BadRecipe(f"--alpha {self.alpha} cannot be: it is above 0, such as twice the rank.")
        if not 0 <= self.dropout < 1:
            raise BadRecipe(f"--dropout {self.dropout} cannot be: it is a share below 1.")


@dataclass(frozen=True)
class Plan:
    """What a recovery is to do.

    Attributes:
        data: a source as `llmcomp.calibration.data` reads them; samples: how many of it, None for all.
        sequence_length: tokens of a sample.
        method: 'lora', 'full' or 'qat'; lora: its settings. learn_scales: of 'qat', whether scales are trained, too.
    """

    data: str
    samples: int | None = None
    sequence_length: int = 256
    method: str = LORA
    learn_scales: bool = False
    lora: Lora = field(default_factory=Lora)
    teaching: Teaching = field(default_factory=Teaching)
    optimization: Optimization = field(default_factory=Optimization)

    def check(self) -> None:
        """Refuse what cannot be, before anything is opened.

        Raises:
            BadRecipe: naming the flag.
        """
        if self.method not in METHODS:
            raise BadRecipe(f"--method {self.method} cannot be: choose one of {', '.join(METHODS)}.")
        if self.learn_scales and self.method != QAT:
            raise BadRecipe(f"--learn-scales goes with --method {QAT}; with {self.method} leave it out.")
        self.lora.check()
        self.teaching.check()
        self.optimization.check()
        for name in ("samples", "sequence_length"):
            value = getattr(self, name)
            least = 2 if name == "sequence_length" else 1
            if value is not None and value < least:
                raise BadRecipe(f"--{name.replace('_', '-')} {value} cannot be: it is at least {least}.")

    def flags(self) -> dict[str, Any]:
        """What the command line says of it, by the names of flags; what is left at its default is left out."""
        said: dict[str, Any] = {"data": self.data}
        parts = (self, self.lora, self.teaching, self.optimization)
        names = {"targets": "target", "weight": "soft_weight"}
        for part in parts:
            for one in dataclasses.fields(part):
                value = getattr(part, one.name)
                if one.name in said or dataclasses.is_dataclass(value) or value == one.default:
                    continue
                said[names.get(one.name, one.name)] = list(value) if isinstance(value, tuple) else value
        return said


# Fields of a plan that change nothing of the result.
_AWAY = ("output", "overwrite", "evaluate", "verify", "device", "save_every", "track")


def optimization_of(plan: Any) -> Optimization:
    """The course of a training, from the fields of a plan that has some of its names."""
    names = {one.name for one in dataclasses.fields(plan)} & {one.name for one in dataclasses.fields(Optimization)}
    return Optimization(**{name: getattr(plan, name) for name in names})


def said_of(plan: Any) -> dict[str, Any]:
    """What a plan was asked for, as plain data; what is left at its default, or changes nothing of the result, left
    out."""
    found = {}
    for one in dataclasses.fields(plan):
        value = getattr(plan, one.name)
        if value != one.default and one.name not in _AWAY:
            found[one.name] = list(value) if isinstance(value, tuple) else value
    return found
