"""Students cut from tiny random teachers: which blocks, which weights, and that transformers opens them again."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny

from llmcomp.adapters.discover import discover, skeleton
from llmcomp.errors import BadCheckpoint, BadRecipe
from llmcomp.measure.load import load
from llmcomp.training.students import Cut, Made, configured_student, cut_student, parse_cut

FAMILIES = {
    "bert-classifier": "bert.encoder.layer", "roberta": "roberta.encoder.layer", "modernbert": "model.layers",
    "gpt2": "transformer.h", "llama": "model.layers", "mistral": "model.layers", "qwen3": "model.layers",
    "vit-classifier": None, "distilbert-classifier": "distilbert.transformer.layer",
}  # fmt: skip


def made(directory: Path, said: str, seed: int = 0) -> tuple[object, Made]:
    cut = parse_cut(said)
    assert cut is not None
    teacher = load(directory, auto=_auto(directory))
    return teacher, cut_student(teacher, discover(skeleton(directory)), cut, seed)


def _auto(directory: Path) -> object:
    import transformers

    return getattr(transformers, json.loads((directory / "config.json").read_text())["architectures"][0])


@pytest.mark.parametrize("name", FAMILIES)
def test_fewer_blocks_are_the_teachers(name: str, tmp_path: Path) -> None:
    count = {"num_hidden_layers": 4} if name not in ("gpt2", "distilbert-classifier") else {}
    count |= {"n_layer": 4} if name == "gpt2" else {"n_layers": 4} if name.startswith("distil") else {}
    teacher, found = made(tiny(name, tmp_path / "teacher", **count), "blocks=1+3")
    blocks = [block.name for block in discover(skeleton(tmp_path / "teacher")).blocks]
    for own, its in enumerate((1, 3)):
        student_block = found.model.get_submodule(blocks[own])
        known = dict(teacher.get_submodule(blocks[its]).named_parameters())  # type: ignore[attr-defined]
        for leaf, value in student_block.named_parameters():
            if leaf in known:  # ModernBERT's first block has no norm, which one that comes first leaves out
                assert torch.equal(value, known[leaf]), leaf
    assert found.copied == found.of and found.kept == (1, 3) and len(blocks) == 4
    found.model.save_pretrained(tmp_path / "student")
    again, info = _auto(tmp_path / "teacher").from_pretrained(  # type: ignore[attr-defined]
        tmp_path / "student", output_loading_info=True
    )
    assert not any(info.values())
    for key, value in found.model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "modernbert", "vit-classifier"])
def test_narrower_ones_have_the_shapes_asked_for(name: str, tmp_path: Path) -> None:
    """And the same weights for the same seed, others for another."""
    _, found = made(tiny(name, tmp_path / "teacher"), "layers=1,hidden=64,heads=2,mlp=96")
    config = found.model.config
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (64, 2, 1)
    shapes = {tuple(value.shape) for value in found.model.parameters()}
    assert any(96 in shape for shape in shapes) and not any(128 in shape[-1:] for shape in shapes if len(shape) == 2)
    assert found.copied < 0.2 * found.of and "the others drawn" in found.described
    _, same = made(tmp_path / "teacher", "layers=1,hidden=64,heads=2,mlp=96")
    _, other = made(tmp_path / "teacher", "layers=1,hidden=64,heads=2,mlp=96", seed=1)
    states = [one.model.state_dict() for one in (found, same, other)]
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
    assert any(not torch.equal(states[0][key], value) for key, value in states[2].items())


def test_a_window_of_its_own_stays_with_its_block(tmp_path: Path) -> None:
    _, found = made(tiny("gemma2", tmp_path / "teacher"), "blocks=1")
    assert found.model.config.layer_types == ["full_attention"]


def test_a_config_of_its_own(tmp_path: Path) -> None:
    path = tiny("bert", tmp_path / "teacher")
    config = {**json.loads((path / "config.json").read_text()), "num_hidden_layers": 1}
    (tmp_path / "small.json").write_text(json.dumps(config))
    teacher, adapter = load(path), discover(skeleton(path))
    found = configured_student(teacher, adapter, tmp_path / "small.json", 0)
    assert found.copied == found.of and found.model.config.num_hidden_layers == 1
    (tmp_path / "other.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(BadCheckpoint, match="it is of llama and the teacher of bert"):
        configured_student(teacher, adapter, tmp_path / "other.json", 0)


@given(st.integers(1, 40), st.integers(0, 40))
def test_blocks_are_spread_evenly(count: int, more: int) -> None:
    kept = Cut(layers=count).kept(count + more)
    assert list(kept) == sorted(set(kept)) and kept[0] == 0 and len(kept) == count
    if count > 1:
        assert kept[-1] == count + more - 1
        steps = [later - earlier for earlier, later in pairwise(kept)]
        assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("layers=9", "the teacher has 2; take fewer"),
        ("blocks=0+2", "has blocks 0 to 1"),
        ("blocks=1+0", "name some in order"),
        ("layers=0", "layers is at least 1"),
        ("depth=2", "depth=2 is none of what it takes"),
        ("layers=two", "layers=two is none of what it takes"),
        ("layers=1,blocks=0", "leave layers or blocks out"),
        ("hidden=60,heads=7", "the heads divide the width"),
    ],
)
def test_students_that_cannot_be(said: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=why):
        made(tiny("bert", tmp_path / "teacher"), said)


def test_shared_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="shares one block among its layers"):
        made(tiny("albert", tmp_path / "teacher"), "layers=1")
