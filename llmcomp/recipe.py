"""A recipe: the ordered steps of a run, as dataclasses; YAML in and out. Every CLI flag is sugar for one.

    seed: 0
    calibration: {source: default, samples: 128, sequence_length: 512}
    steps:
    - kind: quantize
      method: gptq
      bits: 4
      group_size: 128          # a number, or 'channel'
      symmetric: true
      targets: [attention, mlp]
      overrides:
      - {target: down_proj, bits: 8}
      - {target: 'blocks:0-1', skip: true}

The steps themselves, and what a target is: `llmcomp.steps`.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcomp.building import build, read_yaml, write_yaml
from llmcomp.errors import BadRecipe
from llmcomp.patterns import Pattern
from llmcomp.steps import (
    ORDERS,
    ROLES,
    STEPS,
    FactorizeStep,
    Override,
    PruneStep,
    QuantizeStep,
    SparsifyStep,
    Step,
    TargetedStep,
    default_bits,
    matches,
    override_for,
    pattern_for,
    scheme_for,
    size_for,
)

__all__ = [  # with what a recipe is made of
    "FIXED",
    "ROLES",
    "STEPS",
    "Calibration",
    "FactorizeStep",
    "Override",
    "PruneStep",
    "QuantizeStep",
    "Recipe",
    "SparsifyStep",
    "Step",
    "TargetedStep",
    "check",
    "default_bits",
    "matches",
    "override_for",
    "pattern_for",
    "scheme_for",
    "size_for",
    "step_of",
]

# Formats that are a grid of their own, and what their step then says: there is nothing to choose.
FIXED: dict[str, dict[str, Any]] = {
    "bnb-nf4": {"method": "bitsandbytes", "bits": 4, "group_size": 64},
    "bnb-int8": {"method": "bitsandbytes", "bits": 8, "group_size": "channel"},
}


@dataclass(frozen=True)
class Calibration:
    """Which text, and how much. `source` is 'default', 'sample', a file or a Hub dataset `name[:config]`."""

    source: str = "default"
    samples: int = 128
    sequence_length: int = 512
    text_column: str | None = None


@dataclass(frozen=True)
class Recipe:
    """The whole run but for model and output."""

    steps: tuple[Step, ...] = (QuantizeStep(),)
    calibration: Calibration = Calibration()
    seed: int = 0
    format: str = "compressed-tensors"

    @property
    def quantizing(self) -> QuantizeStep | None:
        """The step that quantizes, if there is one."""
        return next((step for step in self.steps if isinstance(step, QuantizeStep)), None)

    @property
    def sparsifying(self) -> SparsifyStep | None:
        """The step that removes weights, if there is one."""
        return next((step for step in self.steps if isinstance(step, SparsifyStep)), None)

    @property
    def factorizing(self) -> FactorizeStep | None:
        """The step that makes factors, if there is one."""
        return next((step for step in self.steps if isinstance(step, FactorizeStep)), None)

    @property
    def pruning(self) -> PruneStep | None:
        """The step that makes a smaller model, if there is one."""
        return next((step for step in self.steps if isinstance(step, PruneStep)), None)

    @property
    def targeted(self) -> tuple[TargetedStep, ...]:
        """The steps that do something to single weights, of what is left where the first one prunes."""
        return tuple(step for step in self.steps if not isinstance(step, PruneStep))

    @property
    def correcting(self) -> bool:
        """Whether its factors correct what a step to quantize has lost."""
        return len(self.targeted) > 1 and isinstance(self.targeted[1], FactorizeStep)

    def to_yaml(self) -> str:
        data = _plain(self)
        data["steps"] = [{"kind": step.kind, **_plain(step)} for step in self.steps]
        return write_yaml(data)

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> Recipe:
        """Parse YAML; every unknown key is an error that names the nearest known one.

        Raises:
            BadRecipe: not YAML, not a mapping, unknown keys or impossible values.
        """
        data = read_yaml(text, where, " with 'steps'")
        if "calibration" in data:
            data["calibration"] = build(Calibration, data["calibration"], f"{where}: calibration")
        if "steps" in data:
            if not isinstance(data["steps"], list) or not data["steps"]:
                raise BadRecipe(f"{where}: 'steps' must be a non-empty list.")
            fixed = FIXED.get(str(data.get("format")), {})
            data["steps"] = tuple(_step(s, f"{where}: step {n}", fixed) for n, s in enumerate(data["steps"]))
            if any(isinstance(step, FactorizeStep) for step in data["steps"]):
                data.setdefault("format", "llmcomp")  # no other one holds factors
            if not any(isinstance(step, QuantizeStep) for step in data["steps"]):
                data.setdefault("format", "dense")  # there is nothing to pack
        return build(cls, data, where)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file.

        Raises:
            BadRecipe: unreadable file or content that is no recipe.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadRecipe(f"Recipe {path} cannot be read: {error}.") from error
        return cls.from_yaml(text, str(path))


def check(recipe: Recipe) -> None:
    """Refuse at once what no model could make right; the rest is checked against the model.

    Raises:
        BadRecipe: bits, group sizes or amounts that cannot be.
    """
    if tuple(step.kind for step in recipe.steps) not in ORDERS:
        known = "; ".join(", ".join(order) for order in ORDERS)
        said = ", ".join(step.kind for step in recipe.steps)
        raise BadRecipe(f"The steps {said} do not go together; what does: {known}.")
    if recipe.pruning is not None:
        _check_pruning(recipe, recipe.pruning)
    for step in recipe.targeted:
        for target in (*step.targets, *(override.target for override in step.overrides)):
            _check_target(target)
        for override in (None, *step.overrides):
            _check_amount(step, override)
            _check_override(step, override)
        if isinstance(step, FactorizeStep):
            _check_factors(recipe, step)
        if isinstance(step, SparsifyStep) and step.allocate:
            _check_shared(pattern_for(step, None))
        if isinstance(step, SparsifyStep) and step.update and "magnitude" in _methods(step):
            raise BadRecipe("--update fits weights to calibration, and magnitude reads none; take another --method.")
        if recipe.format not in FIXED:
            continue
        if isinstance(step, SparsifyStep):
            raise BadRecipe(f"--format {recipe.format} rounds by itself and keeps no zeros; take --format dense.")
        if isinstance(step, FactorizeStep):
            raise BadRecipe(f"--format {recipe.format} has no form for factors; take --format llmcomp.")
        _check_fixed(step, recipe.format)
    if recipe.format in FIXED and recipe.calibration != Calibration():
        raise BadRecipe(f"--format {recipe.format} reads no text; leave the calibration settings out.")
    if recipe.calibration.samples < 1 or recipe.calibration.sequence_length < 2:
        raise BadRecipe(
            f"Calibration needs at least 1 sample of 2 tokens, got {recipe.calibration.samples} of "
            f"{recipe.calibration.sequence_length}."
        )


def _methods(step: TargetedStep) -> list[str | None]:
    return [step.method, *(override.method for override in step.overrides)]


def _check_pruning(recipe: Recipe, step: PruneStep) -> None:
    """Refuse what no model could make right in a step that prunes.

    Raises:
        BadRecipe: naming it.
    """
    if step.method not in ("activation", "taylor", "magnitude"):
        raise BadRecipe(f"--method {step.method} cannot prune: choose activation, taylor or magnitude.")
    if step.heads is None and step.mlp is None and step.layers is None:
        raise BadRecipe("Nothing is to be pruned: give --heads 0.25, --mlp 0.3, --layers 2 or several of them.")
    for name in ("heads", "mlp"):
        share = getattr(step, name)
        if share is not None and not 0 < share < 1:
            raise BadRecipe(f"--{name} {share:g} cannot be: it is the share that goes, above 0 and below 1, as 0.25.")
    if step.layers is not None and step.layers < 1:
        raise BadRecipe(f"--layers {step.layers} cannot be: it is how many blocks go, at least 1.")
    if step.options and step.method == "magnitude":
        raise BadRecipe(f"Method magnitude has no options, got {', '.join(step.options)}; leave them out.")
    if recipe.format in FIXED:
        raise BadRecipe(
            f"--format {recipe.format} is made of a whole checkpoint by transformers; run llmcomp prune first, then "
            f"llmcomp quantize --format {recipe.format} on its output."
        )
    if not recipe.targeted and recipe.format != "dense":
        raise BadRecipe(f"Pruning alone gives an ordinary model; take --format dense instead of {recipe.format}.")


def _check_amount(step: TargetedStep, override: Override | None) -> None:
    if isinstance(step, SparsifyStep):
        pattern_for(step, override)
    elif isinstance(step, FactorizeStep):
        size_for(step, override)
    else:
        scheme_for(step, override, 128)


def _check_shared(pattern: Pattern) -> None:
    """Raises BadRecipe where there is nothing to share out between matrices."""
    if pattern.of is not None:
        raise BadRecipe(
            f"--allocate shares out what an unstructured pattern removes, and {pattern.label} removes one share of "
            "every weight; take --pattern unstructured, or leave --allocate out."
        )
    if not 0.01 <= pattern.sparsity <= 0.99:
        raise BadRecipe(
            f"--sparsity {pattern.sparsity:g} leaves --allocate nothing to share out; take 0.01 to 0.99, or leave "
            "--allocate out."
        )


def _check_factors(recipe: Recipe, step: FactorizeStep) -> None:
    """Refuse what contradicts itself in a step that makes factors.

    Raises:
        BadRecipe: naming it.
    """
    if step.ranks not in ("uniform", "balanced"):
        raise BadRecipe(f"--ranks {step.ranks} cannot be: choose uniform or balanced.")
    if not recipe.correcting:
        if step.ranks == "balanced" and step.rank is not None:
            raise BadRecipe("--ranks balanced shares out what --ratio keeps; leave --rank out.")
        return
    if step.ranks == "balanced" or step.update:
        said = "ranks: balanced" if step.ranks == "balanced" else "update: true"
        raise BadRecipe(f"Factors that correct integers have one rank and are not updated; leave '{said}' out.")
    if {step.method, *(one.method for one in step.overrides)} - {"svd-llm", None}:
        raise BadRecipe("Factors that correct integers are those of svd-llm; leave the method out.")
    if step.rank is None or any(override.ratio is not None for override in step.overrides):
        raise BadRecipe("Factors that correct integers come on top of them, so there is no ratio; give a rank, as 16.")


def _check_override(step: TargetedStep, override: Override | None) -> None:
    """Refuse what an override says of another kind of step.

    Raises:
        BadRecipe: naming it.
    """
    mine = {f.name for f in dataclasses.fields(step)}
    for f in dataclasses.fields(Override):
        if f.name in ("target", "skip") or f.name in mine:
            continue
        if override is not None and getattr(override, f.name) != f.default:
            raise BadRecipe(f"The override of {override.target} sets {f.name}, which is not of a step to {step.kind}.")


def step_of(format: str, **given: Any) -> QuantizeStep:
    """A step from what was given, the rest as the format fixes it or by default."""
    usual = {"bits": default_bits(given.get("activations"))}
    return QuantizeStep(**{**usual, **FIXED.get(format, {}), **given})


def _check_fixed(step: QuantizeStep, format: str) -> None:
    """Refuse what contradicts a format of `FIXED`.

    Raises:
        BadRecipe: naming what was given and what the format is.
    """
    wanted = {**FIXED[format], "symmetric": True, "activations": None}
    for name, value in wanted.items():
        if getattr(step, name) not in (value, None):
            flag = "--asymmetric" if name == "symmetric" else f"{name} {getattr(step, name)}"
            raise BadRecipe(
                f"{flag} contradicts --format {format}, which is {wanted['bits']} bits, group_size "
                f"{wanted['group_size']}, by bitsandbytes itself; leave it out, or choose another --format."
            )
    for override in step.overrides:
        if any(getattr(override, name, None) not in (None, value) for name, value in wanted.items()):
            raise BadRecipe(
                f"The override of {override.target} contradicts --format {format}, which is one grid for all "
                "weights; it can only skip some, by --skip or 'skip: true'."
            )
    if step.options:
        raise BadRecipe(f"--format {format} has no options, got {', '.join(step.options)}; leave them out.")


def _check_target(target: str) -> None:
    if target.startswith("re:"):
        try:
            re.compile(target[3:])
        except re.error as error:
            raise BadRecipe(f"Target '{target}' is no regular expression: {error}.") from error


def _step(data: Any, where: str, fixed: dict[str, Any]) -> Step:
    """A step from its mapping; `fixed` are the defaults of the recipe's format."""
    if not isinstance(data, dict) or str(data.get("kind")) not in STEPS:
        raise BadRecipe(f"{where} needs 'kind', one of {', '.join(STEPS)}; got {data!r}.")
    kind = STEPS[str(data["kind"])]
    data = {**(fixed if kind is QuantizeStep else {}), **data}
    del data["kind"]
    if issubclass(kind, PruneStep):
        return build(kind, data, where)
    overrides = data.get("overrides", [])
    if not isinstance(overrides, list):
        raise BadRecipe(f"{where}: 'overrides' must be a list.")
    data["overrides"] = tuple(build(Override, o, f"{where}: override {n}") for n, o in enumerate(overrides))
    targets = data.get("targets", list(kind().targets))
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise BadRecipe(f"{where}: 'targets' must be a list such as [attention, mlp], got {targets!r}.")
    data["targets"] = tuple(targets)
    return build(kind, data, where)


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as the dicts and lists that YAML writes; defaults of overrides left out."""
    if isinstance(value, Override):
        # Compared with the default, not with truth: `symmetric: false` says something.
        return {f.name: v for f in dataclasses.fields(value) if (v := getattr(value, f.name)) != f.default}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
