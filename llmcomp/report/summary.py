"""What a report says, put in rows and groups: the one place where before meets after. Views draw these."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from llmcomp.report.schema import Cost, Interval, LayerReport, Measured, Report, Size
from llmcomp.report.words import ABSENT, number, parameters, percent, ratio, seconds, signed, size, times

ROLES = ("attention", "mlp", "embeddings", "head")
PLAN_NAME = "prune_in_training.yaml"  # of a training that prunes, beside its model
DISTILL_NAME = "distill.yaml"  # likewise of a distillation
PARTS = (*ROLES, "other")

# name → (how a change is stated, whether a larger value is better)
_METRICS = {
    "perplexity": ("relative", False),
    "loss": ("relative", False),
    "accuracy": ("points", True),
    "f1": ("points", True),
    "precision": ("points", True),
    "recall": ("points", True),
    "exact_match": ("points", True),
    "pearson": ("difference", True),
    "spearman": ("difference", True),
    "overlap_at_10": ("points", True),
}
_MOST_SCHEMES = 3  # that one line of a table names
_NOISE = 0.02  # two runs of one model differ by about this much in time and memory
_TITLES = {"f1": "F1", "pearson": "Pearson", "spearman": "Spearman", "similarity_spearman": "similarity Spearman"}


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    `verdict` is 'better', 'worse' or 'same'; of a metric 'same' means that before lies in after's interval.
    """

    label: str
    before: str
    after: str
    change: str = ""
    verdict: str = "same"
    before_interval: str = ""
    after_interval: str = ""


@dataclass(frozen=True)
class Role:
    """What became of the linears of one role."""

    role: str
    layers: int
    schemes: str
    error_mean: float | None
    error_worst: float | None
    bytes_before: int
    bytes_after: int
    fallbacks: int


@dataclass(frozen=True)
class Group:
    """Modules that share a reason."""

    reason: str
    names: tuple[str, ...]
    bytes: int


def metric_title(name: str) -> str:
    return _TITLES.get(name, name.replace("_", " "))


def interval(name: str, value: Interval | None) -> tuple[str, str]:
    """(value, interval) of a metric as text; shares as percentages."""
    if value is None:
        return ABSENT, ""
    shown = percent if _METRICS.get(name, ("", True))[0] == "points" else number
    return shown(value.value), f"[{shown(value.low)}, {shown(value.high)}]"


def sizes(report: Report) -> tuple[Size | None, Size | None]:
    """Size before and after, from wherever the report has it."""
    before = report.size_before or (report.before.size if report.before else None)
    after = report.size_after or (report.after.size if report.after else None)
    return before, after


def comparison(report: Report) -> list[Row]:
    """Every measurement, before against after; only rows of which at least one side was measured."""
    rows = []
    before, after = sizes(report)
    if before or after:
        change = ratio(before.bytes_on_disk, after.bytes_on_disk) if before and after else ""
        verdict = "better" if "smaller" in change else "worse" if "larger" in change else "same"
        rows.append(Row("size on disk", _bytes(before), _bytes(after), change, verdict))
    rows += _quality_rows(report.before, report.after)
    rows += _divergence_rows(report)
    rows += _cost_rows(report.before, report.after)
    return rows


def quality_rows(report: Report) -> list[Row]:
    """The rows of `comparison` on quality alone."""
    return _quality_rows(report.before, report.after) + _divergence_rows(report)


def _bytes(value: Size | None) -> str:
    return ABSENT if value is None else size(value.bytes_on_disk)


def _quality_rows(before: Measured | None, after: Measured | None) -> list[Row]:
    old, new = _metrics(before), _metrics(after)
    rows = []
    for name in dict.fromkeys([*old, *new]):
        one, two = old.get(name), new.get(name)
        (value, span), (value_after, span_after) = interval(name, one), interval(name, two)
        change, verdict = _change(name, one, two)
        rows.append(Row(metric_title(name), value, value_after, change, verdict, span, span_after))
    return rows


@dataclass(frozen=True)
class RecoveryRow:
    """One metric of three models, and how much of what compression cost was won back."""

    label: str
    original: tuple[str, str]
    compressed: tuple[str, str]
    recovered: tuple[str, str]
    won_back: str


def recovery_rows(report: Report) -> list[RecoveryRow]:
    """Original, compressed and recovered; empty where there was no recovery or no original to measure."""
    found = report.recovery
    if found is None or found.original is None:
        return []
    rows = []
    sides = [_metrics(side) for side in (found.original, report.before, report.after)]
    for name in sides[0]:
        three = [interval(name, side.get(name)) for side in sides]
        share = found.won_back.get(name)
        rows.append(RecoveryRow(metric_title(name), three[0], three[1], three[2], _share(share)))
    old, new = found.divergence, report.divergence
    if old is not None and new is not None:
        for name, label, shown in (("kl_mean", "KL mean (nats)", "kl"), ("top1_agreement", "top-1 agreement", "f1")):
            one, two = (interval(shown, getattr(side, name)) for side in (old, new))
            rows.append(RecoveryRow(label, (ABSENT, ""), one, two, _share(found.won_back.get(name))))
    return rows


def recovery_lines(report: Report) -> list[str]:
    """What was trained, on what, for how long."""
    found = report.recovery
    if found is None:
        return []
    by = f", with {found.teacher} as teacher" if found.teacher else ""
    lines = [
        f"{found.kept}: {parameters(found.parameters)} parameters trained for {found.steps:,} steps{by}.",
        f"Trained on {found.data}.",
    ]
    losses = [one["loss"] for one in found.history if "loss" in one]
    if losses:
        lines.append(f"Loss {number(losses[0])} at the start, {number(losses[-1])} at the end.")
    if found.original is None:
        lines.append(f"The original, {found.model}, was not measured, so no share of what it cost is known.")
    return lines


def won_back(report: Report) -> dict[str, float]:
    """{metric: share of what compression cost that recovery won back}, of those that compression made worse beyond the
    interval of the compressed model's own value: a share of what may be chance says nothing."""
    found = report.recovery
    if found is None or found.original is None:
        return {}
    original, compressed, recovered = (_metrics(side) for side in (found.original, report.before, report.after))
    shares = {}
    for name in original.keys() & compressed.keys() & recovered.keys() & _METRICS.keys():
        was, became, now = original[name].value, compressed[name].value, recovered[name].value
        worse = (became < was) == _METRICS[name][1] and became != was
        if worse and not compressed[name].low <= was <= compressed[name].high:
            shares[name] = (became - now) / (became - was)
    if found.divergence is not None and report.divergence is not None:
        old, new = found.divergence, report.divergence
        if old.kl_mean.low > 0:
            shares["kl_mean"] = 1 - new.kl_mean.value / old.kl_mean.value
        if old.top1_agreement.high < 1:
            shares["top1_agreement"] = 1 - (1 - new.top1_agreement.value) / (1 - old.top1_agreement.value)
    return dict(sorted(shares.items()))


def _share(value: float | None) -> str:
    return "" if value is None else percent(value, 0) if value >= 0 else f"−{percent(-value, 0)}"


def _metrics(side: Measured | None) -> dict[str, Interval]:
    return side.quality.metrics if side and side.quality else {}


def _change(name: str, before: Interval | None, after: Interval | None) -> tuple[str, str]:
    if before is None or after is None:
        return "", "same"
    kind, larger_is_better = _METRICS.get(name, ("difference", True))
    delta = after.value - before.value
    if kind == "points":
        text = signed(delta, f"{abs(delta) * 100:.1f} points")
    elif kind == "relative" and before.value != 0:
        text = signed(delta, percent(abs(delta / before.value), 2))
    else:
        text = signed(delta, f"{abs(delta):.4f}")
    if name not in _METRICS or after.low <= before.value <= after.high:
        return text, "same"
    return text, "better" if (delta > 0) == larger_is_better else "worse"


def _divergence_rows(report: Report) -> list[Row]:
    found = report.divergence
    if found is None:
        return []
    mean, span = interval("kl", found.kl_mean)
    agree, agree_span = interval("accuracy", found.top1_agreement)
    return [
        Row("KL mean (nats)", ABSENT, mean, after_interval=span),
        Row("KL 99th percentile", ABSENT, number(found.kl_p99)),
        Row("top-1 agreement", ABSENT, agree, after_interval=agree_span),
    ]


def _cost_rows(before: Measured | None, after: Measured | None) -> list[Row]:
    rows = []
    if any(side and side.sparsity > 0 for side in (before, after)):
        rows.append(Row("zero weights", _sparsity(before), _sparsity(after)))
    old, new = before.cost if before else None, after.cost if after else None
    some = new or old
    if some is None:
        return rows
    faster, leaner = "", ""
    if old and new:
        overlapping = old.latency_low < new.latency_high and new.latency_low < old.latency_high
        alike = new.latency if overlapping else old.latency  # spans that overlap show no difference
        faster = times(alike, new.latency, "faster", "slower", _NOISE)
        leaner = times(old.peak_memory, new.peak_memory, "less", "more", _NOISE)
    rows.append(
        Row(
            f"latency {some.batch}×{some.sequence}",
            _latency(old),
            _latency(new),
            faster,
            _verdict(faster),
            _latency_span(old),
            _latency_span(new),
        )
    )
    rows.append(Row("peak memory", _memory(old), _memory(new), leaner, _verdict(leaner)))
    return rows


def _verdict(change: str) -> str:
    if change.endswith(("faster", "less")):
        return "better"
    return "worse" if change.endswith(("slower", "more")) else "same"


def _sparsity(side: Measured | None) -> str:
    return ABSENT if side is None else percent(side.sparsity)


def _memory(cost: Cost | None) -> str:
    return ABSENT if cost is None else size(cost.peak_memory)


def _latency(cost: Cost | None) -> str:
    return ABSENT if cost is None else seconds(cost.latency)


def _latency_span(cost: Cost | None) -> str:
    return "" if cost is None else f"[{seconds(cost.latency_low)}, {seconds(cost.latency_high)}]"


def roles(report: Report) -> list[Role]:
    """One summary per role, in the order attention, mlp, embeddings, head, then any other."""
    names = ordered(layer.role for layer in report.layers)
    return [_role(name, [layer for layer in report.layers if layer.role == name]) for name in names]


def _role(role: str, layers: list[LayerReport]) -> Role:
    errors = [layer.error for layer in layers if layer.error is not None]
    return Role(
        role,
        len(layers),
        ", ".join(_schemes(layers)),
        sum(errors) / len(errors) if errors else None,
        max(errors, default=None),
        sum(layer.bytes_before for layer in layers),
        sum(layer.bytes_after for layer in layers),
        sum(layer.fallback is not None for layer in layers),
    )


def _schemes(layers: list[LayerReport]) -> list[str]:
    """Each scheme once; of many that differ in their ranks or sparsities alone, how they begin, and the least and the
    largest of those."""
    found = dict.fromkeys(layer.scheme for layer in layers)
    if len(found) <= _MOST_SCHEMES:
        return list(found)
    spans: dict[tuple[str, str], list[float]] = {}
    for scheme in found:
        parts = re.fullmatch(r"(.*\brank |unstructured )([\d.]+)(?: \(\d+%\))?(.*)", scheme)
        ends, numbers = ((parts[1], parts[3]), [float(parts[2])]) if parts else ((scheme, ""), [])
        spans.setdefault(ends, []).extend(numbers)
    return [
        head + "–".join(f"{one:g}" for one in sorted({min(some, default=0), max(some, default=0)}) if some) + tail
        for (head, tail), some in spans.items()
    ]


def ordered(parts: Iterable[str]) -> list[str]:
    """Names of parts in the order of `PARTS`, unknown ones last."""
    given = set(parts)
    return [part for part in PARTS if part in given] + sorted(given.difference(PARTS))


def worst(report: Report, count: int = 10) -> list[LayerReport]:
    """The layers of largest error, largest first."""
    known = [layer for layer in report.layers if layer.error is not None]
    return sorted(known, key=lambda layer: -(layer.error or 0.0))[:count]


def fallbacks(report: Report) -> list[Group]:
    """Layers that got something other than was asked, by reason."""
    return _grouped((one.fallback, one.name, one.bytes_after) for one in report.layers if one.fallback)


def left(report: Report) -> list[Group]:
    """Modules left alone, by reason."""
    return _grouped((item.reason, item.name, item.bytes) for item in report.left)


def _grouped(items: Iterable[tuple[str | None, str, int]]) -> list[Group]:
    found: dict[str, list[tuple[str, int]]] = {}
    for reason, name, count in items:
        found.setdefault(str(reason), []).append((name, count))
    return [
        Group(reason, tuple(n for n, _ in members), sum(b for _, b in members))
        for reason, members in found.items()
    ]


def recipe_yaml(report: Report) -> str:
    """The recipe as YAML, tuples and all."""
    plain = json.loads(json.dumps(report.recipe))
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=False, allow_unicode=True, width=88)


def reproduce(report: Report) -> str:
    """The shell command that does this run again, given the recipe beside it as llmcomp_recipe.yaml."""
    if report.command == "evaluate":
        against = f" --against {shlex.quote(report.source)}" if report.before else ""
        return f"llmcomp evaluate {shlex.quote(report.output or report.model)}{against}"
    output = f" --output {shlex.quote(report.output)}" if report.output else ""
    if report.command == "recover":
        return f"llmcomp recover {shlex.quote(report.model)}{_flags(report.recipe)}{output}"
    if report.pruning is not None:
        return f"accelerate launch scripts/prune_in_training.py --config {PLAN_NAME}"
    if report.distillation is not None:
        script = "distill_lm" if report.task == "causal-lm" else "distill_bert"
        return f"accelerate launch scripts/{script}.py --config {DISTILL_NAME}"
    verb = "quantize" if report.command == "quantize" else "compress"  # which take any recipe
    return f"llmcomp {verb} {shlex.quote(report.model)} --recipe llmcomp_recipe.yaml{output}"


def _flags(settings: Mapping[str, Any]) -> str:
    """Settings by the names of their flags, as a command line."""
    said = ""
    for name, value in settings.items():
        flag = f" --{name.replace('_', '-')}"
        if isinstance(value, list | tuple):
            said += "".join(f"{flag} {shlex.quote(str(one))}" for one in value)
        elif value is True:
            said += flag
        elif value is not None and value is not False:
            said += f"{flag} {shlex.quote(str(value))}"
    return said
