"""From a recipe and a directory to a `Job`: everything is looked up and checked before any weight is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from llmcomp import remote_code
from llmcomp.adapters.base import Adapter
from llmcomp.adapters.discover import discover, skeleton
from llmcomp.building import build
from llmcomp.calibration.data import Batch, batches, describe, fingerprint, read_texts, windows
from llmcomp.calibration.lint import lint
from llmcomp.checkpoint import Binding, Checkpoint, bind
from llmcomp.devices import CPU
from llmcomp.errors import BadData, BadRecipe
from llmcomp.feeds import around, composite, vocabulary
from llmcomp.formats import FORMATS, Layout, broken_ties
from llmcomp.measure.inputs import max_positions
from llmcomp.methods import AUTO, AUTO_ALONE, LOW_RANK, SPARSE
from llmcomp.methods.factors import CorrectionConfig
from llmcomp.pipeline import feeding
from llmcomp.pipeline.assign import Assignment
from llmcomp.pipeline.factorizing import Ranks
from llmcomp.pipeline.pruning import Reduction, reduce_model
from llmcomp.pipeline.solved import method_config
from llmcomp.pipeline.sparsifying import Sparsities, assign_steps
from llmcomp.progress import Progress
from llmcomp.ranks import ALONE, World
from llmcomp.recipe import FIXED, QuantizeStep, Recipe
from llmcomp.report.schema import LayerReport

# Tokens of one forward: more gains little speed and costs memory. A step of learned rounding takes whole batches, so
# it gets smaller ones.
TOKENS_PER_BATCH, _LEARNING_TOKENS = 1024, 512
_WITNESSES, _WITNESS_TOKENS = 2, 64
# A format that rounds by itself reads no text, and its own grid fits every width: so assignment sees it.
_AS_ROUNDING: dict[str, Any] = {"method": "rtn", "group_size": "channel"}


@dataclass(frozen=True)
class Source:
    """A model that can be compressed: its files, its structure, where each parameter lies."""

    checkpoint: Checkpoint
    adapter: Adapter
    binding: Binding


@dataclass(frozen=True)
class Data:
    """What the model is run on. `facts`: the report's account of it; `labels`: of each batch, where gradients want a
    classifier's."""

    batches: list[Batch]
    witness: dict[str, Tensor]
    fingerprint: str
    facts: dict[str, Any]
    labels: list[Tensor] | None = None


@dataclass(frozen=True)
class Plan:
    """A recipe met with a source: what it does to each linear, and how that is stored.

    Attributes:
        adapter: of the model whose linears these are: the source's, or the smaller one that a step to prune makes.
        whole: not by the loop over blocks, but by transformers, from the whole model (`pipeline.whole`).
        reduction: what the step to prune does before all else.
    """

    recipe: Recipe
    adapter: Adapter
    assignment: Assignment
    layout: Layout
    ties: Mapping[str, str]
    untied: bool
    whole: bool = False
    reduction: Reduction | None = None

    @property
    def calibrated(self) -> bool:
        """Whether anything reads calibration data."""
        return self.assignment.calibrated or (self.reduction is not None and self.reduction.calibrated)

    @property
    def tokens_per_batch(self) -> int:
        """Of calibration that pass through the model at a time, where windows are not longer."""
        learning = any(task.tune is not None for task in self.assignment.tasks.values())
        return _LEARNING_TOKENS if learning else TOKENS_PER_BATCH

    @property
    def shared(self) -> str | None:
        """What is to be shared out by a pass over the source model: 'ranks', 'sparsity' or nothing."""
        factorizing, sparsifying = self.recipe.factorizing, self.recipe.sparsifying
        if factorizing is not None and factorizing.ranks == "balanced":
            return "ranks"
        return "sparsity" if sparsifying is not None and sparsifying.allocate else None


@dataclass(frozen=True)
class Job:
    """Everything the loop needs, resolved and checked.

    Attributes:
        adapter: structure, its model's parameters on meta.
        binding: where the parameters lie in the source.
        assignment: what is done with each linear.
        options, pruning, factoring: settings of the methods that quantize, that remove weights, that make factors.
        layout: how compressed weights are stored.
        ties: {name: name it shares storage with} in the checkpoint that is written.
        batches: inputs of the model for calibration.
        witness: inputs of the model for verification.
        partial: directory of unfinished work.
        activation_memory: bytes that the lanes' inputs may take before they go to files.
        world: the ranks that share the work; `batches` are this one's, and only the first one's `partial` stays.
        seed: the recipe's, for methods that draw.
        device: where the model is run and weights are compressed; everything in here lies on the CPU or on meta.
    """

    adapter: Adapter
    binding: Binding
    assignment: Assignment
    options: dict[str, Any]
    layout: Layout
    ties: Mapping[str, str]
    batches: Sequence[Mapping[str, Tensor]]
    witness: Mapping[str, Tensor]
    partial: Path
    activation_memory: int
    world: World = ALONE
    seed: int = 0
    device: torch.device = CPU
    pruning: Mapping[str, Any] = field(default_factory=dict)
    factoring: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What the loop has done.

    Attributes:
        order: names of the shards, first to last. phases: seconds by phase. resumed: blocks that an earlier
        run had finished. spilled: bytes of activations that went to files. source: name → (shape, dtype).
    """

    layers: list[LayerReport] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    resumed: int = 0
    spilled: int = 0
    source: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)


def open_source(path: Path, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> Source:
    """Open a checkpoint and find its structure; no weights are read.

    Raises:
        BadCheckpoint: unreadable, incomplete or already quantized.
        UnknownArchitecture: blocks that cannot be found.
    """
    checkpoint = Checkpoint.open(path, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    checkpoint.require_dense()
    if trust_remote_code:
        remote_code.register(path)
    model: Any = skeleton(path, trust_remote_code=trust_remote_code)
    binding = bind(checkpoint, model)
    adapter = replace(discover(model), ties=binding.ties)
    return Source(checkpoint, adapter, binding)


def plan_recipe(
    recipe: Recipe, adapter: Adapter, ranks: Ranks = MappingProxyType({}),
    sparsities: Sparsities = MappingProxyType({}),
) -> Plan:
    """Meet a recipe with a model.

    Args:
        ranks: of factors, sparsities: of unstructured patterns, where one budget was shared out; a plan without them
            has one ratio, or one sparsity, for all.

    Raises:
        BadRecipe: it does not fit; all problems at once.
    """
    if recipe.format not in FORMATS:
        raise BadRecipe(f"Format '{recipe.format}' is not one of {', '.join(FORMATS)}.")
    if recipe.pruning is None:
        return plan_rest(recipe, adapter, ranks, sparsities)
    reduction = reduce_model(adapter, recipe.pruning)
    return replace(plan_rest(recipe, reduction.adapter), reduction=reduction)


def plan_rest(
    recipe: Recipe, adapter: Adapter, ranks: Ranks = MappingProxyType({}),
    sparsities: Sparsities = MappingProxyType({}),
) -> Plan:
    """Meet all steps but one that prunes with a model: with the smaller one, where there is such a step.

    Raises:
        BadRecipe: as `plan_recipe`.
    """
    asked = _grids_apart(recipe)
    assignment = assign_steps(adapter, asked.targeted, ranks, sparsities)
    if asked.quantizing is not None:
        for method in _asked_methods(asked.quantizing, assignment):
            method_config(method, asked.quantizing.options)
    if asked.sparsifying is not None:
        build(SPARSE[asked.sparsifying.method].config, asked.sparsifying.options, "options of the step to sparsify")
    if asked.factorizing is not None:
        own = CorrectionConfig if asked.correcting else LOW_RANK[asked.factorizing.method].config
        build(own, asked.factorizing.options, "options of the step to factorize")
    entries = [(task.ref, task.kind) for task in assignment.tasks.values()]
    layout = FORMATS[recipe.format](entries, adapter.model)
    packed = [ref.name for ref, _ in entries if ref.name not in layout.dense]
    broken = broken_ties(adapter.ties, [ref.name for ref, _ in entries])
    ties = {} if broken else dict(adapter.ties)
    left = {**assignment.left, **{name: f"stored dense: {why}" for name, why in layout.dense.items()}}
    if not packed and layout.dense:
        left = assignment.left
    done = Assignment(assignment.tasks, left)
    return Plan(recipe, adapter, done, layout, ties, bool(broken), recipe.format in FIXED)


def _grids_apart(recipe: Recipe) -> Recipe:
    """The recipe with steps of a format that is a grid of its own as assignment sees them."""
    if recipe.format not in FIXED:
        return recipe
    return replace(recipe, steps=tuple(replace(step, **_AS_ROUNDING) for step in recipe.targeted))


def _asked_methods(step: QuantizeStep, assignment: Assignment) -> list[str]:
    """Whose settings the step's options are: of its method, or of what `auto` takes at its width."""
    if step.method != "auto":
        return [step.method]
    found = {task.method: None for task in assignment.tasks.values() if task.bits == step.bits}
    return [AUTO[step.bits] if AUTO[step.bits] in found else AUTO_ALONE]


def gather(
    recipe: Recipe, source: Source, plan: Plan, model: str, progress: Progress, world: World = ALONE
) -> Data:
    """Read and cut calibration data, say what is odd about it, and pick the witness.

    Args:
        model: the name that the user gave; a sample model calibrates on the text that ships.
        world: whose ranks share the windows; all else is of all windows.

    Raises:
        BadData: data that is missing, unusable, of another model's vocabulary, or too little for the ranks.
    """
    settings, adapter = recipe.calibration, source.adapter
    known = vocabulary(adapter.model)
    if not plan.calibrated:
        ids = _random_ids(known, adapter.config)
        return Data([], around(adapter.model, ids), "none", {"description": "none needed"})
    if feeding.needed(adapter, settings.source):
        gathered = feeding.gather(recipe, source.checkpoint, adapter, progress)
        witness = feeding.witness(gathered.samples, adapter.model, _WITNESSES, _WITNESS_TOKENS)
        _require_enough(len(gathered.samples), world)
        made = feeding.batches(world.share(gathered.samples), adapter, plan.tokens_per_batch)
        return Data(made, witness, feeding.fingerprint(gathered.samples), gathered.facts)
    name = model if model.startswith("sample:") and settings.source == "default" else settings.source
    texts = read_texts(name, text_column=settings.text_column, progress=progress)
    tokenizer = None if texts.input_ids is not None else feeding.tokenizer_of(source.checkpoint)
    found = windows(
        texts, tokenizer, samples=settings.samples, length=settings.sequence_length, seed=recipe.seed,
        task=adapter.task, max_length=max_positions(adapter.model, tokenizer),
    )  # fmt: skip
    samples = settings.samples
    warnings = lint(texts, found, tokenizer, samples=samples, task=adapter.task, vocabulary=known)
    if composite(adapter.model):
        warnings.append(feeding.TEXT_ONLY)
    described = describe(texts, found, tokenizer, adapter.task)
    progress.note(f"Calibrating on {described}.")
    for warning in warnings:
        progress.note(warning)
    pad = None if tokenizer is None else tokenizer.pad_token_id
    _require_enough(len(found), world)
    made = batches(world.share(found), tokens_per_batch=plan.tokens_per_batch, pad_id=pad)
    facts = {
        "source": name, "description": described, "samples": len(found),
        "tokens": sum(len(window) for window in found), "warnings": warnings,
    }  # fmt: skip
    data = Data(made, _witness(found), fingerprint(found), facts)
    if plan.reduction is None or not plan.reduction.taylor or adapter.task != feeding.LABELLED:
        return data
    labels, digest = feeding.row_labels(texts, found, made, adapter.model, recipe.seed)
    return replace(data, labels=labels, fingerprint=f"{data.fingerprint} {digest}")


def _require_enough(windows: int, world: World) -> None:
    if windows < world.size:
        raise BadData(
            f"{windows} calibration windows cannot feed {world.size} ranks: give more by --samples (and text for "
            f"them by --calibration), or start at most {windows} processes."
        )


def _witness(found: list[Tensor]) -> dict[str, Tensor]:
    """The first tokens of the longest windows, as one rectangle."""
    longest = sorted(found, key=len, reverse=True)[:_WITNESSES]
    length = min(_WITNESS_TOKENS, *(len(window) for window in longest), _WITNESS_TOKENS)
    return {"input_ids": torch.stack([window[:length] for window in longest])}


def _random_ids(vocabulary: int | None, config: Any) -> Tensor:
    """Token ids from a fixed seed, for methods that read no data; special tokens at the ends are avoided."""
    generator = torch.Generator().manual_seed(0)
    text = config.get_text_config()
    positions = [getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions")]
    shortest = min((one for one in positions if isinstance(one, int)), default=_WITNESS_TOKENS)
    shape = (_WITNESSES, max(1, min(_WITNESS_TOKENS, shortest - 4)))
    size = vocabulary or 1
    return torch.randint(min(8, size - 1), size, shape, generator=generator)
