"""The composed objective against its parts, each from hidden states and projections that are computed the slow way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, build
from torch import Tensor, nn

from llmcomp import inner_losses, losses
from llmcomp.training.distilling import (
    METHODS,
    PROJECTIONS,
    Distillation,
    Layers,
    Targets,
    Weights,
    project,
)
from llmcomp.training.guides import ensemble, mean_scores, once, together, watched
from llmcomp.training.taps import Taps

BLOCKS = [f"bert.encoder.layer.{number}" for number in range(2)]
ALL = Weights(0.3, 0.7, 0.5, 1.1, 1.3, 1.7, 1.9, 2.3)
LAYERS = Layers(((0, 1),), (0, 1), (3, 2, 1, 0), 4)


def batch(rows: slice = slice(None)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (4, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]).long()
    whole = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, losses.IGNORED, 1]),
             "scored": torch.ones(4, dtype=torch.bool)}  # fmt: skip
    return {name: value[rows] for name, value in whole.items()}


def pair(weights: Weights, width: int = 128) -> tuple[Any, Any, Distillation]:
    narrow = {"hidden_size": width, "intermediate_size": 64}
    student = build("bert-classifier", seed=1, num_hidden_layers=1, **narrow)
    teacher = build("bert-classifier")
    project(student, weights, (width, 128))
    own = Taps(student, BLOCKS, LAYERS.hidden(weights, 0), LAYERS.attention(weights, 0))
    its = Taps(teacher, BLOCKS, LAYERS.hidden(weights, 1), LAYERS.attention(weights, 1))
    objective = Distillation(
        temperature=2.0, guide=watched(teacher, its), student=own, weights=weights, layers=LAYERS
    )
    return student, teacher, objective


def value(student: Any, objective: Distillation, given: dict[str, Tensor], counts: Tensor | None = None) -> Tensor:
    logits = student(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    return objective.loss(logits, given, counts)


def slow(model: Any, layer: int, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Logits, what the first block reads, the layer's output, its queries, keys and values [B, H, L, D]."""
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    made = model(**inputs, output_hidden_states=True)
    states, attention = made.hidden_states, model.get_submodule(BLOCKS[layer]).attention.self
    heads = [
        linear(states[layer]).unflatten(-1, (4, -1)).transpose(1, 2)
        for linear in (attention.query, attention.key, attention.value)
    ]
    return made.logits, states[0], states[layer + 1], *heads


@pytest.mark.parametrize("width", [128, 64])
def test_it_is_the_sum_of_its_parts(width: int) -> None:
    weights = ALL if width == 128 else replace(ALL, cosine=0.0)
    student, teacher, objective = pair(weights, width)
    given = batch()
    found = value(student, objective, given)
    objective.student.close()  # type: ignore[union-attr]
    (logits, first, last, *own), (targets, its_first, its_last, *its) = slow(student, 0, given), slow(teacher, 1, given)
    there = given["attention_mask"].bool()
    seen = there[:, None, None, :]
    projected = getattr(student, PROJECTIONS, {"hidden": nn.Identity(), "embedding": nn.Identity()})
    products = [(query / query.shape[-1] ** 0.5, key) for query, key, _ in (own, its)]
    terms = {
        "hard": losses.hard_targets(logits, given["labels"]),
        "soft": losses.soft_targets(logits, targets, given["scored"], 2.0),
        "cosine": inner_losses.cosine(last, its_last, there) if width == 128 else torch.tensor(0.0),
        "embedding": inner_losses.states(projected["embedding"](first), its_first, there),
        "hidden": inner_losses.states(projected["hidden"](last), its_last, there),
        "attention": inner_losses.attention_scores(
            products[0], (products[1][0].flip(1), products[1][1].flip(1)), seen, there
        ),
        "relation": torch.stack([
            inner_losses.relations(one, two, there, 4) for one, two in zip(own, its, strict=True)
        ]),
        "transfer": inner_losses.attention_transfer(last, its_last, there),
    }
    parts = {name: float(term.detach().sum()) for name, term in terms.items()}
    wanted = sum(part * getattr(weights, name) for name, part in parts.items())
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)
    assert all(part > 0 for name, part in parts.items() if getattr(weights, name))


def test_parts_of_a_step_add_up_to_it() -> None:
    """As accumulated forwards and processes do, with unequal numbers of tokens, labels and rows."""
    student, _, objective = pair(replace(ALL, cosine=0.0), 64)
    counts = objective.counts([batch(slice(0, 1)), batch(slice(1, 4))])
    assert counts.tolist() == [3, 4, 22, 4]
    whole = float(value(student, objective, batch()))
    parts = [float(value(student, objective, batch(part), counts)) for part in (slice(0, 1), slice(1, 4))]
    assert sum(parts) == pytest.approx(whole, rel=1e-5)


def test_every_parameter_has_a_gradient_and_the_teacher_none() -> None:
    """Projections and a head that no loss asks for, too: DDP waits for each."""
    student, teacher, objective = pair(Weights(hidden=1.0, embedding=1.0), 64)
    value(student, objective, batch()).backward()
    assert all(one.grad is not None for one in student.parameters())
    assert all(one.grad is None for one in teacher.parameters())
    assert float(getattr(student, PROJECTIONS)["hidden"].weight.grad.abs().sum()) > 0


def test_projections_leave_no_trace() -> None:
    student = build("bert-classifier", hidden_size=64, intermediate_size=64)
    before = list(student.state_dict())
    leave = project(student, METHODS["tinybert"], (64, 128))
    assert list(student.state_dict()) != before
    leave()
    assert list(student.state_dict()) == before and not student._forward_hooks


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_an_ensemble_is_the_mean_of_its_distributions(temperature: float) -> None:
    logits = [torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    guides = [lambda inputs, one=one: Targets(one) for one in logits]
    made = ensemble(guides, temperature)({}).logits
    assert isinstance(made, Tensor)
    mean = torch.stack([(one.double() / temperature).softmax(-1) for one in logits]).mean(0)
    assert torch.allclose((made.double() / temperature).softmax(-1), mean, atol=1e-6)
    scores = mean_scores(guides)({}).logits
    assert isinstance(scores, Tensor) and torch.allclose(scores, torch.stack(logits).mean(0))
    twice = together([guides[0], guides[0]], temperature, False)({}).logits
    assert isinstance(twice, Tensor)  # of one teacher twice is that teacher, but for what a softmax does not see
    assert torch.allclose(twice.log_softmax(-1), logits[0].log_softmax(-1), atol=1e-5)
    assert together(guides[:1], temperature, False) is guides[0]


def test_a_teacher_is_asked_once_about_a_batch() -> None:
    asked = []
    guide = once(lambda inputs: Targets(torch.tensor([[float(asked.append(1) or len(asked))]])))  # type: ignore[func-returns-value]
    ids, others = torch.zeros(1, 2), torch.zeros(1, 2)
    found = [guide({"input_ids": one}).logits for one in (ids, ids, others, ids)]
    assert [float(one) for one in found if isinstance(one, Tensor)] == [1, 1, 2, 3]


def test_without_a_teacher_nothing_is_asked() -> None:
    student, _, objective = pair(METHODS["labels"], 128)
    given = batch()
    alone = replace(objective, guide=None, student=None, weights=METHODS["labels"])
    wanted = losses.hard_targets(student(**{n: given[n] for n in ("input_ids", "attention_mask")}).logits,
                                 given["labels"])  # fmt: skip
    assert torch.equal(value(student, alone, given), wanted)
