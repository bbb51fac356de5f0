"""The steps of a recipe, and what each of them means for one linear.

A *target* is a role (`attention`, `mlp`, `embeddings`, `head`), a block range (`blocks:0-1`), a regular
expression over the full module name (`re:.*down_proj$`), or the last part(s) of a module name (`down_proj`,
`self_attn.q_proj`). Of several overrides that match a linear, the later one wins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from llmcomp.errors import BadRecipe
from llmcomp.kinds import check_ratio
from llmcomp.patterns import Pattern
from llmcomp.schemes import Scheme

ROLES = ("attention", "mlp", "embeddings", "head")


@dataclass(frozen=True)
class Override:
    """What differs for the linears that `target` matches; None keeps the step's own value."""

    target: str
    bits: int | None = None
    group_size: int | str | None = None
    symmetric: bool | None = None
    pattern: str | None = None
    sparsity: float | None = None
    ratio: float | None = None
    rank: int | None = None
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
        allocate: that share is of all matrices together: more is removed where it costs less, which a pass over the
            source model measures beforehand. Else it is of each.
        update: what is left aims at the source's outputs on what the compressed blocks before it give, instead of at
            its own. The source's activations then go through the model, too.
        options: the method's own settings.
    """

    method: str = "sparsegpt"
    pattern: str = "2:4"
    sparsity: float | None = None
    targets: tuple[str, ...] = ("attention", "mlp")
    overrides: tuple[Override, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    allocate: bool = False
    update: bool = False

    kind = "sparsify"

    @property
    def summary(self) -> str:
        """Such as 'sparsegpt-2of4', for names of directories."""
        pattern = pattern_for(self, None)
        share = f"{100 * pattern.sparsity:.4g}pct" if pattern.of is None else f"{pattern.kept}of{pattern.of}"
        return f"{self.method}-{share}" + ("-allocated" if self.allocate else "") + ("-updated" if self.update else "")


@dataclass(frozen=True)
class FactorizeStep:
    """Two thin factors in the place of each matrix that `targets` match. Behind a step to quantize the integers stay,
    and the factors, in 8 bits, correct what rounding has lost.

    Attributes:
        method: a name in `llmcomp.methods.LOW_RANK`.
        ratio: share of the bytes of the targeted matrices that is kept; 0.8 where neither it nor a rank is given.
        rank: of every matrix, instead of a ratio. A correction has nothing else.
        ranks: 'uniform', the ratio holds for each matrix, or 'balanced', for all of them together: ranks go where they
            take most off the loss, which a pass over the source model measures beforehand.
        update: fit a factor anew to what the compressed blocks before it give; None: after 'svd-llm', which is made
            for it.
        options: the method's own settings; of a correction those of `llmcomp.methods.factors.CorrectionConfig`.
    """

    method: str = "svd-llm"
    ratio: float | None = None
    rank: int | None = None
    ranks: str = "uniform"
    update: bool | None = None
    targets: tuple[str, ...] = ("attention", "mlp")
    overrides: tuple[Override, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    kind = "factorize"

    @property
    def updates(self) -> bool:
        """Whether a factor is fitted anew."""
        return self.method == "svd-llm" if self.update is None else self.update

    @property
    def amount(self) -> str:
        """Such as 'ratio 0.8', 'ratio 0.8 balanced' or 'rank 64'."""
        if self.rank is not None:
            return f"rank {self.rank}"
        balanced = " balanced" if self.ranks == "balanced" else ""
        return f"ratio {DEFAULT_RATIO if self.ratio is None else self.ratio:g}{balanced}"

    @property
    def summary(self) -> str:
        """Such as 'svd-llm-ratio-0.8', for names of directories."""
        return f"{self.method}-{self.amount.replace(' ', '-')}"


@dataclass(frozen=True)
class PruneStep:
    """A smaller model of the same kind: attention heads, neurons of MLPs and whole blocks go, the same number of heads
    and neurons from every block, so it has no targets. Further steps are done to what is left.

    Attributes:
        method: 'activation', what costs least of what calibration reads, made up for by what stays; 'taylor', what
            changes the loss least to first order, made up for likewise; or 'magnitude', the smallest weights, without
            calibration.
        heads: share of the attention heads that go, in whole groups that share keys and values.
        mlp: share of the neurons that go. layers: how many blocks go.
        options: of methods that calibrate, those of `llmcomp.methods.structured.PruneConfig`.
    """

    method: str = "activation"
    heads: float | None = None
    mlp: float | None = None
    layers: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    kind = "prune"

    @property
    def amount(self) -> str:
        """Such as 'heads 0.25 mlp 0.3 layers 4'."""
        asked = {"heads": self.heads, "mlp": self.mlp, "layers": self.layers}
        return " ".join(f"{name} {value:g}" for name, value in asked.items() if value is not None)

    @property
    def summary(self) -> str:
        """Such as 'pruned-mlp-0.3', for names of directories."""
        method = "" if self.method == PruneStep.method else f"{self.method}-"
        return f"{method}pruned-{self.amount.replace(' ', '-')}"


DEFAULT_RATIO = 0.8

TargetedStep = QuantizeStep | SparsifyStep | FactorizeStep
Step = TargetedStep | PruneStep
STEPS: dict[str, type[Step]] = {
    "prune": PruneStep, "quantize": QuantizeStep, "sparsify": SparsifyStep, "factorize": FactorizeStep,
}  # fmt: skip
_TARGETED: tuple[tuple[str, ...], ...] = (
    ("quantize",),
    ("sparsify",),
    ("sparsify", "quantize"),
    ("factorize",),
    ("factorize", "quantize"),
    ("quantize", "factorize"),
)
ORDERS = (*_TARGETED, ("prune",), *(("prune", *order) for order in _TARGETED))  # of steps that go together


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


def override_for(step: TargetedStep, name: str, role: str, block: int | None) -> Override | None:
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


def size_for(step: FactorizeStep, override: Override | None) -> tuple[float | None, int | None]:
    """(ratio, rank) of one linear, of which one is None.

    Raises:
        BadRecipe: both, or one that cannot be.
    """
    said = step if override is None or (override.ratio is None and override.rank is None) else override
    if said.ratio is not None and said.rank is not None:
        raise BadRecipe(f"--ratio {said.ratio:g} and --rank {said.rank} say the same thing; give one of them.")
    if said.rank is not None:
        if said.rank < 1:
            raise BadRecipe(f"--rank {said.rank} cannot be: a rank is at least 1.")
        return None, said.rank
    ratio = DEFAULT_RATIO if said.ratio is None else said.ratio
    check_ratio(ratio)
    return ratio, None
