"""Lanes: every linear computed once, on the inputs that compressed earlier stages give; parking; padding."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PAD, VOCABULARY, build
from torch import Tensor, nn

from llmcomp.calibration import parking as parking_module
from llmcomp.calibration.capture import Lane, Stop, advance_all, stopping
from llmcomp.calibration.parking import Parking
from llmcomp.calibration.stats import GramAccumulator, InputStats
from llmcomp.errors import RunError

# model → (its blocks, the stages of a block)
STRUCTURES = {
    "llama": (
        ("model.layers.0", "model.layers.1"),
        (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ),
    ),
    "bert": (
        ("bert.encoder.layer.0", "bert.encoder.layer.1"),
        (
            ("attention.self.query", "attention.self.key", "attention.self.value"),
            ("attention.output.dense",),
            ("intermediate.dense",),
            ("output.dense",),
        ),
    ),
}


def stages(name: str) -> list[tuple[str, ...]]:
    blocks, inside = STRUCTURES[name]
    return [tuple(f"{block}.{leaf}" for leaf in stage) for block in blocks for stage in inside]


def batches(name: str) -> list[dict[str, Tensor]]:
    """Three batches of different shapes; the encoder's are padded."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for rows, length in ((2, 24), (1, 30), (3, 9)):
        ids = torch.randint(8, VOCABULARY, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        if name == "bert":
            for row in range(rows):
                mask[row, length - 2 * row :] = 0
            ids[mask == 0] = PAD
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def coarsen(model: nn.Module, names: tuple[str, ...]) -> None:
    """Stands for compression: weights on a coarse grid, by a new parameter as the pipeline does it."""
    for name in names:
        module = model.get_submodule(name)
        module.weight = nn.Parameter((module.weight.detach() * 12).round() / 12, requires_grad=False)


def calibrate(
    model: nn.Module, name: str, parking: Parking | None = None
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Inputs of the first linear of each stage, lane by lane, and the outputs, through lanes."""
    todo = {linear: stage for stage in stages(name) for linear in stage}
    pending, seen = set(todo), {}
    modules = {linear: model.get_submodule(linear) for linear in todo}
    blocks = {block: model.get_submodule(block) for block in STRUCTURES[name][0]}
    lanes = [Lane(model, batch) for batch in batches(name)]

    def visit(lane: Lane, stop: Stop) -> None:
        assert stop.inputs is not None
        if stop.kind == "linear":
            seen.setdefault(stop.name, []).append(stop.inputs.clone())
        if parking is not None:
            parking.park(lane.held())

    with stopping(model, blocks, modules, pending.__contains__):
        while (reached := advance_all(lanes, visit)) is not None:
            if reached.kind == "linear":
                coarsen(model, todo[reached.name])
                pending.difference_update(todo[reached.name])
    assert not pending
    return seen, [lane.output.logits for lane in lanes]


def inputs_by_plain_hooks(model: nn.Module, linear: str, name: str) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = model.get_submodule(linear).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].clone())
    )
    with torch.no_grad():
        for batch in batches(name):
            model(**batch)
    handle.remove()
    return seen


# --- sequential inputs ---


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_inputs_are_those_of_a_model_whose_earlier_stages_are_compressed(name: str) -> None:
    original = build(name)
    found, outputs = calibrate(copy.deepcopy(original), name)
    model = copy.deepcopy(original)
    assert list(found) == [stage[0] for stage in stages(name)]  # a stage stops once, at its first linear
    for stage in stages(name):
        wanted = inputs_by_plain_hooks(model, stage[0], name)
        for ours, theirs in zip(found[stage[0]], wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        coarsen(model, stage)
    with torch.no_grad():
        for ours, batch in zip(outputs, batches(name), strict=True):
            torch.testing.assert_close(ours, model(**batch).logits, rtol=1e-4, atol=1e-5)
    # The coarse stages do change what comes after them, or nothing would have been shown.
    last = stages(name)[-1][0]
    unchanged = inputs_by_plain_hooks(original, last, name)
    assert float((unchanged[0] - found[last][0]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_every_linear_is_computed_once_a_window(name: str) -> None:
    model, calls = build(name), Counter[str]()

    def counting(linear: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any, **kwargs: Any) -> Tensor:
            calls[linear] += 1
            return forward(*args, **kwargs)

        return counted

    for linear, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.forward = counting(linear, module.forward)
    calibrate(model, name)
    assert {linear for stage in stages(name) for linear in stage} <= set(calls)
    assert set(calls.values()) == {len(batches(name))}


def test_blocks_stop_before_their_first_linear_and_in_order() -> None:
    model = build("llama")
    blocks = {block: model.get_submodule(block) for block in STRUCTURES["llama"][0]}
    linear = "model.layers.1.mlp.down_proj"
    lane, reached = Lane(model, batches("llama")[0]), []
    with stopping(model, blocks, {linear: model.get_submodule(linear)}, lambda _: True):
        while (stop := lane.advance()) is not None:
            reached.append((stop.kind, stop.name))
    assert reached == [("block", "model.layers.0"), ("block", "model.layers.1"), ("linear", linear)]
    assert not lane.output.logits.requires_grad


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_a_block_that_is_repeated_goes_on_with_the_weights_that_it_has_by_then(name: str) -> None:
    model, block = build(name), STRUCTURES[name][0][0]
    wanted = copy.deepcopy(model)
    inside = tuple(f"{block}.{leaf}" for stage in STRUCTURES[name][1] for leaf in stage)
    coarsen(wanted, inside)
    places = {one: model.get_submodule(one) for one in STRUCTURES[name][0]}
    lanes, waiting = [Lane(model, batch) for batch in batches(name)], {block}
    with stopping(model, places, {}, lambda _: False, waiting.__contains__):
        calls: list[Stop] = []
        advance_all(lanes, lambda lane, stop: calls.append(stop))
        assert all(stop.call is not None for stop in calls)
        left = advance_all(lanes, lambda lane, stop: None)
        assert left == Stop("exit", block, None)
        waiting.clear()
        coarsen(model, inside)
        following = Stop("block", STRUCTURES[name][0][1], None, chained=True)
        assert advance_all(lanes, lambda lane, stop: None) == following
        assert advance_all(lanes, lambda lane, stop: None) is None
    with torch.no_grad():
        for lane, batch in zip(lanes, batches(name), strict=True):
            torch.testing.assert_close(lane.output.logits, wanted(**batch).logits, rtol=1e-5, atol=1e-6)


# --- hooks, errors, ends ---


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


class Chain(nn.Module):
    """Three blocks; what the second gives is changed before the third reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.blocks[2](self.blocks[1](self.blocks[0](inputs)) * 2)


@pytest.mark.parametrize("repeated", [(), ("1",)])
def test_a_stop_says_whether_a_block_reads_what_the_one_before_has_given(repeated: tuple[str, ...]) -> None:
    model = Chain()
    blocks = {str(number): block for number, block in enumerate(model.blocks)}
    with stopping(model, blocks, {}, lambda name: False, repeated.__contains__):
        lanes = [Lane(model, {"inputs": torch.ones(rows, 4)}) for rows in (1, 2)]
        found = [[], []]
        for _ in range(3 + len(repeated)):
            for lane, seen in zip(lanes, found, strict=True):
                stop = lane.advance()
                assert stop is not None
                if stop.kind == "block":
                    seen.append((stop.name, stop.chained))
    assert found == [[("0", False), ("1", True), ("2", False)]] * 2


def test_hooks_and_settings_are_gone_afterwards_also_after_an_error() -> None:
    model = build("llama")
    before, cached = hooks(model), model.config.use_cache
    calibrate(model, "llama")
    assert (hooks(model), model.config.use_cache) == (before, cached)
    block = {"model.layers.0": model.model.layers[0]}
    with pytest.raises(ZeroDivisionError), stopping(model, block, {}, lambda _: True):
        assert hooks(model) > before
        raise ZeroDivisionError
    assert (hooks(model), model.config.use_cache) == (before, cached)


@pytest.mark.parametrize("name", ["llama", "idefics3", "qwen2-vl"])
def test_a_waiting_lane_holds_no_cache(name: str) -> None:
    """Of models of parts some ask the whole's config for one, some the text's. A block that is computed twice would
    find its own keys and values in it."""
    model = build(name)
    blocks = {"0": model.get_decoder().layers[0]}
    lane = Lane(model, {"input_ids": torch.arange(8, 20)[None]})
    with stopping(model, blocks, {}, lambda _: False):
        stop = lane.advance()
        assert stop is not None and stop.call is not None
        assert stop.call[1]["past_key_values"] is None
        lane.close()


def test_a_plain_forward_runs_through_while_lanes_wait() -> None:
    model, batch = build("llama"), batches("llama")[0]
    with torch.no_grad():
        wanted = model(**batch).logits
    lane = Lane(model, batch)
    with stopping(model, {"model.layers.0": model.model.layers[0]}, {}, lambda _: True):
        assert lane.advance() is not None
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, wanted)
        assert lane.advance() is None
    assert torch.equal(lane.output.logits, wanted)


class Branching(nn.Module):
    """Goes another way for other data, as a mixture of experts may."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 50:
            return x
        if float(x.sum()) > 9:
            raise ValueError("too large")
        return self.last(self.a(x) if float(x.sum()) > 0 else self.b(x))


def branching(*values: float) -> Stop | None:
    model = Branching()
    lanes = [Lane(model, {"x": torch.full((1, 2, 4), value)}) for value in values]
    with stopping(model, {}, dict(model.named_children()), lambda _: True):
        return advance_all(lanes, lambda lane, stop: None)


def test_windows_that_go_different_ways_are_an_error() -> None:
    with pytest.raises(
        RunError, match=r"different ways through the model: one reached \('linear', 'b'\), another a"
    ):
        branching(1.0, 1.0, -1.0)
    with pytest.raises(RunError, match=r"one reached None, another a"):
        branching(1.0, 10.0)
    with pytest.raises(RunError, match=r"one reached \('linear', 'a'\), another the end"):
        branching(10.0, 1.0)
    reached = branching(1.0, 1.0)
    assert reached is not None
    assert reached.name == "a"


def test_the_models_own_error_comes_out_of_the_lane() -> None:
    with pytest.raises(ValueError, match="too large"):
        branching(2.0)


def test_a_closed_lane_lets_go_of_what_it_held() -> None:
    model = build("llama")
    lane, block = Lane(model, batches("llama")[0]), {"model.layers.1": model.model.layers[1]}
    with stopping(model, block, {}, lambda _: True):
        stop = lane.advance()
        assert stop is not None
        assert stop.inputs is not None
        held = weakref.ref(stop.inputs)
        del stop
        gc.collect()
        assert held() is not None
        lane.close()
        lane.close()  # twice does no harm
        gc.collect()
        assert held() is None
    assert lane.output is None


# --- parking (the rest is in test_parking.py) ---


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_parking_changes_no_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking_module, "_WORTH_MOVING", 1)
    nowhere, roomy = Parking(tmp_path, budget=0), Parking(tmp_path, budget=1 << 30)
    spilled, outputs = calibrate(build(name), name, nowhere)
    kept, wanted = calibrate(build(name), name, roomy)
    assert nowhere.spilled > 0
    assert roomy.spilled == 0
    for linear, tensors in kept.items():
        assert all(torch.equal(a, b) for a, b in zip(spilled[linear], tensors, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))


def test_what_a_waiting_lane_holds_can_all_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before gate and up: the embeddings, the block's input, the sum after attention, the normed input; before
    the attention's output also queries, keys, values and that output."""
    monkeypatch.setattr(parking_module, "_WORTH_MOVING", 1 << 13)
    model, batch = build("llama"), {"input_ids": torch.arange(64).reshape(2, 32) + 8}
    block = "model.layers.1"
    wanted = [f"{block}.self_attn.o_proj", f"{block}.mlp.gate_proj"]
    lane, counts = Lane(model, batch), []
    with stopping(model, {}, {name: model.get_submodule(name) for name in wanted}, lambda _: True):
        while (stop := lane.advance()) is not None:
            del stop
            counts.append(len(lane.held()))
    assert counts[1] == 4
    assert counts[0] > 4


# --- padding ---


def test_padding_is_in_no_statistic() -> None:
    """A padded batch counts exactly as its rows without their padding, one by one."""
    model, linear = build("bert"), "bert.encoder.layer.1.output.dense"
    batch = batches("bert")[0]
    singles = [
        {"input_ids": ids[mask.bool()][None]}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]

    def stats(windows: list[dict[str, Tensor]]) -> InputStats:
        accumulator = GramAccumulator()

        def visit(lane: Lane, stop: Stop) -> None:
            assert stop.inputs is not None
            accumulator.add(lane.tokens(stop.inputs))

        with stopping(model, {}, {linear: model.get_submodule(linear)}, lambda _: True):
            lanes = [Lane(model, window) for window in windows]
            advance_all(lanes, visit)
            for lane in lanes:
                lane.close()
        return accumulator.finish(linear)

    padded, plain = stats([batch]), stats(singles)
    assert padded.tokens == plain.tokens == int(batch["attention_mask"].sum()) < batch["input_ids"].numel()
    torch.testing.assert_close(padded.gram, plain.gram, rtol=1e-4, atol=1e-5 * float(plain.diagonal.max()))
    torch.testing.assert_close(padded.absmax, plain.absmax, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_tokens_by_every_shape_of_input(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).to(dtype)
    x = torch.arange(24.0).reshape(2, 3, 4)
    wanted = x.reshape(6, 4)[[0, 1, 3]]
    lane = Lane(nn.Identity(), {"attention_mask": mask})
    assert torch.equal(lane.tokens(x), wanted)
    assert torch.equal(lane.tokens(x.reshape(6, 4)), wanted)  # flattened by the module
    assert torch.equal(lane.tokens(wanted), wanted)  # padding dropped by the model itself
    unmasked = Lane(nn.Identity(), {"input_ids": mask})
    assert torch.equal(unmasked.tokens(x), x.reshape(6, 4))
