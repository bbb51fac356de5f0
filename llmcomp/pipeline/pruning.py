"""A step that prunes met with a model: how many heads, neurons and blocks stay, and the config that says so.

What comes out is an ordinary checkpoint, so its config must be able to say what is left. That is not taken from a list
of families: the model is built anew from the changed config, without weights, and every parameter must then have the
shape that the cut gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from llmcomp.adapters.base import Adapter, Block
from llmcomp.adapters.discover import discover, resized
from llmcomp.adapters.units import HEADS, NEURONS, Part, after, heads_of, neurons_of, problem_of
from llmcomp.building import build
from llmcomp.errors import BadRecipe
from llmcomp.feeds import composite, encoder_decoder
from llmcomp.methods.structured import PruneConfig, kept_count
from llmcomp.pipeline.sensitivity import TASKS
from llmcomp.recipe import PruneStep

# What configs call the width of an MLP.
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "ffn_hidden_size", "d_ff")
_INSTEAD = {HEADS: "--mlp or --layers", NEURONS: "--heads or --layers", "blocks": "--heads or --mlp"}
_FLAGS = {HEADS: "--heads", NEURONS: "--mlp", "blocks": "--layers"}


@dataclass(frozen=True)
class Smaller:
    """A model with some of its blocks.

    Attributes:
        full: with these blocks, as wide as it was. cut: as narrow as it becomes.
        kept: for each block its index in the source.
        changes: of config.json.
    """

    full: Adapter
    cut: Adapter
    kept: tuple[int, ...]
    changes: dict[str, Any]

    def original(self, name: str) -> str:
        """The source's name for a parameter or buffer of the model."""
        return renumbered(name, self.full.blocks, self.kept)


@dataclass(frozen=True)
class Reduction:
    """What a step that prunes makes of a model.

    Attributes:
        source: the model as it is. parts: the heads and neurons that are cut, of each block.
        keep: {HEADS or NEURONS: how many units stay in every block}.
        blocks: how many stay.
        widths: changes of config.json for what is in `keep`.
        adapter: of the smaller model, if its last blocks went. Which ones go may be known only when they were run;
            shapes are the same.
    """

    step: PruneStep
    config: PruneConfig
    source: Adapter
    keep: dict[str, int]
    blocks: int
    widths: dict[str, Any]
    adapter: Adapter

    @property
    def calibrated(self) -> bool:
        """Whether it reads activations."""
        return self.step.method != "magnitude"

    @property
    def taylor(self) -> bool:
        """Whether it reads gradients of the loss, so a classifier's labels, too."""
        return self.step.method == "taylor"

    def parts(self, block: Block) -> list[Part]:
        """What is cut in a block of the model that is as wide as it was."""
        return parts_of(block, self.source.config, self.keep)

    def of(self, kept: Sequence[int]) -> Smaller:
        """The model with these blocks of the source.

        Raises:
            BadRecipe: one that transformers cannot build.
        """
        return _smaller(self.source, tuple(kept), self.widths)


def parts_of(block: Block, config: Any, wanted: Mapping[str, int]) -> list[Part]:
    """The parts of `wanted` in a block that is known to have them."""
    found = [heads_of(block, config) if what == HEADS else neurons_of(block) for what in wanted]
    return [part for part in found if isinstance(part, Part)]


def reduce_model(adapter: Adapter, step: PruneStep) -> Reduction:
    """Meet a step that prunes with a model.

    Raises:
        BadRecipe: what it cannot do, and what would work; all problems at once.
    """
    config = build(PruneConfig, dict(step.options), "options of the step to prune")
    if config.multiple is not None and config.multiple < 1:
        raise BadRecipe(f"multiple={config.multiple} cannot be: the neurons that stay are a multiple of at least 1.")
    problem = problem_of(adapter)
    if encoder_decoder(adapter.model) or composite(adapter.model):
        problem = "it has several stacks of blocks, of which one config says the sizes"
    if problem is not None:
        raise BadRecipe(
            f"{adapter.architecture} cannot be pruned: {problem}; llmcomp factorize and llmcomp sparsify take it."
        )
    problems: list[str] = []
    keep: dict[str, int] = {}
    widths: dict[str, Any] = {}
    for what, share in ((HEADS, step.heads), (NEURONS, step.mlp)):
        if share is None:
            continue
        try:
            keep[what], changes = _counted(adapter, what, share, config)
            widths |= changes
        except BadRecipe as error:
            problems.append(str(error).rstrip("."))
    if step.method == "taylor" and adapter.task not in TASKS:
        known = " and ".join(TASKS)
        problems.append(f"--method taylor wants a loss, which models for {known} have here; take activation")
    total = len(adapter.blocks)
    kept = tuple(range(total - (step.layers or 0)))
    if not kept:
        problems.append(f"--layers {step.layers} of {total} blocks leaves none; take at most {total - 1}")
    if problems:
        raise BadRecipe(f"{adapter.architecture} cannot be pruned like this: {'; '.join(problems)}.")
    smaller = _smaller(adapter, kept, widths)
    return Reduction(step, config, adapter, keep, len(kept), widths, smaller.cut)


def renumbered(name: str, blocks: Sequence[Block], numbers: Sequence[int]) -> str:
    """A name with the number of its block replaced: `numbers` are those of `blocks`."""
    chain = blocks[0].name.rpartition(".")[0]
    if not name.startswith(f"{chain}."):
        return name
    index, dot, rest = name.removeprefix(f"{chain}.").partition(".")
    return f"{chain}.{numbers[int(index)]}{dot}{rest}" if index.isdigit() else name


def _counted(adapter: Adapter, what: str, share: float, config: PruneConfig) -> tuple[int, dict[str, Any]]:
    """How many units of a kind stay in every block, and the changes of config.json for that.

    Raises:
        BadRecipe: units that cannot be told apart, a share that removes none, or a config that cannot say it.
    """
    find: Callable[[Block], Part | str] = neurons_of
    if what == HEADS:
        find = lambda block: heads_of(block, adapter.config)  # noqa: E731
    parts: list[Part] = []
    for found in map(find, adapter.blocks):
        if isinstance(found, str):
            raise _refusal(what, found)
        parts.append(found)
    if len(sizes := {(part.units, part.size) for part in parts}) > 1:
        raise _refusal(what, f"its blocks have different numbers of them ({', '.join(str(n) for n, _ in sizes)})")
    units = parts[0].units
    multiple = config.multiple_of(units) if what == NEURONS else 1
    try:
        kept = kept_count(share, units, multiple)
    except BadRecipe as error:
        groups = f", each {parts[0].heads} heads that share keys and values" if parts[0].heads > 1 else ""
        raise BadRecipe(f"{_FLAGS[what]}{groups}: {error}") from error
    choices = _heads_said(adapter, parts[0], kept) if what == HEADS else _widths_said(adapter, units, kept)
    return kept, _expressed(adapter, what, parts, kept, choices)


def _refusal(what: str, why: str) -> BadRecipe:
    return BadRecipe(f"{_FLAGS[what]} cannot be, since {why}; prune {_INSTEAD[what]} instead")


def field_name(config: Any, name: str) -> str:
    """What config.json calls a field that all configs have under one name."""
    return str(type(config).attribute_map.get(name, name))


def _heads_said(adapter: Adapter, part: Part, kept: int) -> list[dict[str, Any]]:
    config = adapter.config
    said = {field_name(config, "num_attention_heads"): kept * part.heads, "head_dim": part.size // part.heads}
    if getattr(config, "num_key_value_heads", None) is not None:
        said[field_name(config, "num_key_value_heads")] = kept
    return [said]


def _widths_said(adapter: Adapter, units: int, kept: int) -> list[dict[str, Any]]:
    config = adapter.config
    names = dict.fromkeys(field_name(config, name) for name in WIDTHS if hasattr(config, name))
    return [{name: kept} for name in names if getattr(config, name) in (units, None)]


def _expressed(
    adapter: Adapter, what: str, parts: Sequence[Part], kept: int, choices: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The first of `choices` with which the model is built in the shapes that the cut gives.

    Raises:
        BadRecipe: none does.
    """
    wanted = after(adapter.model, _blank_slices(parts, kept))
    why = "its config has no field for their number"
    for changes in choices:
        try:
            built = after(resized(adapter.model, changes), {})
        except ValueError as error:
            if what == HEADS and (others := _heads_taken(adapter, parts[0])):
                said = ", ".join(others)
                raise BadRecipe(
                    f"--heads would leave {kept * parts[0].heads} heads, which transformers refuses ({error}); "
                    f"it takes --heads {said}"
                ) from error
            why = f"transformers refuses {changes} ({str(error)[:200]})"
            continue
        differing = [name for name in wanted if built.get(name) != wanted[name]]
        if not differing:
            return changes
        shape = built.get(differing[0])
        would = "not be there" if shape is None else f"have the shape {list(shape)}"
        why = f"its config cannot say that there are fewer of them: with it {differing[0]} would {would}"
    raise _refusal(what, why)


def _heads_taken(adapter: Adapter, part: Part) -> list[str]:
    """Shares of heads that transformers accepts, smallest first, as one would write them."""
    found = []
    for gone in range(1, part.units):
        config = {**adapter.config.to_dict(), **_heads_said(adapter, part, part.units - gone)[0]}
        try:
            type(adapter.config).from_dict(config)
        except (ValueError, TypeError, StrictDataclassError):
            continue
        found.append(_share(gone, part.units))
    return found


def _share(gone: int, units: int) -> str:
    """The share with the fewest digits that takes `gone` of `units`.

    >>> _share(1, 4), _share(2, 3), _share(1, 8)
    ('0.3', '0.7', '0.13')
    """
    for digits in range(1, 9):
        share = -(-gone * 10**digits // units)
        if share * units // 10**digits == gone and share < 10**digits:
            return f"{share / 10**digits:g}"
    return f"{gone / units:g}"


def _blank_slices(parts: Sequence[Part], kept: int) -> dict[str, tuple[int, Tensor]]:
    """The slices if the first units stayed: the shapes are those of any."""
    found: dict[str, tuple[int, Tensor]] = {}
    for part in parts:
        found |= part.slices(torch.arange(kept))
    return found


def _smaller(source: Adapter, kept: tuple[int, ...], widths: Mapping[str, Any]) -> Smaller:
    """The model with some blocks, as wide as it was and as narrow as it becomes.

    Raises:
        BadRecipe: one that transformers cannot build, or whose blocks are others than the source's.
    """
    changes = depth_changes(source, kept)
    full = source
    if changes:
        full = _built(source, changes)
        known = after(source.model, {})
        for name, shape in after(full.model, {}).items():
            if known.get(renumbered(name, full.blocks, kept)) != shape:
                raise _refusal("blocks", f"with fewer blocks {name} would have other shapes than it has")
    return Smaller(full, _built(source, {**changes, **widths}), kept, {**changes, **widths})


def _built(source: Adapter, changes: Mapping[str, Any]) -> Adapter:
    try:
        return replace(discover(resized(source.model, changes)), ties=source.ties)
    except ValueError as error:
        raise BadRecipe(f"transformers cannot build {source.architecture} with {dict(changes)}: {error}.") from error


def depth_changes(source: Adapter, kept: Sequence[int]) -> dict[str, Any]:
    """Changes of config.json for the blocks that stay: their number, and what it says of each.

    Raises:
        BadRecipe: blocks that depend on their number.
    """
    config, total = source.config, len(source.blocks)
    if len(kept) == total:
        return {}
    if getattr(config, "num_hidden_layers", None) != total:
        raise _refusal("blocks", f"its config says num_hidden_layers differently than its {total} blocks")
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise _refusal("blocks", "each block divides by its number, which would change")
    changes: dict[str, Any] = {field_name(config, "num_hidden_layers"): len(kept)}
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == total:
            changes[name] = [value[index] for index in kept]
    return changes
