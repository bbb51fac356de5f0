"""What is timed is what a user computes: the tokens of `generate`, the model's own forward."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import build, tiny

from llmcomp.measure import engines
from llmcomp.measure.bench_process import Job
from llmcomp.measure.engines import Forwards, Writer, open_transformers

NEW = 5


def written(writer: Writer, prompt: torch.Tensor) -> torch.Tensor:
    """[batch, NEW], greedily."""
    writer.read(prompt)
    tokens = [writer.newest]
    for _ in range(NEW - 1):
        writer.step()
        tokens.append(writer.newest)
    return torch.cat(tokens, 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("compiled", [False, True], ids=["growing cache", "fixed cache"])
def test_a_writer_writes_what_generate_does(
    name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)  # the cache of fixed size is what is tested
    model = build(name)
    writer = Writer(model, 0.0, 0.0, room=12 + NEW if compiled else None)
    prompt = writer.prompt(2, 12)
    assert prompt.shape == (2, 12) and torch.equal(prompt, writer.prompt(2, 12))
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW, eos_token_id=-1
    )[:, 12:]
    assert torch.equal(written(writer, prompt), expected)
    assert torch.equal(written(writer, prompt), expected)  # a prompt is read afresh


def test_a_prompt_ends_with_the_logits_of_its_last_position_alone() -> None:
    model = build("llama")
    writer = Writer(model, 0.0, 0.0, room=None)
    shapes = []
    model.lm_head.register_forward_hook(lambda module, given, out: shapes.append(tuple(out.shape)))
    writer.read(writer.prompt(2, 9))
    assert shapes == [(2, 1, model.config.vocab_size)]


def test_forwards_call_the_model_with_all_it_reads() -> None:
    model = build("t5")
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    engine = Forwards(model, 0.0, 0.0, compiled=False)
    engine.read(engine.prompt(3, 7))
    assert {name: tuple(value.shape) for name, value in seen[0].items()} == {
        "input_ids": (3, 7), "decoder_input_ids": (3, 7),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "new", "kind"), [("llama", 4, Writer), ("bert-classifier", 0, Forwards)])
def test_opening_times_the_load_apart_from_the_first_forward(
    name: str, new: int, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the clock: at the start, when the first module is called, at the end; however many modules there are."""
    readings = iter([10.0, 13.0, 17.0])
    monkeypatch.setattr(engines, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    engine = open_transformers(Job(str(tiny(name, tmp_path)), 1, ((1, 8),), new, 1))
    assert isinstance(engine, kind) and (engine.load_seconds, engine.ready_seconds) == (3.0, 7.0)
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert engine.holding().tensors > 0
