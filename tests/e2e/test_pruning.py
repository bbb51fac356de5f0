"""Heads, neurons and blocks taken out, end to end: what is left, what it computes, what makes up for the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_runs import LENGTH, SAMPLES, Run, broken_run, hashes, quantize, reads, rows_kept, tensors
from safetensors.torch import load_file, save_file
from tiny import POSITIONS, VOCABULARY, build, tiny
from tiny_media import write_data
from tiny_sentences import sentence_encoder
from torch import Tensor
from transformers import AutoConfig, AutoModel

from llmcomp.adapters.base import Block, LinearRef
from llmcomp.adapters.discover import discover
from llmcomp.adapters.units import Part, heads_of, neurons_of, spread
from llmcomp.errors import RunError
from llmcomp.formats.verify import check as verified
from llmcomp.pipeline import scoring
from llmcomp.recipe import (
    Calibration,
    FactorizeStep,
    PruneStep,
    QuantizeStep,
    Recipe,
    SparsifyStep,
    Step,
)
from llmcomp.report.schema import Report


@dataclass(frozen=True)
class Case:
    """sizes: of the source's config, where they are not those of tiny.py. said: what config.json then says."""

    model: str
    steps: tuple[Step, ...]
    said: dict[str, Any]
    format: str = "dense"
    dtype: torch.dtype = torch.float32
    sizes: dict[str, Any] = field(default_factory=dict)


THREE: dict[str, Any] = {"num_hidden_layers": 3}
EIGHT: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
FOUR_OF_EIGHT = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
ALL = PruneStep(heads=0.5, mlp=0.3, layers=1)
CASES = {
    "llama": Case("llama", (ALL,), {**FOUR_OF_EIGHT, "intermediate_size": 192, "num_hidden_layers": 2},
                  dtype=torch.bfloat16, sizes={**THREE, **EIGHT}),
    "llama magnitude": Case("llama", (PruneStep("magnitude", 0.5, 0.3, 1),), {"intermediate_size": 192},
                            sizes={**THREE, **EIGHT}),
    "llama taylor": Case("llama", (PruneStep("taylor", 0.5, 0.3, 1),), {"intermediate_size": 192},
                         sizes={**THREE, **EIGHT}),
    "llama plain": Case("llama", (PruneStep(mlp=0.25),), {"intermediate_size": 192}),
    "llama int4": Case("llama", (PruneStep(heads=0.5, mlp=0.5, layers=1), QuantizeStep(group_size=64)),
                       {"num_attention_heads": 4}, "compressed-tensors", torch.bfloat16, {**THREE, **EIGHT}),
    "llama 2:4": Case("llama", (PruneStep(mlp=0.5), SparsifyStep()), {"intermediate_size": 128}),
    "llama low rank": Case("llama", (PruneStep(mlp=0.5), FactorizeStep(ratio=0.6)), {}, "llmcomp"),
    "qwen2": Case("qwen2", (PruneStep(heads=0.5, mlp=0.5),), {"num_key_value_heads": 1}),  # q/k/v with biases
    "qwen3": Case("qwen3", (PruneStep(heads=0.25, mlp=0.1, options={"multiple": 1}),),
                  {"num_attention_heads": 12, "head_dim": 8, "intermediate_size": 231},
                  sizes={"hidden_size": 96, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 8}),
    "gemma3": Case("gemma3", (PruneStep(heads=0.5, layers=1),), {"num_hidden_layers": 2}, sizes={
        **THREE, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "smollm3": Case("smollm3", (PruneStep(layers=1),), {"num_hidden_layers": 2}, sizes={
        **THREE, "no_rope_layers": [1, 0, 1]}),
    "phi3": Case("phi3", (PruneStep(mlp=0.5),), {"intermediate_size": 128}),  # gates and values in one linear
    "gpt-neox": Case("gpt-neox", (PruneStep(mlp=0.5, layers=1),), {"intermediate_size": 128}, sizes=THREE),
    "gpt2": Case("gpt2", (PruneStep(mlp=0.5, layers=1),), {"n_inner": 128, "n_layer": 2}, sizes={"n_layer": 3}),
    "opt": Case("opt", (PruneStep(mlp=0.5),), {"ffn_dim": 128}),
    "mixtral": Case("mixtral", (PruneStep(heads=0.5, layers=1),), {"num_key_value_heads": 1}, sizes=THREE),
    "bert": Case("bert", (PruneStep(mlp=0.5, layers=1),), {"intermediate_size": 128}, sizes=THREE),
    "bert int8": Case("bert-classifier", (PruneStep(mlp=0.5), QuantizeStep("rtn", 8)), {}, "compressed-tensors"),
    "roberta": Case("roberta-classifier", (PruneStep(mlp=0.5),), {"intermediate_size": 128}),
    "distilbert": Case("distilbert", (PruneStep(mlp=0.5, layers=1),), {"hidden_dim": 128, "n_layers": 2},
                       sizes={"n_layers": 3}),
    "modernbert": Case("modernbert", (PruneStep(mlp=0.5, layers=1),), {"intermediate_size": 128}),
    "deberta": Case("deberta-v2", (PruneStep(mlp=0.5),), {"intermediate_size": 128}),
}  # fmt: skip
ALONE = [name for name, case in CASES.items() if len(case.steps) == 1]


def recipe_of(text: Path, case: Case) -> Recipe:
    return Recipe(case.steps, Calibration(str(text), SAMPLES, LENGTH), format=case.format)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Run]:
    root, made = tmp_path_factory.mktemp("pruning"), {}
    for name, case in CASES.items():
        source = tiny(case.model, root / f"source {name}", tokenizer=True, dtype=case.dtype, **case.sizes)
        made[name] = quantize(source, root / name.replace(" ", "-").replace(":", ""), recipe_of(text, case))
    return made


@pytest.mark.parametrize("name", CASES)
def test_plain_transformers_computes_what_the_run_computed(name: str, runs: dict[str, Run]) -> None:
    found = verified(runs[name].output, runs[name].witness)
    assert found.passed and bool(found.modules_compressed) == (CASES[name].format != "dense")


@pytest.mark.parametrize("name", CASES)
def test_the_config_says_what_is_left(name: str, runs: dict[str, Run]) -> None:
    config = json.loads((runs[name].output / "config.json").read_text())
    assert {key: config[key] for key in CASES[name].said} == CASES[name].said
    assert runs[name].report.size_after is not None and runs[name].report.size_before is not None
    assert runs[name].report.size_after.parameters < runs[name].report.size_before.parameters


# --- what is left computes what the source computes without the rest ---


def without(block: Any) -> Callable[..., Any]:
    """The forward of a block that does nothing."""
    forward = block.forward

    def passing(hidden_states: Tensor, *rest: Any, **more: Any) -> Any:
        found = forward(hidden_states, *rest, **more)
        return (hidden_states, *found[1:]) if isinstance(found, tuple) else hidden_states

    return passing


def matrix(model: Any, name: str, transposed: bool) -> Tensor:
    """The weight of a linear [out, in], as it lies in the model."""
    weight: Tensor = model.get_submodule(name).weight.data
    return weight.t() if transposed else weight


@pytest.mark.parametrize("name", ALONE)
def test_what_is_not_cut_is_the_source_s_to_the_bit(name: str, runs: dict[str, Run]) -> None:
    source, left = tensors(runs[name].source), tensors(runs[name].output)
    cut = {layer.name for layer in runs[name].report.layers}
    gone = [one for one in runs[name].report.removed if one.what == "block"]
    chain, count = (gone[0].name.rpartition(".")[0] if gone else "no chain"), 0
    for key, value in left.items():
        if key.rpartition(".")[0] in cut:
            continue
        old, own = key, key.partition(f"{chain}.")[2]
        if own and gone:  # one block is gone, and those behind it have moved up
            number, rest = own.split(".", 1)
            old = f"{chain}.{int(number) + (int(number) >= gone[0].which[0])}.{rest}"
        if old in source:  # else it has another name in files of before
            assert torch.equal(value, source[old]), key
            count += 1
    assert count > 1


@pytest.mark.parametrize("name", [name for name in ALONE if name != "mixtral"])
def test_what_is_left_computes_what_the_source_does_without_the_rest(name: str, runs: dict[str, Run]) -> None:
    """Blocks that are gone pass on what they read, and units that are gone are multiplied with zeros."""
    run, kind = runs[name], type(build(CASES[name].model))
    source, left = (kind.from_pretrained(path, dtype=torch.float32).eval() for path in (run.source, run.output))
    removed = [one for one in run.report.removed if one.what == "block"]
    adapter, smaller = discover(source), discover(left)
    staying = [block for block in adapter.blocks if block.name not in {one.name for one in removed}]
    for one in removed:
        module = source.get_submodule(one.name)
        module.forward = without(module)
    assert len(staying) == len(smaller.blocks)
    for old, new in zip(staying, smaller.blocks, strict=True):
        for part in (heads_of(old, source.config), neurons_of(old)):
            if isinstance(part, str):
                continue

            def both(ref: LinearRef, old: Block = old, new: Block = new) -> tuple[Tensor, Tensor]:
                there = ref.name.replace(old.name, new.name, 1)
                return matrix(source, ref.name, ref.transposed), matrix(left, there, ref.transposed)

            # What makes a unit's columns has a row for each: of queries, keys and values the queries.
            rows = part.halves * part.output.in_features
            queries = next(ref for ref, _ in part.producers if ref.out_features == rows)
            kept = rows_kept(*both(queries))
            weight, made = both(part.output)
            weight.zero_()
            weight[:, kept[: len(kept) // part.halves]] = made
    ids = torch.randint(8, VOCABULARY, (2, min(32, POSITIONS)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = source(input_ids=ids).logits, left(input_ids=ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("name", ["gemma3", "smollm3", "modernbert"])
def test_what_a_config_says_of_each_block_goes_with_the_block(name: str, runs: dict[str, Run]) -> None:
    source, left = (AutoConfig.from_pretrained(path) for path in (runs[name].source, runs[name].output))
    (gone,) = (one.which[0] for one in runs[name].report.removed if one.what == "block")
    said = "no_rope_layers" if name == "smollm3" else "layer_types"
    wanted = list(getattr(source, said))
    del wanted[gone]
    assert getattr(left, said) == wanted


def test_image_classifiers_are_pruned_by_what_they_see(tmp_path: Path) -> None:
    source = tiny("vit-classifier", tmp_path / "vit", tokenizer=True, num_hidden_layers=3)
    data = write_data("vit-classifier", tmp_path / "pictures")
    recipe = Recipe((PruneStep(heads=0.5, mlp=0.5, layers=1),), Calibration(str(data), SAMPLES), format="dense")
    run = quantize(source, tmp_path / "out", recipe)
    assert verified(run.output, run.witness).passed
    config = AutoConfig.from_pretrained(run.output)
    assert (config.num_attention_heads, config.intermediate_size, config.num_hidden_layers) == (2, 128, 2)
    assert (run.output / "preprocessor_config.json").is_file()


def test_sentence_encoders_keep_their_modules(tmp_path: Path, text: Path) -> None:
    source = sentence_encoder(tmp_path / "encoder")
    recipe = Recipe((PruneStep(mlp=0.5),), Calibration(str(text), SAMPLES, LENGTH), format="dense")
    run = quantize(source, tmp_path / "out", recipe)
    assert verified(run.output, run.witness).passed
    kept = {path.relative_to(source) for path in source.rglob("*") if path.suffix == ".json"}
    assert kept <= {path.relative_to(run.output) for path in run.output.rglob("*")}


# --- what makes up for what is gone ---


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Known windows: several times as many tokens as the widest input has columns."""
    path = tmp_path_factory.mktemp("windows") / "windows.safetensors"
    ids = torch.randint(8, VOCABULARY, (24, 64), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, path)
    return path


def test_what_is_left_is_refitted_by_least_squares(runs: dict[str, Run], windows: Path, tmp_path: Path) -> None:
    """Against ridge regression in float64, on what plain float64 transformers computes, output projection by output
    projection: each with the ones before it as they are after pruning."""
    source = runs["llama plain"].source
    step = PruneStep(heads=0.5, mlp=0.25)
    run = quantize(source, tmp_path / "out", Recipe((step,), Calibration(str(windows), 24, 64), format="dense"))
    model, left = build("llama").double(), tensors(run.output)
    ids, stored = load_file(windows)["input_ids"], tensors(source)
    for index in range(2):
        prefix = f"model.layers.{index}"
        for output, first, size in ((f"{prefix}.self_attn.o_proj", f"{prefix}.self_attn.q_proj", 64),
                                    (f"{prefix}.mlp.down_proj", f"{prefix}.mlp.gate_proj", 1)):
            columns = rows_kept(stored[f"{first}.weight"], left[f"{first}.weight"])
            assert len(columns) % size == 0
            read, weight = reads(model, ids, output), stored[f"{output}.weight"].double()
            some, lost = read[:, columns], read @ weight.T - read[:, columns] @ weight[:, columns].T
            ridge = (0.01 * some.square().sum(0).mean()).sqrt() * torch.eye(len(columns), dtype=torch.float64)
            moved = torch.linalg.lstsq(torch.cat((some, ridge)), torch.cat((lost, lost.new_zeros(len(ridge), 128))))
            wanted = weight[:, columns] + moved.solution.T
            found = left[f"{output}.weight"].double()
            assert float((found - wanted).norm() / wanted.norm()) < 1e-4
            assert float((weight[:, columns] - wanted).norm() / wanted.norm()) > 1e-3  # it has been moved
            error = float((read @ weight.T - some @ found.T).square().sum() / (read @ weight.T).square().sum())
            layer = next(one for one in run.report.layers if one.name == output)
            assert layer.error == pytest.approx(error, rel=1e-3)
            installed = model.get_submodule(output).weight.data
            installed.zero_()
            installed[:, columns] = found


def test_without_compensation_more_is_lost(runs: dict[str, Run], windows: Path, tmp_path: Path) -> None:
    errors = {}
    for fitted in (True, False):
        step = PruneStep(mlp=0.25, options={"compensate": fitted})
        recipe = Recipe((step,), Calibration(str(windows), 24, 64), format="dense")
        run = quantize(runs["llama plain"].source, tmp_path / str(fitted), recipe)
        errors[fitted] = next(one.error for one in run.report.layers if one.name == "model.layers.0.mlp.down_proj")
    assert (errors[True] or 0) < 0.95 * (errors[False] or 0)


def test_influence_is_one_minus_the_cosine_of_what_a_block_reads_and_gives(
    runs: dict[str, Run], windows: Path, tmp_path: Path
) -> None:
    source = runs["llama"].source
    recipe = Recipe((PruneStep(layers=2),), Calibration(str(windows), 24, 64), format="dense")
    run = quantize(source, tmp_path / "out", recipe)
    model = AutoModel.from_pretrained(source, dtype=torch.bfloat16)
    seen: dict[int, float] = {}

    def hear(index: int) -> Callable[..., None]:
        def hook(module: Any, read: Any, given: Any) -> None:
            given = given[0] if isinstance(given, tuple) else given
            one, two = read[0].double().flatten(0, 1), given.double().flatten(0, 1)
            seen[index] = float((1 - (one * two).sum(1) / (one.norm(dim=1) * two.norm(dim=1))).mean())

        return hook

    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(hear(index))
    with torch.no_grad():
        model(input_ids=load_file(windows)["input_ids"])
    assert {one.which[0] for one in run.report.removed} == set(sorted(seen, key=lambda index: seen[index])[:2])
    for one in run.report.removed:
        assert one.score == pytest.approx(seen[one.which[0]], rel=1e-2)


# --- several steps, and runs that were killed ---


@pytest.mark.parametrize("name", ["llama int4", "llama 2:4", "llama low rank"])
def test_one_recipe_gives_the_bits_of_two_runs(name: str, runs: dict[str, Run], text: Path, tmp_path: Path) -> None:
    case = CASES[name]
    first = quantize(runs[name].source, tmp_path / "pruned", recipe_of(text, Case(case.model, case.steps[:1], {})))
    rest = recipe_of(text, Case(case.model, case.steps[1:], {}, case.format))
    second = quantize(first.output, tmp_path / "both", rest)
    assert hashes(second.output) == hashes(runs[name].output)


def test_the_report_of_several_steps_counts_from_the_source(runs: dict[str, Run]) -> None:
    layers = {layer.name: layer for layer in runs["llama int4"].report.layers}
    down = layers["model.layers.1.mlp.down_proj"]
    assert (down.scheme, down.method) == ("128 of 256 neurons + int4 g64", "activation + gptq")
    assert down.bytes_before == 128 * 256 * 2 and down.bytes_after < 128 * 128
    assert layers["model.layers.0.self_attn.q_proj"].scheme == "4 of 8 heads + int4 g64"
    assert runs["llama int4"].report.command == "compress"


@pytest.mark.parametrize(
    ("name", "after", "resumed"),
    [("llama", 1, 1), ("llama", 3, 2), ("llama int4", 1, 1), ("llama int4", 4, 3), ("gpt2", 1, 1), ("mixtral", 1, 1),
     ("llama taylor", 1, 1)],
)
def test_a_broken_run_ends_bit_identical(
    name: str, after: int, resumed: int, runs: dict[str, Run], text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, output = recipe_of(text, CASES[name]), tmp_path / "again"
    broken_run(runs[name].source, output, recipe, after)
    for looked in ("influences", "sensitivities"):  # a second look at the blocks would fail
        monkeypatch.setattr(scoring, looked, None)
    again = quantize(runs[name].source, output, recipe)
    assert again.report.resumed_blocks == resumed
    assert hashes(output) == hashes(runs[name].output)
    assert again.report.removed == runs[name].report.removed
    assert [layer.name for layer in again.report.layers] == [layer.name for layer in runs[name].report.layers]


def test_slices_that_are_wrong_are_found(runs: dict[str, Run], text: Path, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """As they would be of a linear that makes gates and values in turn."""
    def turned(self: Part, ref: Any, kept: Tensor) -> Tensor:
        return spread(kept, self.halves) if self.halves > 1 else spread(kept, 1)

    monkeypatch.setattr(Part, "rows", turned)
    with pytest.raises(RunError, match="does not compute what was computed while it was pruned"):
        quantize(runs["phi3"].source, tmp_path / "out", recipe_of(text, CASES["phi3"]))
    assert not (tmp_path / "out").exists()


# --- what is said ---


def test_the_report_says_what_is_gone(runs: dict[str, Run]) -> None:
    report = runs["llama"].report
    assert report.command == "prune" and report.format == "dense"
    what = [(one.what, one.of, one.count) for one in report.removed]
    assert what == [("block", 1, 1), *[("group of heads", 4, 2), ("neuron", 256, 64)] * 2]
    assert all(len(one.which) == one.count for one in report.removed if one.what != "neuron")
    assert any("an ordinary dense model" in label for label in report.labels)
    assert {layer.scheme for layer in report.layers} == {"4 of 8 heads", "192 of 256 neurons"}
    assert all((layer.error is not None) == layer.name.endswith(("o_proj", "down_proj")) for layer in report.layers)
    assert Report.from_json(report.to_json()) == report
    before, after = report.size_before, report.size_after
    assert before is not None and after is not None
    assert before.parts["mlp"] == 3 * 3 * 128 * 256 * 2 and after.parts["mlp"] == 2 * 3 * 128 * 192 * 2


def test_magnitude_reads_no_text(runs: dict[str, Run]) -> None:
    report = runs["llama magnitude"].report
    assert report.calibration["description"] == "none needed"
    assert {layer.method for layer in report.layers} == {"magnitude"}
    assert all(layer.error is None for layer in report.layers)
