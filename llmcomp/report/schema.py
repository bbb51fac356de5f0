"""report.json as dataclasses: the single truth of a run. Table, HTML page and card are views of it.

Sizes are bytes, times seconds, memory bytes; names end in the unit where it is another.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcomp.errors import BadCheckpoint

SCHEMA_VERSION = 1
FILE_NAME = "llmcomp_report.json"


@dataclass
class LayerReport:
    """One linear (or embedding): what was done to it and what that cost.

    Attributes:
        name: full module name.
        block: index of its block, None outside of the blocks.
        role: attention, mlp, embeddings or head.
        shape: [out, in].
        scheme: such as 'int4 g128', or 'dense' where it was left.
        method: the method that produced it.
        error: ||X(W - Q)'||² / ||XW'||², from the Gram matrix; None where there was none.
        damping: share of the mean diagonal that was added before factorizing, None where nothing was.
        fallback: why something other than the asked was done, else None.
        bytes_before, bytes_after: of this weight with its scales and zero points.
        seconds: time the method took (shared among linears solved together).
        dead_columns: input channels that calibration never saw active.
        block_error_start, block_error: ||Y - Y'||² / ||Y||² of its block's output over all calibration windows, before
            and after the block's weights were tuned together; None where they were not.
        scaling: by how much its inputs are scaled and what takes that over, or why they are not; None where no
            scaling was asked for.
    """

    name: str
    block: int | None
    role: str
    shape: tuple[int, int]
    scheme: str
    method: str
    bytes_before: int
    bytes_after: int
    error: float | None = None
    damping: float | None = None
    fallback: str | None = None
    seconds: float = 0.0
    dead_columns: int = 0
    scaling: str | None = None
    block_error_start: float | None = None
    block_error: float | None = None


@dataclass
class Left:
    """A linear that was not compressed, or not stored compressed, and why."""

    name: str
    reason: str
    bytes: int


@dataclass
class Removed:
    """What pruning took out of one place.

    Attributes:
        name: of the output projection that read the units, or of the block, in the source.
        what: 'neuron', 'head', 'group of heads' (that share keys and values) or 'block'.
        of, count: how many there were, how many are gone.
        which: their numbers, of heads and blocks.
        score: of a block its influence (1 - cos of what it reads and gives; by magnitude, the sum of squared weights);
            else ||X(W - W')'||² / ||XW'||² of the output projection, None without calibration.
    """

    name: str
    what: str
    of: int
    count: int
    which: list[int]
    score: float | None = None


@dataclass
class Size:
    """Where the bytes are. `parts`: bytes by role (attention, mlp, embeddings, head, other)."""

    parameters: int
    bytes_on_disk: int
    parts: dict[str, int] = field(default_factory=dict)


@dataclass
class Interval:
    """An estimate with its bootstrap 95% interval (over windows or rows)."""

    value: float
    low: float
    high: float


@dataclass
class Quality:
    """One model on one evaluation set.

    Attributes:
        metrics: name → estimate, such as perplexity, accuracy, f1, pearson, spearman.
        samples: windows, rows or pairs; tokens: scored tokens (0 for rows and pairs).
        data: what was measured on, in words, with window length and stride where they apply.
    """

    metrics: dict[str, Interval]
    samples: int
    tokens: int
    data: str


@dataclass
class Divergence:
    """Compressed against original on the same inputs; KL in nats, original first."""

    kl_mean: Interval
    kl_p99: float
    top1_agreement: Interval
    positions: int


@dataclass
class Cost:
    """What running it costs here: median seconds of one forward, its shape, peak resident bytes over the load."""

    latency: float
    latency_low: float
    latency_high: float
    batch: int
    sequence: int
    peak_memory: int
    threads: int


@dataclass
class Measured:
    """Everything measured of one model."""

    size: Size
    sparsity: float
    quality: Quality | None = None
    cost: Cost | None = None


@dataclass
class Verification:
    """The reload in a fresh process. `checks`: what was compared, in words. `streamed`: model did not fit."""

    passed: bool
    checks: list[str]
    max_logit_difference: float | None
    modules_compressed: int
    streamed: bool = False


@dataclass
class Recovery:
    """A training of what had been compressed; the report's `before` is the compressed model, `after` the recovered one.

    Attributes:
        method: 'full', 'lora' or 'qat'; kept: in words what became of what was trained.
        model: the name of the model that had been compressed; source: its directory, None where it is gone.
        data: in words what was trained on; teacher: whose logits were learned from, too.
        parameters: how many numbers were trained. steps: optimizer steps; resumed: those of a run that was killed.
        history: by 'step' the 'loss' and, where some data were held out, the 'eval_loss'.
        original: measured on the same data as before and after; divergence: of the compressed model from it.
        won_back: metric → share of what compression had cost that is there again; 1 is all of it.
    """

    method: str
    kept: str
    model: str
    source: str | None
    data: str
    teacher: str | None
    parameters: int
    steps: int
    resumed: int
    history: list[dict[str, float]]
    original: Measured | None = None
    divergence: Divergence | None = None
    won_back: dict[str, float] = field(default_factory=dict)


@dataclass
class Pruning:
    """A training that removed weights on its way; the report's `before` is the model that it started from.

    Attributes:
        method: how weights were chosen. removed: of the weights under masks, the share that is removed.
        data: in words what was trained on; teacher: whose logits were learned from, too.
        parameters: how many numbers were trained. steps: optimizer steps, of all rounds; resumed: those of a run that
            was killed. rounds: trainings, more than one of a lottery ticket.
        history: by 'step' the 'loss' and, where some data were held out, the 'eval_loss'; by 'round', too, of several.
    """

    method: str
    removed: float
    data: str
    teacher: str | None
    parameters: int
    steps: int
    resumed: int
    rounds: int
    history: list[dict[str, float]]


@dataclass
class Distillation:
    """A training of a smaller model by a larger one; the report's `before` is the teacher, `after` the student.

    Attributes:
        method: such as 'distilbert'. losses: name → how much it counts.
        student: in words what it started from. teachers: whose outputs it learned from.
        data: in words what was trained on. parameters: how many numbers the student has, teacher_parameters the first
            teacher. steps: optimizer steps; resumed: those of a run that was killed.
        history: by 'step' the 'loss' and, where some data were held out, the 'eval_loss'.
        baseline: the same student trained as long on the same data without a teacher, None where it was not asked for.
        baseline_divergence: of that from the teacher. baseline_history: as history.
    """

    method: str
    losses: dict[str, float]
    student: str
    teachers: list[str]
    data: str
    parameters: int
    teacher_parameters: int
    steps: int
    resumed: int
    history: list[dict[str, float]]
    baseline: Measured | None = None
    baseline_divergence: Divergence | None = None
    baseline_history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Origin:
    """The model that was compressed, as its files and its card name it.

    Attributes:
        repo: id on the Hub; commit: which of its commits was read. None for what does not come from there.
        license: by the Hub's name for it; license_name, license_link: of one that it has no name for ('other').
        languages: codes. pipeline_tag: the Hub's word for what it does.
    """

    repo: str | None = None
    commit: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: list[str] = field(default_factory=list)
    pipeline_tag: str | None = None


@dataclass
class Machine:
    cpu: str
    threads: int
    memory: int
    device: str
    versions: dict[str, str]


@dataclass
class Report:
    """One run.

    Attributes:
        command: the verb, such as 'quantize' or 'evaluate'.
        model: what was given; source: the directory or Hub id and revision it resolved to.
        recipe: the recipe as plain data; calibration: in words what was read, with its warnings.
        layers, left: what was compressed and what was not. removed: heads, neurons and blocks that are gone.
        before, after: measurements, None with --no-evaluate.
        phases: seconds by phase (read, calibrate, solve, save, verify, evaluate).
        peak_memory: anonymous resident bytes of compressing and saving over those after imports.
        labels: honest words on where the artefact is faster and where it is only smaller.
        notes: fallbacks and warnings, one sentence each.
        recovery: of `llmcomp recover`, whose layers are those that had been compressed.
        pruning: of a training that removed weights. distillation: of `llmcomp distill`.
        origin: where the model comes from. files: SHA-256 of what was verified, by path below the checkpoint.
    """

    command: str
    model: str
    source: str
    output: str
    created: str
    machine: Machine
    architecture: str
    task: str
    recipe: dict[str, Any]
    format: str
    calibration: dict[str, Any]
    layers: list[LayerReport] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    removed: list[Removed] = field(default_factory=list)
    size_before: Size | None = None
    size_after: Size | None = None
    before: Measured | None = None
    after: Measured | None = None
    divergence: Divergence | None = None
    verification: Verification | None = None
    phases: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None
    resumed_blocks: int = 0
    labels: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recovery: Recovery | None = None
    pruning: Pruning | None = None
    distillation: Distillation | None = None
    origin: Origin | None = None
    files: dict[str, str] = field(default_factory=dict)
    llmcomp_version: str = ""
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Rebuild from `to_json`.

        Raises:
            BadCheckpoint: not JSON, another schema version, or fields missing.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadCheckpoint(f"{FILE_NAME} is not JSON ({error}); run llmcomp evaluate again.") from error
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise BadCheckpoint(f"{FILE_NAME} has schema version {version}, this llmcomp reads {SCHEMA_VERSION}.")
        try:
            return typing.cast(Report, _rebuild(cls, data))
        except (KeyError, TypeError) as error:
            raise BadCheckpoint(f"{FILE_NAME} is incomplete or changed by hand ({error}).") from error

    @classmethod
    def read(cls, directory: str | Path) -> Report:
        """The report inside a compressed checkpoint's directory.

        Raises:
            BadCheckpoint: no report there.
        """
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            raise BadCheckpoint(f"{directory} holds no {FILE_NAME}: expected a directory that llmcomp wrote.")
        return cls.from_json(path.read_text(encoding="utf-8"))


def _rebuild(annotation: Any, value: Any) -> Any:
    """A value of plain JSON as the annotated type (dataclasses, lists, dicts, optionals).

    Raises:
        TypeError: it is of another.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _rebuild(next(a for a in arguments if a is not type(None)), value)
    fits = _FITS.get(list if origin is tuple else origin or annotation)
    if dataclasses.is_dataclass(annotation):
        fits = (dict,)
    if fits is not None and (not isinstance(value, fits) or (isinstance(value, bool) and bool not in fits)):
        raise TypeError(f"{value!r:.40} where {getattr(annotation, '__name__', annotation)} belongs")
    if origin is list:
        return [_rebuild(arguments[0], item) for item in value]
    if origin is dict:
        return {key: _rebuild(arguments[1], item) for key, item in value.items()}
    if origin is tuple:
        return tuple(value)
    if dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        return annotation(**{k: _rebuild(hints[k], v) for k, v in value.items()})  # type: ignore[operator]
    return value


# What JSON may have for a type; a whole number is a float, too.
_FITS: dict[Any, tuple[type, ...]] = {
    str: (str,), bool: (bool,), int: (int,), float: (float, int), list: (list,), dict: (dict,),
}  # fmt: skip
