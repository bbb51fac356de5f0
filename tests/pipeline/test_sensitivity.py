"""Taylor scores against gradients of weights and of gates, sample by sample, in float64 by plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, build, tiny
from torch import Tensor

from llmcomp.adapters.units import Part, heads_of, neurons_of
from llmcomp.devices import CPU
from llmcomp.errors import NumericalError
from llmcomp.methods.structured import taylor_importance
from llmcomp.pipeline.job import Source, open_source
from llmcomp.pipeline.sensitivity import sensitivities

ROWS, LENGTH, PADDED = 3, 12, 4
MODELS = ("llama", "bert-classifier", "gpt2", "phi3", "mixtral")
IDS = torch.randint(8, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_fill_(1, torch.arange(LENGTH - PADDED, LENGTH), 0)
MASK[1:] = 1  # only the first row is padded
LABELS = torch.tensor([1, 0, 1])


def parts_of(source: Source) -> list[Part]:
    found = [find for block in source.adapter.blocks
             for find in (heads_of(block, source.adapter.config), neurons_of(block))]  # fmt: skip
    return [part for part in found if isinstance(part, Part)]


def measured(source: Source, split: tuple[int, ...], labels: Tensor | None) -> dict[str, list[float]]:
    batches = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(IDS.split(split), MASK.split(split),
                                                                             strict=True)]  # fmt: skip
    given_labels = None if labels is None else list(labels.split(split))
    release = source.checkpoint.release
    return sensitivities(source.adapter, source.binding, batches, given_labels, parts_of(source), CPU, release)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    root = tmp_path_factory.mktemp("sources")
    return {name: open_source(tiny(name, root / name, tokenizer=True)) for name in MODELS}


def loss_of(model: Any, row: int, labels: Tensor | None) -> Tensor:
    """Of one sample: the tokens that follow, summed, or its label."""
    logits = model(input_ids=IDS[row : row + 1], attention_mask=MASK[row : row + 1]).logits[0]
    if labels is not None:
        return F.cross_entropy(logits, labels[row])
    known = int(MASK[row].sum())
    return -sum(logits[place].log_softmax(-1)[IDS[row, place + 1]] for place in range(known - 1))


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_gradients_of_weights_and_gates(name: str, sources: dict[str, Source]) -> None:
    source, labels = sources[name], LABELS if "classifier" in name else None
    found = measured(source, (ROWS,), labels)
    plain: Any = type(build(name))
    model = plain.from_pretrained(source.checkpoint.path, dtype=torch.float64, experts_implementation="eager").eval()
    gates = {block.name: torch.ones((), dtype=torch.float64, requires_grad=True) for block in source.adapter.blocks}
    for block, gate in gates.items():
        def gated(module: Any, positional: Any, output: Any, gate: Tensor = gate) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            changed = positional[0] + gate * (first - positional[0])
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        model.get_submodule(block).register_forward_hook(gated)
    weights = {part.output.name: model.get_submodule(part.output.name).weight for part in parts_of(source)}
    gradients: dict[str, list[Tensor]] = {name: [] for name in (*weights, *gates)}
    for row in range(ROWS):
        found_here = torch.autograd.grad(loss_of(model, row, labels), [*weights.values(), *gates.values()])
        for key, gradient in zip(gradients, found_here, strict=True):
            gradients[key].append(gradient)
    for part in parts_of(source):
        turn = (lambda one: one.T) if part.output.transposed else (lambda one: one)
        units = torch.arange(part.output.in_features).reshape(-1, part.size)
        weight = turn(weights[part.output.name].detach())
        wanted = taylor_importance(weight, map(turn, gradients[part.output.name]), units) / ROWS
        assert torch.tensor(found[part.output.name]).double() == pytest.approx(wanted, rel=1e-3, abs=1e-9)
    for block in gates:
        wanted_score = float(sum(gradient.square() for gradient in gradients[block])) / ROWS
        assert found[block] == [pytest.approx(wanted_score, rel=1e-3, abs=1e-9)]
    assert set(found) == {*weights, *gates}
    assert all(value.is_meta for value in source.adapter.model.parameters())  # as it was before


@settings(max_examples=4, deadline=None)
@given(split=st.sampled_from([(1, 2), (2, 1), (1, 1, 1)]), name=st.sampled_from(["llama", "bert-classifier"]))
def test_scores_do_not_depend_on_how_samples_are_batched(
    sources: dict[str, Source], split: tuple[int, ...], name: str
) -> None:
    labels = LABELS if "classifier" in name else None
    together, apart = measured(sources[name], (ROWS,), labels), measured(sources[name], split, labels)
    for key, scores in together.items():
        assert apart[key] == pytest.approx(scores, rel=1e-3, abs=1e-9)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny("llama", tmp_path / "source", tokenizer=True)
    stored = load_file(path / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj"):
        measured(open_source(path), (ROWS,), None)
