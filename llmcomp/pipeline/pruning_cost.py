"""What a step that prunes needs while it makes the smaller model: peak memory and time, from shapes alone."""

from __future__ import annotations

from dataclasses import replace

from llmcomp.adapters.base import Adapter, Block
from llmcomp.adapters.units import Part
from llmcomp.feeds import vocabulary
from llmcomp.formats.dense import DenseLayout
from llmcomp.patterns import Pattern
from llmcomp.pipeline.assign import Assignment, Pruning, Task
from llmcomp.pipeline.feeding import LABELLED
from llmcomp.pipeline.footprint import DOUBLE, footprint
from llmcomp.pipeline.job import Plan
from llmcomp.pipeline.pruning import Reduction
from llmcomp.pipeline.terms import Footprint, Lanes
from llmcomp.pipeline.timing import LANE_STOP, STORED_BYTES, Rates
from llmcomp.pipeline.waiting import Look

_RENEWALS = 16  # of all scores while units go (`methods.structured.choose`)


def pruning_footprint(plan: Plan, reduction: Reduction, lanes: Lanes, budget: int, look: Look) -> Footprint:
    """The worst moment. Lanes wait before output projections as they do for a method that removes single weights there;
    solving holds the inverse of the Gram matrix in float64, with what is made of it, and the weight twice.

    Args:
        look: of the source's adapter.
    """
    source = reduction.source
    parts = [part for block in source.blocks for part in reduction.parts(block)]
    method = "wanda" if reduction.calibrated else "magnitude"
    removing = Pruning(Pattern.parse("unstructured", 0.5), method)
    tasks = {part.output.name: Task(part.output, None, method, pruning=removing) for part in parts}
    alike = replace(plan, adapter=source, assignment=Assignment(tasks, {}), layout=DenseLayout())
    found = footprint(source, alike, lanes, budget, look)
    size = next(iter(source.model.state_dict().values())).element_size()
    solving = max((_solving(part) for part in parts), default=0) if reduction.calibrated else 0
    if reduction.taylor:
        solving = max(solving, _backward(source, lanes.tokens))
    written = max(sum(ref.weights for ref in block.linears) * size for block in source.blocks)
    terms = replace(found.terms, method=max(found.terms.method, solving), packed=max(found.terms.packed, written))
    return Footprint("pruning", terms, found.spilled)


def pruning_seconds(reduction: Reduction, tokens: int, lanes: int, rates: Rates) -> float:
    """Time to make the smaller model.

    Args:
        tokens: of calibration, in all. lanes: batches that they come in.
    """
    source, total = reduction.source, 0.0
    state = source.model.state_dict().values()
    total += sum(value.numel() * value.element_size() for value in state) / STORED_BYTES
    if not reduction.calibrated:
        return total
    looking = reduction.blocks < len(source.blocks)
    # Forward, again on the way back, and the gradients of what is read: a product for each of a forward's.
    looks = 3 if reduction.taylor else int(looking)
    for block in source.blocks:
        parts = reduction.parts(block)
        runs = looks + (bool(parts) * reduction.blocks / len(source.blocks))
        total += runs * _forward(block, tokens, lanes, rates)
        for part in parts:
            columns = float(part.output.in_features)
            total += tokens * columns**2 / rates.exact + _operations(part, reduction) / (rates.exact / 2)  # float64
    return total


def _forward(block: Block, tokens: int, lanes: int, rates: Rates) -> float:
    computed = 2.0 * tokens * sum(ref.weights * ref.share for ref in block.linears) / rates.forward
    return computed + LANE_STOP * lanes * (1 + len(block.stages))


def _solving(part: Part) -> int:
    """Bytes of choosing and refitting."""
    return DOUBLE * (3 * part.output.in_features**2 + 2 * part.output.weights)


def _backward(source: Adapter, tokens: int) -> int:
    """Bytes of one batch on its way back: what every block reads, one block's graph with its gradients, logits and
    their gradient in float32 (a classifier's are none)."""
    size = next(iter(source.model.state_dict().values())).element_size()
    width = max(block.linears[0].in_features for block in source.blocks)
    graph = max(sum(ref.in_features + ref.out_features for ref in block.linears) for block in source.blocks)
    classes = 0 if source.task == LABELLED else vocabulary(source.model) or 0
    return tokens * (size * (len(source.blocks) * width + 2 * graph) + DOUBLE * (width + 2 * classes))


def _operations(part: Part, reduction: Reduction) -> float:
    """The inverse, what each removal changes in it, scores, the refit, and two quadratic forms."""
    columns, rows = float(part.output.in_features), float(part.output.out_features)
    stays = reduction.keep[part.what] * part.size
    gone = columns - stays
    total = columns**3 + 2 * gone * columns * (columns + rows)
    total += 2 * _RENEWALS * columns * part.size * (rows + part.size)
    total += stays**3 / 3 + 2 * rows * stays * (gone + stays)
    return total + 4 * rows * columns**2
