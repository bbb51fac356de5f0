"""Two students in one training: their loss and gradients are those of each by itself, the other's answer a constant."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from test_distilling_objective import BLOCKS, batch
from tiny import build
from torch import Tensor

from llmcomp import losses
from llmcomp.training.distill_plan import DistillPlan
from llmcomp.training.distilling import Distillation, Guide, Layers, Weights
from llmcomp.training.peers import PEER
from llmcomp.training.teachers import Room, taught

WEIGHTS = Weights(hard=0.4, soft=0.6)


def student(seed: int) -> Any:
    return build("bert-classifier", seed=seed, num_hidden_layers=1).requires_grad_(True)


def answer(model: Any, given: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    return logits


def mean(logits: list[Tensor], temperature: float) -> Tensor:
    """Logits of the mean of distributions."""
    return temperature * torch.stack([(one / temperature).softmax(-1) for one in logits]).mean(0).log()


@pytest.mark.parametrize("besides", [0, 1])
def test_each_learns_from_the_other(besides: int) -> None:
    one, two, given = student(1), student(2), batch()
    further = [build("bert-classifier", seed=3) for _ in range(besides)]
    said = [answer(model, given).detach() for model in (one, two, *further)]
    alone = []
    for model, others in ((one, said[1:]), (two, [said[0], *said[2:]])):
        logits = answer(model, given)
        loss = 0.4 * losses.hard_targets(logits, given["labels"])
        loss = loss + 0.6 * losses.soft_targets(logits, mean(others, 2.0), given["scored"], 2.0)
        loss.backward()
        alone.append(float(loss.detach()))
    wanted = {name: value.grad.clone() for name, value in [*named(one, ""), *named(two, f"{PEER}.")]}
    one.zero_grad()
    two.zero_grad()
    plan = DistillPlan("a", "b", peer="c", temperature=2.0)
    room = Room(one, BLOCKS[:1], further, BLOCKS, two)
    with taught(plan, room, WEIGHTS, Layers((), (0, 0)), False) as (objective, rules):
        assert isinstance(objective, Distillation) and not rules.callbacks
        loss = objective.loss(answer(one, given), given)
        loss.backward()
        found = dict(named(one, ""))
        assert float(loss.detach()) == pytest.approx(sum(alone), rel=1e-5)
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert torch.allclose(value.grad, wanted[name], atol=1e-6), name
    assert not any(name.startswith(PEER) for name, _ in one.named_parameters()) and not one._forward_hooks


def named(model: Any, prefix: str) -> list[tuple[str, Any]]:
    return [(f"{prefix}{name}", value) for name, value in model.named_parameters()]


def test_parts_of_a_step_add_up_to_it() -> None:
    """Of both students, with unequal numbers of labels."""
    one, two = student(1), student(2)
    plan = DistillPlan("a", "b", peer="c")
    with taught(plan, Room(one, BLOCKS[:1], [], BLOCKS, two), WEIGHTS, Layers((), (0, 0)), False) as (objective, _):
        parts = [batch(slice(0, 1)), batch(slice(1, 4))]
        counts = objective.counts(parts)
        whole = float(objective.loss(answer(one, batch()), batch()).detach())
        found = [float(objective.loss(answer(one, part), part, counts).detach()) for part in parts]
    assert sum(found) == pytest.approx(whole, rel=1e-5)


def test_a_cache_lets_its_teachers_go() -> None:
    """Nothing holds on to a model whose answers are on disk."""
    one, models = student(1), [build("bert-classifier")]
    left, plan = weakref.ref(models[0]), DistillPlan("a", "b")
    room = Room(one, BLOCKS[:1], models, BLOCKS)

    def cached(guide: Guide) -> Guide:
        said = guide({name: batch()[name] for name in ("input_ids", "attention_mask")})
        return lambda inputs: said

    with taught(plan, room, WEIGHTS, Layers((), (0, 0)), False, cached) as (objective, _):
        gc.collect()
        assert left() is None
        assert float(objective.loss(answer(one, batch()), batch()).detach()) > 0
