"""Which linear gets which scheme and method, and which is left alone and why: a recipe met with a model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from llmcomp.adapters.base import Adapter, LinearRef
from llmcomp.errors import BadRecipe
from llmcomp.kinds import Kind, LowRank, Sparse
from llmcomp.methods import AUTO, AUTO_ALONE, LOW_RANK, METHODS, SPARSE
from llmcomp.patterns import Pattern
from llmcomp.recipe import ROLES, QuantizeStep, TargetedStep, matches, override_for, scheme_for
from llmcomp.schemes import INT8_DYNAMIC, INT8_STATIC, Scheme

StepT = TypeVar("StepT", bound=TargetedStep)


@dataclass(frozen=True)
class Pruning:
    """Weights are removed by `pattern`, chosen by a method of SPARSE.

    Attributes:
        update: whether what is left aims at the source's outputs on the inputs of now (`methods.retarget`).
    """

    pattern: Pattern
    method: str
    update: bool = False

    @property
    def label(self) -> str:
        """Such as 'sparsegpt updated'."""
        return f"{self.method} updated" if self.update else self.method


@dataclass(frozen=True)
class Factoring:
    """Two thin factors stand for the weight, or correct its integers.

    Attributes:
        method: of LOW_RANK.
        source: whether its inputs in the source model are wanted: the factors are the best for those.
        update: whether a factor is then fitted anew to the inputs of now.
        bits: of factors that correct integers, None of those that stand for the weight.
    """

    rank: int
    method: str
    source: bool = False
    update: bool = False
    bits: int | None = None

    @property
    def label(self) -> str:
        """Such as 'svd-llm updated'."""
        return f"{self.method} updated" if self.update else self.method


@dataclass(frozen=True)
class Task:
    """What is to be done with one linear.

    Attributes:
        scheme: of its integers; None where its values stay floating.
        method: of METHODS where it has a scheme, else the pruning's or factoring's.
        fallback: why its scheme is not the one that was asked.
        pruning: what is removed before its weights are rounded, or at once with that.
        factoring: the factors that stand for it, of which `scheme` is the right one's; or that correct its integers.
    """

    ref: LinearRef
    scheme: Scheme | None
    method: str
    fallback: str | None = None
    pruning: Pruning | None = None
    factoring: Factoring | None = None

    @property
    def kind(self) -> Kind:
        """As formats want it."""
        if self.factoring is not None:
            return _factored_kind(self.factoring, self.scheme)
        if self.pruning is not None:
            return Sparse(self.pruning.pattern, self.scheme)
        assert self.scheme is not None  # a task does something
        return self.scheme

    @property
    def label(self) -> str:
        """Such as '2:4 + int4 g128', or 'rank 204 (80%)' with the share of the weight's numbers that it keeps."""
        if isinstance(kind := self.kind, LowRank):
            ref = self.ref
            share = kind.rank * (ref.out_features + ref.in_features) / ref.weights
            rank = f"rank {kind.rank}"
            return kind.label.replace(rank, f"{rank} ({share:.0%})") if kind.base is None else kind.label
        parts = (self.pruning.pattern.label if self.pruning else None, self.scheme.label if self.scheme else None)
        return " + ".join(filter(None, parts))

    @property
    def methods(self) -> str:
        """Such as 'sparsegpt + gptq'."""
        if self.factoring is not None and self.scheme is not None:
            both = (self.factoring.label, self.method)
            return " + ".join(both if self.factoring.bits is None else both[::-1])
        if self.factoring is not None:
            return self.factoring.label
        if self.pruning is None:
            return self.method
        return self.pruning.label if self.scheme is None else f"{self.pruning.label} + {self.method}"

    @property
    def source(self) -> bool:
        """Whether its inputs in the source model are wanted."""
        return self.crossed or (self.factoring is not None and self.factoring.source)

    @property
    def crossed(self) -> bool:
        """Whether they are wanted token by token beside the inputs of now."""
        pruned = self.pruning is not None and self.pruning.update
        return pruned or (self.factoring is not None and self.factoring.update) or self.aim is not None

    @property
    def one_sweep(self) -> bool:
        """Whether weights are removed and rounded in one sweep."""
        return self.pruning is not None and (self.pruning.method, self.method) == ("sparsegpt", "gptq")

    @property
    def activations(self) -> str | None:
        return None if self.scheme is None else self.scheme.activations

    @property
    def bits(self) -> int | None:
        return None if self.scheme is None else self.scheme.bits

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration data."""
        pruned = self.pruning is not None and SPARSE[self.pruning.method].calibrated
        low = self.factoring is not None and (self.factoring.update or LOW_RANK[self.factoring.method].calibrated)
        return pruned or low or (self.scheme is not None and METHODS[self.method].calibrated)

    @property
    def factorizes(self) -> bool:
        """Whether its Gram matrix is factorized."""
        pruned = self.pruning is not None and SPARSE[self.pruning.method].factorizes
        return pruned or (self.scheme is not None and METHODS[self.method].factorizes)

    @property
    def tune(self) -> Callable[..., Any] | None:
        """As `Method.tune`."""
        return None if self.scheme is None else METHODS[self.method].tune

    @property
    def aim(self) -> Callable[..., Tensor] | None:
        """As `Method.aim`."""
        return None if self.scheme is None else METHODS[self.method].aim

    @property
    def scale(self) -> Callable[..., Tensor] | None:
        """As `Method.scale`."""
        return None if self.scheme is None else METHODS[self.method].scale


@dataclass(frozen=True)
class Assignment:
    """tasks: {module name: Task}; left: {module name: why it is not compressed}."""

    tasks: dict[str, Task]
    left: dict[str, str]

    @property
    def beside(self) -> bool:
        """Whether the source model's activations go through the model, too (`pipeline.beside`)."""
        return any(task.source for task in self.tasks.values())

    @property
    def calibrated(self) -> bool:
        """Whether any task needs calibration data."""
        return any(task.calibrated for task in self.tasks.values())


def why_not_updated(ref: LinearRef, repeated: bool) -> str | None:
    """Why a linear cannot be fitted to the source's outputs on the inputs of now; None if it can.

    Args:
        repeated: the model runs a block several times.
    """
    if ref.share < 1:
        return "experts are not updated: other tokens may be routed to it than in the source model"
    if repeated:
        return "not updated: the model runs one block several times, which is solved by what the source's reads"
    return None


def _factored_kind(factoring: Factoring, scheme: Scheme | None) -> LowRank:
    if factoring.bits is not None:
        own = Scheme(factoring.bits)
        return LowRank(factoring.rank, own, own, scheme)
    if scheme is None or scheme.group_size is None:
        return LowRank(factoring.rank, scheme, scheme)
    sizes = [size for size in (128, 64, 32) if size <= scheme.group_size and factoring.rank % size == 0]
    return LowRank(factoring.rank, replace(scheme, group_size=sizes[0] if sizes else None), scheme)


def assign(adapter: Adapter, step: QuantizeStep) -> Assignment:
    """Resolve targets, overrides and group sizes.

    Raises:
        BadRecipe: an unknown method, a target or override that matches nothing, nothing to do, or an explicit
            group size that divides no targeted width. All problems are said at once.
    """
    problems = unknown(adapter, step, ("auto", *METHODS))
    tasks: dict[str, Task] = {}
    left = dict(adapter.uncompressed)
    misfits: list[LinearRef] = []
    repeated = frozenset(block.index for block in adapter.blocks if block.applications > 1)
    for ref in adapter.refs:
        if (why := left_out(step, ref)) is not None:
            left[ref.name] = why
        elif (task := _task(ref, step, misfits, problems, repeated)) is not None:
            tasks[ref.name] = task
    problems += _untunable(adapter, tasks) + _aimless(tasks)
    if not tasks and not problems:
        problems.append("the recipe's targets and overrides leave nothing to quantize")
    made = Assignment(tasks, left)
    if step.activations == INT8_STATIC and tasks and not made.calibrated:
        able = ", ".join(name for name, one in METHODS.items() if one.calibrated and not (one.tune or one.aim))
        problems.append(
            f"--activations {INT8_STATIC} finds its ranges in calibration, and method {step.method} reads no text; "
            f"choose one of {able}, or --activations {INT8_DYNAMIC}"
        )
    if misfits and len(misfits) == len(tasks):
        widths = sorted({ref.in_features for ref in misfits})
        problems.append(
            f"group_size {step.group_size} divides none of the widths {widths}; "
            "choose 32, 64, 128 or 'channel', or leave it out"
        )
    if problems:
        raise BadRecipe(f"The recipe does not fit {adapter.architecture}: " + "; ".join(problems) + ".")
    return made


def left_out(step: TargetedStep, ref: LinearRef) -> str | None:
    """Why a step leaves a linear alone; None where it does not."""
    override = override_for(step, ref.name, ref.role, ref.block)
    if override is not None:
        return f"skipped by the recipe ({override.target})" if override.skip else None
    targeted = any(matches(target, ref.name, ref.role, ref.block) for target in step.targets)
    return None if targeted else f"{ref.role} not targeted"


def _task(
    ref: LinearRef, step: QuantizeStep, misfits: list[LinearRef], problems: list[str], repeated: frozenset[int]
) -> Task | None:
    """The task of one linear; None where the recipe cannot be right, with `problems` saying why.

    Args:
        repeated: blocks that run several times.
    """
    override = override_for(step, ref.name, ref.role, ref.block)
    method = step.method if override is None or override.method is None else override.method
    if method not in METHODS and method != "auto":
        return None
    try:
        scheme = scheme_for(step, override, ref.in_features)
    except (BadRecipe, ValueError) as error:
        if str(error) not in problems:
            problems.append(str(error))
        return None
    if method == "auto":
        method = AUTO[scheme.bits]
        unaimed = METHODS[method].aim is not None and (ref.share < 1 or ref.block is None)
        if scheme.activations is not None or ref.block in repeated or unaimed:
            method = AUTO_ALONE
    if ref.role == "embeddings":
        scheme, method = replace(scheme, activations=None), "rtn"  # a lookup reads indices, which have no statistics
    task = _placed(ref, scheme, method, step, misfits)
    if METHODS[method].aim is not None:
        why = why_not_updated(ref, ref.block in repeated)
    elif METHODS[method].tune is not None and ref.block is None:
        why = f"no block whose output {method} could learn from: {AUTO_ALONE}"
    else:
        why = None
    if why is None:
        return task
    return replace(task, method=AUTO_ALONE, fallback="; ".join(filter(None, (task.fallback, why))))


def _placed(ref: LinearRef, scheme: Scheme, method: str, step: QuantizeStep, misfits: list[LinearRef]) -> Task:
    """The task, with a group size that fits."""
    override = override_for(step, ref.name, ref.role, ref.block)
    if scheme.fits(ref.in_features):
        asked = step.group_size if override is None or override.group_size is None else override.group_size
        if asked is None and scheme.group_size != 128 and step.activations is None:
            return Task(ref, scheme, method, f"128 does not divide its width {ref.in_features}: {scheme.label}")
        return Task(ref, scheme, method)
    misfits.append(ref)
    size = next((g for g in (64, 32) if g < (scheme.group_size or 0) and ref.in_features % g == 0), None)
    fallback = Scheme(scheme.bits, size, scheme.symmetric)
    why = f"{scheme.group_size} does not divide its width {ref.in_features}: {fallback.label}"
    return Task(ref, fallback, method, why)


def _untunable(adapter: Adapter, tasks: dict[str, Task]) -> list[str]:
    """Why blocks cannot be tuned as a whole, where a method wants that."""
    tuned = {name: task for name, task in tasks.items() if task.tune is not None}
    if not tuned:
        return []
    methods = "/".join(dict.fromkeys(task.method for task in tuned.values()))
    blocks = {task.ref.block for task in tuned.values()}
    problems = []
    runs = max(block.applications for block in adapter.blocks if block.index in blocks)
    if runs > 1:
        problems.append(
            f"{methods} learns from what a block gives, and this model runs one block {runs} times in a row; take "
            f"{AUTO_ALONE}"
        )
    if any(task.activations for task in tuned.values()):
        problems.append(f"{methods} cannot learn where linears round their inputs, too; take {AUTO_ALONE}")
    scaled = next((task.method for task in tasks.values() if task.scale is not None), None)
    if scaled is not None:
        problems.append(f"{scaled} scales inputs while {methods} keeps the block as it is; take one of them for all")
    return problems


def _aimless(tasks: dict[str, Task]) -> list[str]:
    """Why weights cannot aim at the source's outputs, where a method wants that."""
    aiming = next((task.method for task in tasks.values() if task.aim is not None), None)
    if aiming is None:
        return []
    problems = []
    if any(task.activations for task in tasks.values()):
        problems.append(f"{aiming} reads inputs that nothing has rounded; take {AUTO_ALONE}")
    scaled = next((task.method for task in tasks.values() if task.scale is not None), None)
    if scaled is not None:
        problems.append(f"{aiming} has to find inputs as they are while {scaled} scales them; take one of them for all")
    return problems


def unknown(adapter: Adapter, step: TargetedStep, methods: Collection[str]) -> list[str]:
    """Methods that do not exist, targets and overrides that match nothing."""
    problems = []
    for method in dict.fromkeys([step.method, *(o.method for o in step.overrides if o.method)]):
        if method not in methods:
            problems.append(f"method '{method}' is not one of {', '.join(methods)}")
    for target in dict.fromkeys([*step.targets, *(o.target for o in step.overrides)]):
        if not any(matches(target, ref.name, ref.role, ref.block) for ref in adapter.refs):
            hint = f"; roles are {', '.join(ROLES)}" if target not in ROLES else ""
            problems.append(f"target '{target}' matches no weight{hint}")
    return problems


def alone(step: StepT) -> StepT:
    """A step beside another on the same linears: `auto` takes what leaves the other's work as it is, at every width."""

    def method(given: str | None) -> Any:
        return AUTO_ALONE if given == "auto" else given

    overrides = tuple(replace(override, method=method(override.method)) for override in step.overrides)
    return replace(step, method=method(step.method), overrides=overrides)
