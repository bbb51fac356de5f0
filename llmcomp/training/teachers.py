"""The teachers that a plan names, as one function around one another: models, the student's past, a second student,
what was said before.

    models ─┐
    past    ├─ together ── remembered ──▶ the guide of an objective
    peer   ─┘
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from llmcomp.training.distill_plan import DistillPlan
from llmcomp.training.distilling import Distillation, Guide, Layers, Weights, project
from llmcomp.training.guides import once, together, watched
from llmcomp.training.past import Past
from llmcomp.training.peers import Pair
from llmcomp.training.taps import Taps
from llmcomp.training.trainer import Rules


@dataclass(frozen=True)
class Room:
    """Who is in the room.

    Attributes:
        student: the model that is trained; blocks: names of its blocks.
        teachers: models of their own, the first of which may be listened to; teacher_blocks: names of its blocks.
        peer: a second student.
    """

    student: Any
    blocks: Sequence[str]
    teachers: list[Any]
    teacher_blocks: Sequence[str]
    peer: Any = None


@contextmanager
def taught(
    plan: DistillPlan, room: Room, weights: Weights, layers: Layers, regression: bool,
    cached: Callable[[Guide], Guide] | None = None,
) -> Iterator[tuple[Distillation, Rules]]:  # fmt: skip
    """What a student is trained by, while it is; what was put on models for it is taken off behind it.

    Args:
        weights, layers: what is learned of what; layers of the past are the student's own.
        cached: a teacher → the same from disk, after which the models are let go.
    """
    objective = Distillation(
        temperature=plan.temperature, regression=regression, weights=weights, layers=layers, divergence=plan.divergence
    )
    if not weights.taught:
        yield objective, Rules()
        return
    student = room.student
    with ExitStack() as stack, ExitStack() as models:
        past = None if plan.past is None else Past(student, plan.past)
        if room.peer is None:
            width = student.config.hidden_size  # no name is given to a model that is to be let go
            its = width if past is not None else room.teachers[0].config.hidden_size
            stack.callback(project(student, weights, (width, its)))
        guides = _guides(room, past, weights, layers, models)
        if cached is not None:
            guides = [cached(together(guides, plan.temperature, regression))]
            models.close()
            room.teachers.clear()
        taps = Taps(student, room.blocks, layers.hidden(weights, 0), layers.attention(weights, 0))
        stack.callback(taps.close)
        objective = replace(objective, student=taps)
        if room.peer is not None:
            yield _mutual(objective, Pair(student, room.peer), guides, stack), Rules()
            return
        objective = replace(objective, guide=together(guides, plan.temperature, regression))
        yield objective, Rules([] if past is None else [past])


def _guides(room: Room, past: Past | None, weights: Weights, layers: Layers, models: ExitStack) -> list[Guide]:
    """All models as teachers; the first is listened to, unless a second student stands in its place."""
    found, others = list[Guide](), room.teachers
    if room.peer is None:
        first, blocks = (room.teachers[0], room.teacher_blocks) if past is None else (past.model, room.blocks)
        others = room.teachers[1:] if past is None else room.teachers
        above = Taps(first, blocks, layers.hidden(weights, 1), layers.attention(weights, 1))
        models.callback(above.close)
        found.append(watched(first, above))
    return [*found, *(watched(model, Taps(model, ())) for model in others)]


def _mutual(objective: Distillation, pair: Pair, guides: Sequence[Guide], stack: ExitStack) -> Distillation:
    """Each of two students is taught by the other, and by the teachers that there are besides, who are asked once."""
    stack.callback(pair.leave)
    besides = [once(guide) for guide in guides]
    temperature, regression = objective.temperature, objective.regression
    one, other = (together([peer, *besides], temperature, regression) for peer in pair.teachers())
    second = replace(objective, guide=other, student=None)
    return replace(objective, guide=one, beside=pair.loss(second.loss))

