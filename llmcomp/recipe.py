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

A *target* is a role (`attention`, `mlp`, `embeddings`, `head`), a block range (`blocks:0-1`), a regular
expression over the full module name (`re:.*down_proj$`), or the last part(s) of a module name (`down_proj`,
`self_attn.q_proj`). Of several overrides that match a linear, the later one wins.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmcomp.building import build
from llmcomp.errors import BadRecipe
from llmcomp.patterns import Pattern
from llmcomp.schemes import Scheme

ROLES = ("attention", "mlp", "embeddings", "head")

# Formats that are a grid of their own, and what their step then says: there is nothing to choose.
FIXED: dict[str, dict[str, Any]] = {
    "bnb-nf4": {"method": "bitsandbytes", "bits": 4, "group_size": 64},
    "bnb-int8": {"method": "bitsandbytes", "bits": 8, "group_size": "channel"},
}


@dataclass(frozen=True)
class Override:
    """What differs for the linears that `target` matches; None keeps the step's own value."""

    target: str
    bits: int | None = None
    group_size: int | str | None = None
    symmetric: bool | None = None
    pattern: str | None = None
    sparsity: float | None = None
    method: str | None = None
    skip: bool = False


@dataclass(frozen=True)
class QuantizeStep:
    """Weight-only quantization of the linears that `targets` match.

    Attributes:
        method: a name in `llmcomp.methods.METHODS`, 'auto' for what its table takes at each width, or 'bitsandbytes'
            for its formats (`FIXED`).
        bits: 2, 3, 4 or 8.
        group_size: weights that share a scale, or 'channel', or None for the default: 128 where the width
            allows it, else the largest of 64 and 32 that divides it, else per channel (the report counts it).
        symmetric: no zero points.
        activations: lets each linear round its inputs to 8 bits; the weights then have 8 bits per channel.
            'int8-dynamic': token by token; 'int8-static': by one scale for all, found in calibration, after loud
            channels were scaled down where something before the linear can take that over.
        options: the method's own settings, such as {damping: 0.01}; unknown ones are errors.
    """

    method: str = "gptq"
    bits: int = 4
    group_size: int | str | None = None
    symmetric: bool = True
    activations: str | None = None
    targets: tuple[str, ...] = ("attention", "mlp")
    overrides: tuple[Override, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    kind = "quantize"

    @property
    def summary(self) -> str:
        """Such as 'gptq-w4', for names of directories."""
        return f"{self.method}-w{self.bits}" + ("" if self.activations is None else "a8")


@dataclass(frozen=True)
class SparsifyStep:
    """Weights set to zero in the linears that `targets` match.

    Attributes:
        method: a name in `llmcomp.methods.SPARSE`.
        pattern: '2:4', '4:8', any 'N:M' (N of every M consecutive inputs are kept), or 'unstructured'.
        sparsity: share that an unstructured pattern removes; a half where none is given.
        options: the method's own settings.
    """

    method: str = "sparsegpt"
    pattern: str = "2:4"
    sparsity: float | None = None
    targets: tuple[str, ...] = ("attention", "mlp")
    overrides: tuple[Override, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    kind = "sparsify"

    @property
    def summary(self) -> str:
        """Such as 'sparsegpt-2of4', for names of directories."""
        pattern = pattern_for(self, None)
        share = f"{100 * pattern.sparsity:.4g}%" if pattern.of is None else f"{pattern.kept}of{pattern.of}"
        return f"{self.method}-{share.replace('%', 'pct')}"


Step = QuantizeStep | SparsifyStep
STEPS: dict[str, type[Step]] = {"quantize": QuantizeStep, "sparsify": SparsifyStep}
ORDERS = (("quantize",), ("sparsify",), ("sparsify", "quantize"))  # of steps that go together


@dataclass(frozen=True)
class Calibration:
    """Which text, and how much. `source` is 'default', 'sample', a file or a Hub dataset `name[:config]`."""

    source: str = "default"
    samples: int = 128
    sequence_length: int = 512
    text_column: str | None = None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without numbers to the base of 60, by which an unquoted `pattern: 2:4` would be 124."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in some if tag != "tag:yaml.org,2002:int"]
    for first, some in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))


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

    def to_yaml(self) -> str:
        data = _plain(self)
        data["steps"] = [{"kind": step.kind, **_plain(step)} for step in self.steps]
        return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> Recipe:
        """Parse YAML; every unknown key is an error that names the nearest known one.

        Raises:
            BadRecipe: not YAML, not a mapping, unknown keys or impossible values.
        """
        try:
            data = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise BadRecipe(f"{where} is not YAML ({str(error).splitlines()[0]}).") from error
        if not isinstance(data, dict):
            raise BadRecipe(f"{where} must be a mapping with 'steps', not {type(data).__name__}.")
        data = dict(data)
        if "calibration" in data:
            data["calibration"] = build(Calibration, data["calibration"], f"{where}: calibration")
        if "steps" in data:
            if not isinstance(data["steps"], list) or not data["steps"]:
                raise BadRecipe(f"{where}: 'steps' must be a non-empty list.")
            fixed = FIXED.get(str(data.get("format")), {})
            data["steps"] = tuple(_step(s, f"{where}: step {n}", fixed) for n, s in enumerate(data["steps"]))
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
    for step in recipe.steps:
        for target in (*step.targets, *(override.target for override in step.overrides)):
            _check_target(target)
        for override in (None, *step.overrides):
            if isinstance(step, SparsifyStep):
                pattern_for(step, override)
            else:
                scheme_for(step, override, 128)
            _check_override(step, override)
        if recipe.format not in FIXED:
            continue
        if isinstance(step, SparsifyStep):
            raise BadRecipe(f"--format {recipe.format} rounds by itself and keeps no zeros; take --format dense.")
        _check_fixed(step, recipe.format)
    if recipe.format in FIXED and recipe.calibration != Calibration():
        raise BadRecipe(f"--format {recipe.format} reads no text; leave the calibration settings out.")
    if recipe.calibration.samples < 1 or recipe.calibration.sequence_length < 2:
        raise BadRecipe(
            f"Calibration needs at least 1 sample of 2 tokens, got {recipe.calibration.samples} of "
            f"{recipe.calibration.sequence_length}."
        )


def _check_override(step: Step, override: Override | None) -> None:
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


def matches(target: str, name: str, role: str, block: int | None) -> bool:
    """Whether `target` (grammar above) means the module `name` of `role` in block number `block`."""
    if target in ROLES:
        return role == target
    if span := re.fullmatch(r"blocks:(\d+)(?:-(\d+))?", target):
        first, last = int(span[1]), int(span[2] or span[1])
        return block is not None and first <= block <= last
    if target.startswith("re:"):
        return re.search(target[3:], name) is not None
    return name == target or name.endswith("." + target)


def default_bits(activations: str | None) -> int:
    """Of weights, where none are asked for."""
    return QuantizeStep.bits if activations is None else 8


def override_for(step: Step, name: str, role: str, block: int | None) -> Override | None:
    """The last override of `step` that matches, or None."""
    found = None
    for override in step.overrides:
        if matches(override.target, name, role, block):
            found = override
    return found


def scheme_for(step: QuantizeStep, override: Override | None, in_features: int) -> Scheme:
    """The scheme of one linear, with the default group size's fallback applied.

    An explicit group size that does not divide `in_features` is returned as it is: the caller decides.
    """
    def pick(name: str) -> Any:
        value = getattr(override, name, None)
        return getattr(step, name) if value is None else value

    size = pick("group_size")
    if size is None and step.activations is not None:
        size = "channel"
    if size is None:
        size = next((g for g in (128, 64, 32) if in_features % g == 0), "channel")
    if isinstance(size, str) and size != "channel" and not size.isdigit():
        raise BadRecipe(f"--group-size {size} cannot be: choose one of 32, 64, 128 or 'channel'.")
    return Scheme(pick("bits"), None if size == "channel" else int(size), pick("symmetric"), step.activations)


def pattern_for(step: SparsifyStep, override: Override | None) -> Pattern:
    """The pattern of one linear.

    Raises:
        BadRecipe: no such pattern, or a sparsity that contradicts it.
    """
    if override is None or (override.pattern is None and override.sparsity is None):
        return Pattern.parse(step.pattern, step.sparsity)
    if override.pattern is not None:  # a share goes with its own pattern
        return Pattern.parse(override.pattern, override.sparsity)
    return Pattern.parse(step.pattern, override.sparsity)


def _step(data: Any, where: str, fixed: dict[str, Any]) -> Step:
    """A step from its mapping; `fixed` are the defaults of the recipe's format."""
    if not isinstance(data, dict) or str(data.get("kind")) not in STEPS:
        raise BadRecipe(f"{where} needs 'kind', one of {', '.join(STEPS)}; got {data!r}.")
    kind = STEPS[str(data["kind"])]
    data = {**(fixed if kind is QuantizeStep else {}), **data}
    del data["kind"]
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
