"""The teachers that a plan names, as one function around one another: models, the student's past, a second student,
what was said before.

    models ─┐
    past    ├─ together ── remembered ──▶ the guide of an objective
    peer   ─┘
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from llmcomp.calibration.data import Texts
from llmcomp.calibration.media import Media
from llmcomp.measure.inputs import max_positions
from llmcomp.training.data import Batch, Samples, Windows, key_of, samples_of
from llmcomp.training.distill_plan import DistillPlan
from llmcomp.training.distilling import Distillation, Guide, Layers, Weights, project
from llmcomp.training.guides import once, together, watched
from llmcomp.training.past import Past
from llmcomp.training.peers import Pair
from llmcomp.training.taps import Taps
from llmcomp.training.trainer import Rules
from llmcomp.training.translating import Reader, aligned, of_next_tokens, of_rows, shared_tokens, translator

Collate = Callable[[Sequence[Batch]], Batch]


@dataclass(frozen=True)
class Room:
    """Who is in the room.

    Attributes:
        student: the model that is trained; blocks: names of its blocks.
        teachers: models of their own, the first of which may be listened to; teacher_blocks: names of its blocks.
        peer: a second student.
        readers: {number of a teacher: what lets it read tokens of its own}.
    """

    student: Any
    blocks: Sequence[str]
    teachers: list[Any]
    teacher_blocks: Sequence[str]
    peer: Any = None
    readers: dict[int, Reader] = field(default_factory=dict)


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
        yield objective, Rules(() if past is None else (past,))


def _guides(room: Room, past: Past | None, weights: Weights, layers: Layers, models: ExitStack) -> list[Guide]:
    """All models as teachers; the first is listened to, unless a second student stands in its place."""
    guides: list[Guide] = []
    listened = room.blocks if past is not None else room.teacher_blocks
    for number, model in enumerate([*([] if past is None else [past.model]), *room.teachers]):
        if number or room.peer is not None:
            above = Taps(model, ())
        else:
            above = Taps(model, listened, layers.hidden(weights, 1), layers.attention(weights, 1))
            models.callback(above.close)
        reader = room.readers.get(number - (past is not None))
        guides.append(watched(model, above) if reader is None else reader(watched(model, above)))
    return guides


def _mutual(objective: Distillation, pair: Pair, guides: Sequence[Guide], stack: ExitStack) -> Distillation:
    """Each of two students is taught by the other, and by the teachers that there are besides, who are asked once."""
    stack.callback(pair.leave)
    besides = [once(guide) for guide in guides]
    temperature, regression = objective.temperature, objective.regression
    one, other = (together([peer, *besides], temperature, regression) for peer in pair.teachers())
    second = replace(objective, guide=other, student=None)
    return replace(objective, guide=one, beside=pair.loss(second.loss))


def read_own_tokens(
    plan: DistillPlan, room: Room, foreign: Mapping[str, Any], texts: Texts | Media, samples: Samples, tokenizer: Any,
    task: str, collate: Collate, note: Callable[[str], None],
) -> Collate:  # fmt: skip
    """Let teachers of other tokens read theirs; gives batches of what then can be compared.

    Args:
        foreign: {name of such a teacher: its tokenizer}. texts: what the samples were cut from.
        tokenizer: the student's.

    Raises:
        BadRecipe: vocabularies that share nothing.
    """
    for number, name in enumerate(plan.asked):
        if name not in foreign:
            continue
        assert isinstance(texts, Texts) and isinstance(samples, Windows)
        its, model = foreign[name], room.teachers[number]
        pad = its.pad_token_id or 0
        if task == "causal-lm":
            shared, classes = shared_tokens(tokenizer, its), room.student.config.vocab_size
            translate = translator(tokenizer, its, max_positions(model, its))
            room.readers[number] = of_next_tokens(translate, shared, classes, plan.temperature, pad)
            collate = aligned(collate, translate)
            note(f"Compared over {len(shared[0]):,} tokens that both vocabularies have, of {classes:,}.")
            continue
        read = samples_of(
            replace(texts, labels=None), its, model, task, length=plan.sequence_length, count=plan.samples,
            seed=plan.seed, taught=True,
        )  # fmt: skip
        pairs = zip(samples.windows, read.windows, strict=True)
        room.readers[number] = of_rows({key_of(own.numpy()): other for own, other in pairs}, pad)
    return collate
