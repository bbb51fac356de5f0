"""What plan says against what runs write and hold."""

from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build, tiny
from torch.utils._pytree import tree_leaves

from llmcomp.adapters.base import Adapter
from llmcomp.adapters.discover import discover, skeleton
from llmcomp.calibration import parking as parking_module
from llmcomp.methods import AUTO_ALONE, METHODS
from llmcomp.pipeline import footprint as footprint_module
from llmcomp.pipeline.footprint import footprint
from llmcomp.pipeline.job import open_source, plan_recipe
from llmcomp.pipeline.plan import Prospect, bytes_after, prospect
from llmcomp.pipeline.terms import Lanes, MemoryTerms
from llmcomp.pipeline.timing import Rates, seconds
from llmcomp.pipeline.waiting import graph, waiting
from llmcomp.recipe import Calibration, QuantizeStep, Recipe

BUDGET = 64 * 2**20
RATES = Rates(1e11, 1e11, 1e9)


def adapter_of(directory: Path) -> Adapter:
    return discover(skeleton(directory))


def seen(adapter: Adapter, **step: object) -> Prospect:
    recipe = Recipe((QuantizeStep(**step),), Calibration(samples=4, sequence_length=16))  # type: ignore[arg-type]
    return prospect(adapter, recipe, (recipe.steps[0].bits,), BUDGET)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("llama", {}),
        ("llama-untied", {"bits": 3, "group_size": 32, "symmetric": False}),
        ("llama", {"bits": 8, "targets": ("attention", "mlp", "head")}),
        ("gpt2", {"bits": 4}),
        ("bert-classifier", {"bits": 8, "group_size": "channel"}),
        ("qwen3-moe", {"bits": 4}),
        ("llama", {"bits": 8, "activations": "int8-static", "method": "rtn-clip"}),
    ],
)
def test_bytes_are_those_of_the_files(tmp_path: Path, name: str, step: dict[str, object]) -> None:
    from llmcomp import RunOptions, quantize

    source = tiny(name, tmp_path / "model", tokenizer=True, dtype=torch.bfloat16)
    step = {"method": "rtn", **step}
    planned = seen(adapter_of(source), **step).rows[0].bytes_after
    recipe = Recipe((QuantizeStep(**step),), Calibration("sample", 4, 16))  # type: ignore[arg-type]
    options = RunOptions(output=tmp_path / "out", evaluate=False, verify=False)
    quantize(str(source), recipe=recipe, options=options)
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert planned == pytest.approx(written, rel=0.01)


def test_names_that_the_source_lacks_are_not_counted(tmp_path: Path) -> None:
    source = open_source(tiny("llama-untied", tmp_path))
    plan = plan_recipe(Recipe(), source.adapter)
    whole = bytes_after(source.adapter, plan)
    some = {name for name in source.binding.key_of if name != "lm_head.weight"}
    head = source.adapter.model.get_submodule("lm_head").weight
    assert bytes_after(source.adapter, plan, source.binding.key_of) == whole
    assert whole - bytes_after(source.adapter, plan, some) == head.numel() * head.element_size()


def test_depth_changes_the_peak_by_nothing(tmp_path: Path) -> None:
    shallow = adapter_of(tiny("llama", tmp_path / "a", num_hidden_layers=2))
    deep = adapter_of(tiny("llama", tmp_path / "b", num_hidden_layers=4))
    lanes = Lanes.of(8, 16)
    two, four = (footprint(one, plan_recipe(Recipe(), one), lanes, BUDGET) for one in (shallow, deep))
    assert four.terms.total == pytest.approx(two.terms.total, rel=0.1)


def test_what_lanes_hold_is_what_a_real_lane_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking_module, "_WORTH_MOVING", 1 << 13)
    adapter = adapter_of(tiny("llama", tmp_path, dtype=torch.float32))
    block = adapter.blocks[1]
    found = waiting(adapter, block, [stage[0].name for stage in block.stages], 2, 16)
    assert [one.place for one in found[:-1]] == [block.name, *(stage[0].name for stage in block.stages)]
    stream = 2 * 16 * adapter.embeddings.in_features * 4
    # At the entry: the block's input and the embeddings, which the model's own frame keeps.
    assert found[0].parked == 2 * stream
    # Before gate and up: those two, the normed input, and the sum after attention that is added to later.
    assert found[3].parked == 4 * stream
    assert found[3].held < stream


def test_the_budget_bounds_what_is_parked_and_the_rest_goes_to_files(tmp_path: Path) -> None:
    adapter = adapter_of(tiny("llama", tmp_path))
    plan, lanes = plan_recipe(Recipe(), adapter), Lanes(64, 32, 64)
    wide, narrow = (footprint(adapter, plan, lanes, budget) for budget in (1 << 34, 0))
    assert wide.spilled == 0 < narrow.spilled
    assert narrow.terms.parked == 0 < wide.terms.parked
    assert narrow.terms.total < wide.terms.total


def test_terms_add_up_and_every_method_has_a_row(tmp_path: Path) -> None:
    found = seen(adapter_of(tiny("llama", tmp_path)))
    assert {row.method for row in found.rows} == set(METHODS)
    assert [row.asked for row in found.rows].count(True) == 1
    for row in found.rows:
        assert row.peak_memory == sum(astuple(row.terms))
        assert row.disk == row.bytes_after + row.spilled
        assert (row.statistics > 0) == METHODS[row.method].calibrated
        assert row.seconds > 0


def test_static_ranges_have_a_row_for_each_method_that_finds_them(tmp_path: Path) -> None:
    found = seen(adapter_of(tiny("llama", tmp_path)), bits=8, activations="int8-static")
    able = {name for name, one in METHODS.items() if one.calibrated and one.tune is None and one.aim is None}
    assert {row.method for row in found.rows} == able
    assert any(note.startswith("No row for signround: ") for note in found.notes)


def test_fallbacks_are_named(tmp_path: Path) -> None:
    adapter = adapter_of(tiny("llama", tmp_path, hidden_size=96, intermediate_size=100, num_attention_heads=4))
    fallbacks = seen(adapter).rows[0].fallbacks
    assert "128 does not divide its width 100" in fallbacks["model.layers.0.mlp.down_proj"]


def test_time_grows_with_depth_tokens_and_candidates(tmp_path: Path) -> None:
    shallow = adapter_of(tiny("llama", tmp_path / "a", num_hidden_layers=2))
    deep = adapter_of(tiny("llama", tmp_path / "b", num_hidden_layers=4))

    def time(adapter: Adapter, tokens: int, method: str = "gptq", rates: Rates = RATES) -> float:
        plan = plan_recipe(Recipe((QuantizeStep(method=method),)), adapter)
        return seconds(adapter, plan, tokens, 1, rates)

    assert 0 < time(shallow, 512) < time(deep, 512) < time(deep, 1024)
    assert time(deep, 512, "rtn") < time(deep, 512, "rtn-clip") < time(deep, 512)
    assert time(deep, 512, rates=replace(RATES, exact=1e10)) > time(deep, 512)


def test_lanes_are_those_that_the_run_makes() -> None:
    from llmcomp.calibration.data import batches

    for samples, length, tokens in ((32, 512, 1024), (3, 512, 1024), (5, 5000, 1024), (128, 100, 1024), (64, 256, 512)):
        found = batches([torch.zeros(length, dtype=torch.int64)] * samples, tokens_per_batch=tokens, pad_id=0)
        lanes = Lanes.of(samples, length, tokens=tokens)
        assert (lanes.count, lanes.tokens) == (len(found), found[0].input_ids.numel())


def test_learned_rounding_takes_smaller_batches(tmp_path: Path) -> None:
    adapter = adapter_of(tiny("llama", tmp_path))
    plans = {method: plan_recipe(Recipe((QuantizeStep(method=method),)), adapter) for method in ("gptq", "signround")}
    assert plans["signround"].tokens_per_batch < plans["gptq"].tokens_per_batch


def moments(adapter: Adapter, monkeypatch: pytest.MonkeyPatch, **step: object) -> dict[str, MemoryTerms]:
    """Every moment that `footprint` weighs, by what is done then."""
    seen: dict[str, MemoryTerms] = {}
    for name in ("_calibrated", "_surveyed"):
        follow = getattr(footprint_module, name)

        def noting(*arguments: Any, follow: Any = follow) -> Any:
            seen.update(found := list(follow(*arguments)))
            return found

        monkeypatch.setattr(footprint_module, name, noting)
    plan = plan_recipe(Recipe((QuantizeStep(**step),)), adapter)  # type: ignore[arg-type]
    footprint(adapter, plan, Lanes.of(4, 16), BUDGET)
    return seen


def test_weights_that_are_still_to_be_computed_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-J computes the MLP after attention, from the stage that attention's inputs belong to."""
    adapter = adapter_of(tiny("gptj", tmp_path))
    block = adapter.blocks[1].name
    sizes = {ref.name.removeprefix(f"{block}."): 4 * ref.weights for ref in adapter.blocks[1].linears}
    found = moments(adapter, monkeypatch)
    first = sum(sizes[name] for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"))
    assert found[f"computing up to {block}.attn.out_proj"].installed == first
    assert found[f"solving {block}.attn.out_proj"].installed == sizes["mlp.fc_in"]
    assert found[f"computing up to {block}.mlp.fc_out"].installed == sizes["mlp.fc_in"] + sizes["attn.out_proj"]


def test_a_shared_block_holds_all_its_statistics_and_all_blocks_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(tiny("albert", tmp_path, num_hidden_layers=4, num_hidden_groups=2))
    found = moments(adapter, monkeypatch)
    stages = adapter.blocks[1].stages
    grams = [4 * stage[0].in_features ** 2 for stage in stages]
    assert found[f"looking at {adapter.blocks[1].name}"].statistics == sum(grams)
    left = [found[f"solving {stage[0].name}"].statistics for stage in stages]
    assert left == [sum(grams[number:]) for number in range(len(grams))]
    block = sum(4 * ref.weights for ref in adapter.blocks[1].linears)
    assert found["leaving the block"].installed == block
    alone = adapter_of(tiny("albert", tmp_path / "alone", num_hidden_layers=2))
    both = (adapter, alone)
    two, one = (footprint(each, plan_recipe(Recipe(), each), Lanes.of(4, 16), BUDGET).terms for each in both)
    assert two.total - one.total == pytest.approx(block, rel=0.1)


def test_the_forecast_looks_at_dense_blocks_and_at_mixtures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek's first block is the widest, the second has the most weights."""
    adapter = adapter_of(tiny("deepseek-v3", tmp_path))
    found = moments(adapter, monkeypatch)
    names = [block.name for block in adapter.blocks]
    assert all(any(name in moment for moment in found) for name in names)
    layout = plan_recipe(Recipe(), adapter).layout
    dense, mixture = (sum(layout.nbytes(ref, 4) for ref in block.linears) for block in adapter.blocks)
    assert max(terms.packed for terms in found.values()) == mixture > dense


def test_experts_take_the_time_of_their_share_of_tokens(tmp_path: Path) -> None:
    few = adapter_of(tiny("qwen3-moe", tmp_path / "few", num_experts_per_tok=1))
    all_of_them = adapter_of(tiny("qwen3-moe", tmp_path / "all", num_experts_per_tok=4))
    one, four = (
        seconds(one, plan_recipe(Recipe((QuantizeStep(method="rtn-clip"),)), one), 10**6, 1, RATES)
        for one in (few, all_of_them)
    )
    linears = 2.0 * 10**6 * sum(ref.weights * 0.75 for ref in few.refs if ".experts." in ref.name) / RATES.forward
    grams = 10**6 * 0.75 * 2 * 4 * 2 * 128.0**2 / RATES.exact
    assert four - one == pytest.approx(linears + grams, rel=0.01)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_autograd_keeps_is_what_it_keeps_of_a_real_block(name: str) -> None:
    model = build(name)
    adapter, ids = discover(model), torch.zeros(3, 40, dtype=torch.int64)
    block = adapter.blocks[1]
    module, calls = model.get_submodule(block.name), list[Any]()

    def note(_: Any, *call: Any) -> None:
        calls.append(call)

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    model.requires_grad_(False)
    for ref in block.linears:
        model.get_submodule(ref.name).weight.requires_grad_()
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*calls[0][0], **calls[0][1])
    held = [one for one in tree_leaves(calls[0]) if isinstance(one, torch.Tensor)]
    own = {one.untyped_storage().data_ptr() for one in [*module.parameters(), *held]}
    real = sum(one.untyped_storage().nbytes() for key, one in kept.items() if key not in own)
    assert graph(adapter, block, 3, 40) == pytest.approx(real, rel=0.1)


def test_learning_is_in_the_forecast(tmp_path: Path) -> None:
    adapter = adapter_of(tiny("llama", tmp_path))
    lanes = Lanes.of(8, 64)
    plain, learned = (
        footprint(adapter, plan_recipe(Recipe((QuantizeStep(method=method),)), adapter), lanes, BUDGET)
        for method in ("gptq", "gptq-signround")
    )
    weights = sum(ref.weights for ref in adapter.blocks[1].linears)
    assert plain.terms.learning == 0
    assert learned.moment == "tuning model.layers.1" and learned.terms.learning > 4 * 4 * weights

    def time(iterations: int) -> float:
        step = QuantizeStep(method="signround", options={"iterations": iterations})
        return seconds(adapter, plan_recipe(Recipe((step,)), adapter), 512, 1, RATES)

    assert time(200) - time(100) == pytest.approx(time(300) - time(200)) and time(200) > time(100)


def test_a_method_that_does_not_fit_has_no_row_and_the_notes_say_why(tmp_path: Path) -> None:
    found = seen(adapter_of(tiny("albert", tmp_path)), method="auto", bits=2)
    assert found.rows[0].method == AUTO_ALONE
    assert {row.method for row in found.rows} == {name for name, one in METHODS.items() if one.tune is None}
    assert any(note.startswith("No row for signround: ") and "one block 2 times" in note for note in found.notes)
