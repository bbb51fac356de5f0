"""Peak memory of a run, term by term, from shapes alone: a model of what `pipeline.run` does, not a fit.

The loop's memory is looked at where it can be highest: while the lanes move to a stage, while that stage is
solved, while its result is decoded and packed, and at the model's end. `peak` returns the highest of these
moments. Mapped pages (source weights, spilled activations) do not count, as in `report.peak_memory`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from llmcomp.adapters.base import Adapter, Block, LinearRef
from llmcomp.calibration.stats import WAITING
from llmcomp.matmul import switch_is_exact
from llmcomp.methods import SPARSE
from llmcomp.pipeline.assign import Task
from llmcomp.pipeline.job import Plan
from llmcomp.pipeline.terms import Footprint, Lanes, MemoryTerms
from llmcomp.pipeline.waiting import Look, Waiting

DOUBLE = 8  # bytes
FLOAT = 4  # bytes; Gram matrices and everything that methods compute with
_TILE = 512  # rows of the diagonal tiles that `_solve.factorize` keeps aside
_STRIP = 2048  # columns of a piece of the Gram matrix (`calibration.stats`)
_SWEEP_WEIGHTS = 1 << 22  # elements of a chunk of rows in `methods.gptq`, and of most that remove weights
_SWEEP_BYTES = 10  # float32 weights and errors, int8 integers in two orders
_SEARCH_WEIGHTS = 1 << 17  # elements of a chunk in `methods._grid`
_SEARCH_BYTES = 6 * FLOAT  # the chunk, points, products and losses
_LOSS_ROWS = 1024  # a chunk in `methods.solution.row_losses`
_LOSS_BYTES = 4 * FLOAT  # weight, error, product with the Gram matrix, its square
_SCALED_ROWS = 256  # whose error is measured in `methods.awq`, for each candidate
_SCALED_BYTES = 5 * FLOAT  # rows, scaled, rounded, their error, its product with the Gram matrix
# Of each weight that learns: latent, offset, what the block computes with and its gradient, in float32; the best.
_LEARNING_BYTES = 4 * FLOAT + 1
# Gradients of activations that a backward pass holds at once: of a gated MLP's product, both factors, and its gate.
_BACKWARD = 4
_LEARNING_SPARE = 5 * FLOAT  # of the largest, while a step is made
# What bitsandbytes and transformers' loader hold of one weight while int8 is made of it (source, float16, products,
# integers). Fitted to a Llama of widths 1024 and 4096; nf4 holds about half of it.
_CONVERTED_BYTES = 20
_WITNESS_TOKENS = 2 * 64
# Without a traced lane: block input, sum, normed input, queries, keys and values, output (Llama holds five).
_UNTRACED_STREAMS = 6
# oneDNN compiles a kernel for every shape of a product and keeps the last 1024. Measured: what a run of GPTQ on
# widths 2048 and 5632 holds at its end, lanes and tensors gone, over some 550 shapes.
_KERNEL_BYTES = 560_000
_KERNELS_KEPT = 1024
_MEASURED = 256  # rows whose loss is taken at a time, at most
_BLOCK = 128  # columns of a step of `_solve.factorize` and `_solve.sweep`


def footprint(adapter: Adapter, plan: Plan, lanes: Lanes, budget: int, look: Look | None = None) -> Footprint:
    """The worst moment of a run.

    Args:
        lanes: of the calibration windows.
        budget: bytes of `--activation-memory`.
        look: of this adapter, where several plans share one.
    """
    tasks, look = plan.assignment.tasks, look or Look(adapter)
    if plan.assignment.beside:
        lanes = replace(lanes, count=2 * lanes.count)
    itemsize = {name: value.element_size() for name, value in adapter.model.state_dict().items()}
    found = [_within(adapter, block, plan, lanes, budget, itemsize, look) for block in _heaviest(adapter, tasks)]
    worst = max(found, key=lambda one: one.terms.total)
    outside, terms = max(_outside(adapter, plan, itemsize, lanes.ranks), key=lambda one: one[1].total)
    spilled = max(one.spilled for one in found)
    if terms.total > worst.terms.total - worst.terms.kernels:
        return Footprint(outside, replace(terms, kernels=worst.terms.kernels), spilled)
    return replace(worst, spilled=spilled)


def _within(
    adapter: Adapter, block: Block, plan: Plan, lanes: Lanes, budget: int, itemsize: dict[str, int], look: Look
) -> Footprint:
    """The worst moment of one block."""
    tasks = plan.assignment.tasks
    stages = [[tasks[ref.name] for ref in stage if ref.name in tasks] for stage in block.stages]
    stages = [stage for stage in stages if stage]
    size = itemsize[f"{block.linears[0].name}.weight"]
    moments = [("reading", MemoryTerms())]
    spilled = 0
    if plan.assignment.calibrated:
        places = _places(adapter, block, stages, lanes, size, look)
        follow = _surveyed if block.applications > 1 else _calibrated
        waits = [place.parked for place in places]
        if any(task.tune is not None for stage in stages for task in stage):
            target = FLOAT * lanes.tokens * block.linears[0].in_features
            places = [replace(place, parked=place.parked + target) for place in places]
            waits = [place.parked for place in places]
            moments += _learning(adapter, block, stages, places, plan, lanes, budget, itemsize, look)
        moments += follow(block, stages, places, plan, lanes, budget, size)
        spilled = max(waits) * lanes.count - budget
    else:
        moments += _uncalibrated(stages, plan, size, lanes.ranks)
    moment, terms = max(moments, key=lambda one: one[1].total)
    installed = terms.installed + _kept(adapter, block, tasks, size)
    terms = replace(terms, installed=installed, kernels=_kernels(stages, lanes.ranks))
    return Footprint(moment, terms, max(0, spilled))


def _kept(adapter: Adapter, block: Block, tasks: dict[str, Task], size: int) -> int:
    """Decoded weights of all other blocks, where a block is looked at from the model's start (`_survey`)."""
    if all(one.applications == 1 for one in adapter.blocks):
        return 0
    others = (ref for one in adapter.blocks if one is not block for ref in one.linears)
    return sum(ref.weights * size for ref in others if ref.name in tasks)


def converting(adapter: Adapter, plan: Plan, after: int) -> Footprint:
    """The peak where transformers converts the whole model (`pipeline.whole`).

    Args:
        after: bytes of the compressed checkpoint's tensors, all in memory at once.
    """
    state, tasks = adapter.model.state_dict(), plan.assignment.tasks
    decoded = [
        sum(ref.weights * state[f"{ref.name}.weight"].element_size() for ref in block.linears if ref.name in tasks)
        for block in adapter.blocks
    ]
    widest = max(task.ref.weights for task in tasks.values())
    terms = MemoryTerms(packed=after, installed=max(decoded), method=_CONVERTED_BYTES * widest)
    return Footprint("converting", terms, 0)


def _kernels(stages: Sequence[Sequence[Task]], ranks: int) -> int:
    """Bytes of compiled kernels, after the first block has shown every shape."""
    if not switch_is_exact():
        return 0  # products go to MKL, which compiles none
    shapes: set[tuple[int, ...]] = set()
    for stage in stages:
        if not stage[0].factorizes:
            continue
        columns = stage[0].ref.in_features
        rows = -(-sum(task.ref.out_features for task in stage) // ranks)
        chunk = _chunk(stage[0], columns)
        rests = {_TILE, *range(_BLOCK, min(_TILE, columns), _BLOCK)}  # tiles, and what is left at an edge
        for size in {min(chunk, rows), rows % chunk} - {0}:
            shapes |= {(rest, size) for rest in rests}  # a block of the sweep
            shapes |= {(0, rest, min(size, _MEASURED)) for rest in rests}  # its losses
        shapes |= {(rest, 0, 0) for rest in rests}  # panels of the factor
        shapes |= {(rest, other, 1) for rest in rests for other in rests}  # tiles of their outer products
        # pieces of the Gram matrix
        shapes |= {(min(_STRIP, columns - start), 0, 1, 0) for start in range(0, columns, _TILE)}
    return min(len(shapes), _KERNELS_KEPT) * _KERNEL_BYTES


def _heaviest(adapter: Adapter, tasks: dict[str, Task]) -> list[Block]:
    """The block with the widest input to compress, and the one with the most weights where that is another (of
    a model with dense blocks before its mixtures); not the first, whose input is the embeddings themselves,
    where there is another like it."""

    def size(block: Block) -> tuple[int, int]:
        refs = [ref for ref in block.linears if ref.name in tasks]
        return max((ref.in_features for ref in refs), default=0), sum(ref.weights for ref in refs)

    widest = max(adapter.blocks, key=lambda block: (size(block), block.index == 1))
    largest = max(adapter.blocks, key=lambda block: (size(block)[::-1], block.index == 1))
    return [widest] if size(widest) == size(largest) else [widest, largest]


def _places(
    adapter: Adapter, block: Block, stages: Sequence[Sequence[Task]], lanes: Lanes, size: int, look: Look
) -> list[Waiting]:
    """One lane at the block's entry, at each stage, and after it."""
    found = look.waiting(block, [stage[0].ref.name for stage in stages], lanes.rows, lanes.length)
    if len(found) == len(stages) + 2:
        return found
    stream = block.linears[0].in_features * size * lanes.tokens
    widest = max(max(ref.out_features for ref in block.linears) * size * lanes.tokens, stream)
    inputs = [block.linears[0].in_features, *(stage[0].ref.in_features for stage in stages), 0]
    half = _UNTRACED_STREAMS // 2 * stream
    return [Waiting("", half + width * size * lanes.tokens, half, 3 * widest) for width in inputs]


def _calibrated(
    block: Block, stages: Sequence[Sequence[Task]], places: Sequence[Waiting], plan: Plan, lanes: Lanes,
    budget: int, size: int,
) -> Iterator[tuple[str, MemoryTerms]]:
    """Stage by stage: lanes arrive, the stage is solved, its weights are decoded and packed."""
    installed = lasting = packed = 0
    for number, stage in enumerate(stages):
        ref, name = stage[0].ref, stage[0].ref.name
        before, here = places[number], places[number + 1]
        # Lanes that have arrived hold what they hold here, the others still what they held before.
        parked = min(budget, lanes.count * max(before.parked, here.parked))
        held = lanes.count * max(before.held, here.held)
        gram = FLOAT * ref.in_features**2 * max(map(_matrices, stage))
        widening = FLOAT * min(WAITING, lanes.count * lanes.tokens) * ref.in_features
        moving = MemoryTerms(gram, widening, 0, 0, 0, installed, packed, parked, held, here.step)
        yield f"computing up to {name}", moving
        waiting_here = MemoryTerms(
            0, 0, 0, 0, 0, 0, packed, min(budget, lanes.count * here.parked), lanes.count * here.held
        )
        solving, decoded = _solving(stage, size, lanes.ranks)
        yield f"solving {name}", replace(waiting_here, statistics=gram, installed=lasting, **solving)
        packed += sum(plan.layout.nbytes(task.ref, size) for task in stage)
        installed = lasting + decoded
        lasting += sum(task.ref.weights * size for task in stage if task.ref.name in block.lasting)
        decoding = installed + max(task.ref.weights for task in stage) * size
        yield f"decoding {name}", replace(waiting_here, values=solving["values"], installed=decoding, packed=packed)
    end = places[-1]
    parked = min(budget, lanes.count * max(places[-2].parked, end.parked))
    held = lanes.count * max(places[-2].held, end.held)
    yield "leaving the block", MemoryTerms(0, 0, 0, 0, 0, installed, packed, parked, held, end.step)


def _learning(
    adapter: Adapter, block: Block, stages: Sequence[Sequence[Task]], places: Sequence[Waiting], plan: Plan,
    lanes: Lanes, budget: int, itemsize: dict[str, int], look: Look,
) -> Iterator[tuple[str, MemoryTerms]]:
    """All weights of the block have a start and are tuned together, while the lanes wait behind it."""
    tasks = [task for stage in stages for task in stage]
    tuned = [task for task in tasks if task.tune is not None]
    weights = sum(task.ref.weights for task in tuned)
    size = itemsize[f"{tuned[0].ref.name}.weight"]
    state = adapter.model.state_dict()
    inside = {name: one for name, one in state.items() if name.startswith(block.name + ".")}
    narrow = {name for name in inside if itemsize[name] < FLOAT} - {f"{task.ref.name}.weight" for task in tuned}
    widened = FLOAT * sum(inside[name].numel() for name in narrow)
    largest = max(task.ref.weights for task in tuned)
    rounding = _LEARNING_BYTES * weights + _LEARNING_SPARE * largest + widened
    backward = _BACKWARD * FLOAT * lanes.tokens * max(ref.out_features for ref in block.linears)
    yield (
        f"tuning {block.name}",
        MemoryTerms(
            values=weights, installed=sum(task.ref.weights for task in tasks) * size,
            packed=sum(plan.layout.nbytes(task.ref, size) for task in tasks if task.tune is None),
            parked=min(budget, lanes.count * places[-2].parked), held=lanes.count * places[0].held,
            learning=rounding + backward + look.graph(block, lanes.rows, lanes.length),
        ),
    )  # fmt: skip


def _surveyed(
    block: Block, stages: Sequence[Sequence[Task]], places: Sequence[Waiting], plan: Plan, lanes: Lanes,
    budget: int, size: int,
) -> Iterator[tuple[str, MemoryTerms]]:
    """A block that runs several times: one more lane at a time goes through it, then all stages are solved
    while the others wait at its entry."""
    grams = [FLOAT * stage[0].ref.in_features ** 2 for stage in stages]
    widening = FLOAT * min(WAITING, lanes.count * lanes.tokens) * sum(stage[0].ref.in_features for stage in stages)
    waits = MemoryTerms(parked=min(budget, lanes.count * places[0].parked), held=lanes.count * places[0].held)
    looking = max(place.parked + place.held for place in places)
    yield (
        f"looking at {block.name}",
        replace(
            waits, statistics=sum(grams), widening=widening, held=waits.held + looking,
            step=max(place.step for place in places),
        ),
    )  # fmt: skip
    installed = packed = 0
    for number, stage in enumerate(stages):
        name = stage[0].ref.name
        solving, decoded = _solving(stage, size, lanes.ranks)
        left = sum(grams[number:])
        yield f"solving {name}", replace(waits, statistics=left, installed=installed, packed=packed, **solving)
        packed += sum(plan.layout.nbytes(task.ref, size) for task in stage)
        installed += decoded
        spare = max(task.ref.weights for task in stage) * size
        yield (
            f"decoding {name}",
            replace(
                waits, statistics=left - grams[number], values=solving["values"], installed=installed + spare,
                packed=packed,
            ),
        )  # fmt: skip
    end = places[-1]
    parked = min(budget, lanes.count * max(places[-2].parked, end.parked))
    held = lanes.count * max(places[-2].held, end.held)
    yield "leaving the block", MemoryTerms(installed=installed, packed=packed, parked=parked, held=held, step=end.step)


def _uncalibrated(
    stages: Sequence[Sequence[Task]], plan: Plan, size: int, ranks: int
) -> Iterator[tuple[str, MemoryTerms]]:
    """All stages of a block at once; only the witness goes along."""
    installed = packed = 0
    for stage in stages:
        solving, decoded = _solving(stage, size, ranks)
        yield f"solving {stage[0].ref.name}", MemoryTerms(installed=installed, packed=packed, **solving)
        packed += sum(plan.layout.nbytes(task.ref, size) for task in stage)
        installed += decoded
        spare = max(task.ref.weights for task in stage) * size
        yield (
            f"decoding {stage[0].ref.name}",
            MemoryTerms(values=solving["values"], installed=installed + spare, packed=packed),
        )


def _chunk(task: Task, columns: int) -> int:
    """Rows that a sweep takes at a time."""
    pruning = task.pruning
    alone = task.scheme is None and pruning is not None and pruning.pattern.group is not None
    weights = SPARSE[pruning.method].grouped if alone and pruning is not None else _SWEEP_WEIGHTS
    return max(64, weights // columns)


def _solving(stage: Sequence[Task], size: int, ranks: int) -> tuple[dict[str, int], int]:
    """({term: bytes} of `solve_stage` on one rank, bytes of the stage's weights decoded)."""
    weights = sum(task.ref.weights for task in stage)
    columns = stage[0].ref.in_features
    rows = -(-weights // columns // ranks)
    method = _SEARCH_WEIGHTS * _SEARCH_BYTES
    if stage[0].factorizes:
        chunk = min(rows, _chunk(stage[0], columns)) * columns
        method = max(method, chunk * _SWEEP_BYTES, FLOAT * columns * _TILE)
    elif stage[0].calibrated:
        method = max(method, min(rows, _LOSS_ROWS) * columns * _LOSS_BYTES)
    removing = [SPARSE[task.pruning.method] for task in stage if task.pruning is not None]
    chunk = min(rows, max(64, _SWEEP_WEIGHTS // columns)) * columns
    method = max(method, *(FLOAT * (one.squares * columns**2 + one.copies * chunk) for one in removing), 0)
    method = max(method, *(_factoring(task) for task in stage))
    stacked = rows * columns * size if len(stage) > 1 else 0
    if any(task.scale is not None for task in stage):
        stacked += weights * size  # a scaled copy
        method = max(method, min(rows, _SCALED_ROWS) * columns * _SCALED_BYTES)
    values = weights
    if ranks > 1:
        values += 2 * rows * columns  # this rank's own, and as they are sent
        method = max(method, 2 * FLOAT * _TILE * columns)  # a strip of the Gram matrix while it is summed
    return {"method": method, "stacked": stacked, "values": values}, weights * size


def _matrices(task: Task) -> int:
    """Gram matrices that are gathered for it: of the inputs now, of those in the source model, of both."""
    return 1 + task.source + task.crossed


def _factoring(task: Task) -> int:
    """Bytes of making factors, or of what is aimed at: in float64 the weight and its triangular form, products with it,
    eigenvectors; for the update the Gram matrix and its factor."""
    narrow, columns = min(task.ref.out_features, task.ref.in_features), task.ref.in_features
    made = 0 if task.factoring is None else 3 * task.ref.weights + 3 * narrow**2
    moved = 0 if task.factoring is not None else 2 * task.ref.weights  # the weight, and where it moves
    return DOUBLE * max(made, (task.ref.weights + moved + 2 * columns**2) * task.crossed)


def _outside(
    adapter: Adapter, plan: Plan, itemsize: dict[str, int], ranks: int
) -> Iterator[tuple[str, MemoryTerms]]:
    """What happens before and after the blocks."""
    head, tasks = adapter.head, plan.assignment.tasks
    size = itemsize[f"{head.name}.weight"] if head is not None else 0
    yield "reading", MemoryTerms()  # mapped, and looked through without a copy
    if head is not None:
        # Outputs stay while the last operation's input is still there.
        yield "computing the witness's output", MemoryTerms(logits=2 * _WITNESS_TOKENS * head.out_features * size)
    for ref in (adapter.embeddings, head):
        if ref is not None and ref.name in tasks:
            yield from _alone(ref, tasks[ref.name], plan, itemsize[f"{ref.name}.weight"], ranks)


def _alone(
    ref: LinearRef, task: Task, plan: Plan, size: int, ranks: int
) -> Iterator[tuple[str, MemoryTerms]]:
    """Embeddings or head as a stage of their own."""
    solving, decoded = _solving([task], size, ranks)
    gram = FLOAT * ref.in_features**2 * _matrices(task) if task.calibrated else 0
    yield f"solving {ref.name}", MemoryTerms(statistics=gram, **solving)
    packed = plan.layout.nbytes(ref, size)
    yield f"decoding {ref.name}", MemoryTerms(values=solving["values"], installed=2 * decoded, packed=packed)
