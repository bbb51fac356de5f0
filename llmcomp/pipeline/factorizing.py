"""Which linear gets factors, and of which rank: a recipe's step that factorizes met with a model, alone or beside one
that quantizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from types import MappingProxyType

import torch

from llmcomp import native_kinds
from llmcomp.adapters.base import Adapter, LinearRef
from llmcomp.errors import BadRecipe
from llmcomp.methods import AUTO_ALONE, LOW_RANK
from llmcomp.methods.factors import CorrectionConfig
from llmcomp.methods.rank_budget import check_rank, rank_for, require_affordable
from llmcomp.pipeline.assign import (
    Assignment,
    Factoring,
    Task,
    alone,
    assign,
    left_out,
    unknown,
    why_not_updated,
)
from llmcomp.recipe import FactorizeStep, QuantizeStep, TargetedStep, override_for, size_for

# {linear: its rank, or None where it stays dense}, as measured on the source model.
Ranks = Mapping[str, int | None]


def shares_budget(step: FactorizeStep, ref: LinearRef) -> bool:
    """Whether the rank of a linear is one that a common budget pays for: it has no ratio or rank of its own."""
    override = override_for(step, ref.name, ref.role, ref.block)
    return step.ranks == "balanced" and (override is None or (override.ratio is None and override.rank is None))


def factors(adapter: Adapter, step: FactorizeStep, ranks: Ranks = MappingProxyType({})) -> Assignment:
    """Resolve targets, overrides and ranks of factors that stand for matrices.

    Args:
        ranks: that were shared out; linears without one have that of their ratio.

    Raises:
        BadRecipe: an unknown method, a target or override that matches nothing, nothing to do, embeddings, or a ratio
            or rank with which a matrix is not smaller. All problems are said at once.
    """
    problems = _unknown(adapter, step)
    tasks: dict[str, Task] = {}
    left = dict(adapter.uncompressed)
    repeated = any(block.applications > 1 for block in adapter.blocks)
    for ref in adapter.refs:
        if (why := left_out(step, ref)) is not None:
            left[ref.name] = why
        elif ref.name in ranks and ranks[ref.name] is None:
            left[ref.name] = "stays dense: of the ranks that the common budget pays for none makes it smaller"
        elif (task := _task(ref, step, problems, repeated, ranks.get(ref.name))) is not None:
            tasks[ref.name] = task
    if step.ranks == "balanced" and repeated:
        problems.append(
            "this model runs one block several times, so nothing says what a rank takes off in each of them; take "
            "--ranks uniform"
        )
    elif step.ranks == "balanced" and not problems:
        check_budget(step, tasks.values())
    return _fitting(adapter, tasks, left, problems)


def check_budget(step: FactorizeStep, tasks: Iterable[Task]) -> None:
    """Refuse what sharing out would refuse after it has measured: a budget that the smallest ranks overstep.

    Raises:
        BadRecipe: it is one.
    """
    shapes = [(task.ref.out_features, task.ref.in_features) for task in tasks if shares_budget(step, task.ref)]
    ratio, _ = size_for(step, None)
    assert ratio is not None  # as `recipe.check` has it
    require_affordable([rows + columns for rows, columns in shapes], int(ratio * sum(map(prod, shapes))))


def _task(
    ref: LinearRef, step: FactorizeStep, problems: list[str], repeated: bool, shared: int | None
) -> Task | None:
    """The task of one linear; None where the recipe cannot be right, with `problems` saying why.

    Args:
        repeated: the model runs a block several times. shared: its part of a common budget.
    """
    override = override_for(step, ref.name, ref.role, ref.block)
    method = override.method if override is not None and override.method is not None else step.method
    if method not in LOW_RANK:
        return None
    ratio, rank = size_for(step, override)  # which can be, or `recipe.check` has said why not
    rank = shared or rank
    try:
        if rank is None:
            assert ratio is not None  # one of them is
            rank = rank_for(ratio, ref.out_features, ref.in_features)
        check_rank(rank, ref.out_features, ref.in_features)
    except BadRecipe as error:
        _add(problems, str(error).rstrip("."))
        return None
    why, update = why_not_updated(ref, repeated), step.updates
    wanted = why is None and (update or LOW_RANK[method].calibrated)
    factoring = Factoring(rank, method, wanted, update and why is None)
    return Task(ref, None, method, why if update else None, factoring=factoring)


def with_factors(adapter: Adapter, steps: Sequence[TargetedStep], ranks: Ranks = MappingProxyType({})) -> Assignment:
    """What a step that factorizes does to each linear, alone or before or behind one that quantizes.

    Raises:
        BadRecipe: a step that does not fit, or two that exclude each other on a linear.
    """
    first, *rest = steps
    if isinstance(first, FactorizeStep) and not rest:
        return factors(adapter, first, ranks)
    (second,) = rest
    if isinstance(first, FactorizeStep):
        assert isinstance(second, QuantizeStep)  # as ORDERS has it
        low, quantized = factors(adapter, first, ranks), assign(adapter, alone(second))
        tasks = {ref.name: _rounded(low.tasks.get(ref.name), quantized.tasks.get(ref.name)) for ref in adapter.refs}
    else:
        assert isinstance(first, QuantizeStep) and isinstance(second, FactorizeStep)
        quantized = assign(adapter, alone(first))
        added = _corrections(adapter, second)
        tasks = {ref.name: _corrected(quantized.tasks.get(ref.name), added.get(ref.name)) for ref in adapter.refs}
        if unrounded := [name for name in added if tasks[name] is None]:
            raise BadRecipe(
                f"{unrounded[0]} is not quantized ({quantized.left[unrounded[0]]}), so there is nothing to correct; "
                "skip it in both steps."
            )
    done = {name: task for name, task in tasks.items() if task is not None}
    return _fitting(adapter, done, {name: why for name, why in quantized.left.items() if name not in done}, [])


def _rounded(low: Task | None, quantized: Task | None) -> Task | None:
    """Factors in integers."""
    if low is None or quantized is None:
        return low or quantized
    _check_quantizer(quantized, "factors")
    fallback = "; ".join(filter(None, (low.fallback, quantized.fallback)))
    return replace(quantized, factoring=low.factoring, fallback=fallback or None)


def _corrections(adapter: Adapter, step: FactorizeStep) -> dict[str, Factoring]:
    """The factors that correct each linear.

    Raises:
        BadRecipe: as `factors`.
    """
    problems = _unknown(adapter, step)
    found: dict[str, Factoring] = {}
    bits = step.options.get("bits", CorrectionConfig.bits)
    for ref in adapter.refs:
        if left_out(step, ref) is None and not _looked_up(ref, problems):
            _, rank = size_for(step, override_for(step, ref.name, ref.role, ref.block))
            assert rank is not None  # as `recipe.check` has it
            found[ref.name] = Factoring(rank, step.method, bits=bits)
    if problems:
        raise _misfit(adapter, problems)
    return found


def _corrected(quantized: Task | None, factoring: Factoring | None) -> Task | None:
    """Integers with factors that correct them."""
    if quantized is None or factoring is None:
        return quantized
    _check_quantizer(quantized, "a correction")
    return replace(quantized, factoring=factoring)


def _check_quantizer(quantized: Task, beside: str) -> None:
    """Refuse methods that learn from the block, or that scale inputs.

    Raises:
        BadRecipe: naming those that do neither.
    """
    if quantized.tune is not None or quantized.scale is not None or quantized.aim is not None:
        does = "learns from" if quantized.tune else "scales" if quantized.scale else "aims by"
        raise BadRecipe(
            f"{quantized.method} {does} what whole weights read, which "
            f"{beside} would change; take {AUTO_ALONE}, rtn-clip or rtn."
        )
    if quantized.activations is not None:
        raise BadRecipe(f"Inputs cannot be rounded beside {beside}; leave --activations out.")


def _fitting(adapter: Adapter, tasks: dict[str, Task], left: dict[str, str], problems: list[str]) -> Assignment:
    """The assignment, if each weight is smaller than it was.

    Raises:
        BadRecipe: with all problems.
    """
    dtype = adapter.model.dtype
    assert isinstance(dtype, torch.dtype)
    for task in tasks.values():
        ref, kind = task.ref, task.kind
        if task.factoring is None:
            continue
        before, least = ref.weights * dtype.itemsize, min(ref.out_features, ref.in_features)
        shape = f"[{ref.out_features}, {ref.in_features}]"
        if task.factoring.rank > least:
            _add(problems, f"rank {task.factoring.rank} is above the width of a matrix {shape}; take 1 to {least}")
        elif native_kinds.nbytes(kind, ref.out_features, ref.in_features, dtype.itemsize) >= before:
            _add(problems, f"{kind.label} is no smaller than a matrix {shape} itself; take a smaller rank, or skip it")
    if not tasks and not problems:
        problems.append("the recipe's targets and overrides leave nothing to factorize")
    if problems:
        raise _misfit(adapter, problems)
    return Assignment(tasks, left)


def _unknown(adapter: Adapter, step: FactorizeStep) -> list[str]:
    problems = unknown(adapter, step, tuple(LOW_RANK))
    for ref in adapter.refs:
        if left_out(step, ref) is None:
            _looked_up(ref, problems)
    return problems


def _looked_up(ref: LinearRef, problems: list[str]) -> bool:
    """Whether it is a table of embeddings; `problems` then says so."""
    if ref.role == "embeddings":
        _add(problems, "embeddings are looked up row by row, which factors would not make cheaper; leave them out")
    return ref.role == "embeddings"


def _add(problems: list[str], problem: str) -> None:
    if problem not in problems:
        problems.append(problem)


def _misfit(adapter: Adapter, problems: Sequence[str]) -> BadRecipe:
    return BadRecipe(f"The recipe does not fit {adapter.architecture}: {'; '.join(problems)}.")
