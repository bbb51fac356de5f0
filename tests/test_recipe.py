"""Recipes: to YAML and back, what is refused and how, which modules a target means, which override wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmcomp.errors import BadRecipe
from llmcomp.recipe import (
    Calibration,
    Override,
    QuantizeStep,
    Recipe,
    build,
    check,
    matches,
    override_for,
    scheme_for,
)
from llmcomp.schemes import BITS, GROUP_SIZES, Scheme

# --- YAML ---

words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
targets = st.one_of(
    st.sampled_from(("attention", "mlp", "head", "blocks:0-1", "re:.*q_proj$", "down_proj", "no", "1", "~")),
    words,
)
group_sizes = st.sampled_from((None, "channel", "64", *GROUP_SIZES))
overrides = st.builds(
    Override,
    target=targets,
    bits=st.sampled_from((None, *BITS)),
    group_size=group_sizes,
    symmetric=st.sampled_from((None, True, False)),
    method=st.sampled_from((None, "rtn", "gptq")),
    skip=st.booleans(),
)
steps = st.builds(
    QuantizeStep,
    method=st.sampled_from(("gptq", "rtn", "rtn-clip")),
    bits=st.sampled_from(BITS),
    group_size=group_sizes,
    symmetric=st.booleans(),
    targets=st.lists(targets, min_size=1, max_size=3).map(tuple),
    overrides=st.lists(overrides, max_size=3).map(tuple),
    options=st.dictionaries(
        st.sampled_from(("damping", "act_order")), st.one_of(st.floats(0.001, 1), st.booleans())
    ),
)
recipes = st.builds(
    Recipe,
    steps=st.lists(steps, min_size=1, max_size=2).map(tuple),
    calibration=st.builds(
        Calibration, words, st.integers(1, 10**6), st.integers(2, 10**5), st.one_of(st.none(), words)
    ),
    seed=st.integers(0, 2**31),
    format=st.sampled_from(("compressed-tensors", "dense")),
)


@settings(max_examples=100, deadline=None)
@given(recipes)
@example(Recipe(calibration=Calibration("1e5", 1, 2, "0E0")))  # numbers of YAML 1.2, texts of 1.1
def test_yaml_gives_the_same_recipe_back(recipe: Recipe) -> None:
    text = recipe.to_yaml()
    assert Recipe.from_yaml(text) == recipe
    assert Recipe.from_yaml(text).to_yaml() == text


def test_what_is_left_out_takes_the_defaults() -> None:
    assert Recipe.from_yaml("{}") == Recipe()
    assert Recipe.from_yaml("steps: [{kind: quantize}]") == Recipe()
    assert Recipe.from_yaml("calibration: {samples: 3}").calibration == Calibration(samples=3)


def test_the_example_in_the_modules_head_is_a_recipe() -> None:
    from llmcomp import recipe as module

    lines = (module.__doc__ or "").splitlines()
    text = "\n".join(line for line in lines if line.startswith("    "))
    parsed = Recipe.from_yaml(text)
    check(parsed)
    assert parsed.steps[0].overrides == (Override("down_proj", bits=8), Override("blocks:0-1", skip=True))


def test_load_reads_a_file_and_names_it_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("seed: 7\n")
    assert Recipe.load(path).seed == 7
    path.write_text("sead: 7\n")
    with pytest.raises(BadRecipe, match=r"r\.yaml: unknown key 'sead'; did you mean 'seed'\?"):
        Recipe.load(path)
    path.write_bytes(b"seed: \xff\xfe7")
    with pytest.raises(BadRecipe, match=r"r\.yaml cannot be read"):
        Recipe.load(path)
    with pytest.raises(BadRecipe, match="cannot be read"):
        Recipe.load(tmp_path / "absent.yaml")


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "recipe is not YAML"),
        ("- 1", "must be a mapping with 'steps', not list"),
        ("", "must be a mapping with 'steps', not NoneType"),
        ("step: []", "unknown key 'step'; did you mean 'steps'"),
        ("zzz: 1", "unknown key 'zzz'; known: steps, calibration, seed, format"),
        ("steps: []", "'steps' must be a non-empty list"),
        ("steps: {kind: quantize}", "'steps' must be a non-empty list"),
        ("steps: [quantize]", "step 0 needs 'kind', one of prune, quantize, sparsify, factorize; got 'quantize'"),
        ("steps: [{kind: [quantize]}]", "step 0 needs 'kind'"),
        ("steps: [{bits: 4}]", "step 0 needs 'kind'"),
        ("steps: [{kind: distill}]", "step 0 needs 'kind', one of prune"),
        (
            "steps: [{kind: quantize}, {kind: quantize, bitz: 4}]",
            "step 1: unknown key 'bitz'; did you mean 'bits'",
        ),
        ("steps: [{kind: quantize, bits: four}]", "'bits' must be int, got 'four'"),
        ("steps: [{kind: quantize, bits: 4.0}]", "'bits' must be int, got 4.0"),
        ("steps: [{kind: quantize, bits: true}]", "'bits' must be int, got True"),
        ("steps: [{kind: quantize, symmetric: 1}]", "'symmetric' must be bool, got 1"),
        ("steps: [{kind: quantize, group_size: [32]}]", "'group_size' must be int or str or None"),
        (
            "steps: [{kind: quantize, targets: mlp}]",
            r"'targets' must be a list such as \[attention, mlp\], got 'mlp'",
        ),
        ("steps: [{kind: quantize, targets: [1]}]", "'targets' must be a list"),
        ("steps: [{kind: quantize, targets: }]", "'targets' must be a list"),
        ("steps: [{kind: quantize, overrides: {target: mlp}}]", "'overrides' must be a list"),
        ("steps: [{kind: quantize, overrides: [mlp]}]", "override 0 must be a mapping, not 'mlp'"),
        ("steps: [{kind: quantize, overrides: [{bits: 8}]}]", "override 0: .*target"),
        ("steps: [{kind: quantize, overrides: [{target: mlp, skipp: true}]}]", "did you mean 'skip'"),
        ("calibration: books.txt", "calibration must be a mapping, not 'books.txt'"),
        ("calibration: {sample: 3}", "calibration: unknown key 'sample'; did you mean 'samples'"),
        ("calibration: {samples: '3'}", "'samples' must be int, got '3'"),
        ("seed: abc", "'seed' must be int, got 'abc'"),
    ],
)
def test_refused_with_a_sentence_that_names_the_place(text: str, message: str) -> None:
    with pytest.raises(BadRecipe, match=message) as caught:
        Recipe.from_yaml(text)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("recipe")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe((QuantizeStep(bits=5),)), "--bits 5 cannot be: choose one of 2, 3, 4, 8"),
        (
            Recipe((QuantizeStep(group_size=48),)),
            "--group-size 48 cannot be: choose one of 32, 64, 128 or 'channel'",
        ),
        (Recipe((QuantizeStep(group_size="row"),)), "--group-size row cannot be"),
        (Recipe((QuantizeStep(overrides=(Override("mlp", bits=1),)),)), "--bits 1 cannot be"),
        (Recipe((QuantizeStep(targets=("re:(",)),)), r"Target 're:\(' is no regular expression"),
        (Recipe((QuantizeStep(overrides=(Override("re:["),)),)), r"Target 're:\[' is no regular expression"),
        (Recipe(calibration=Calibration(samples=0)), "at least 1 sample of 2 tokens, got 0 of 512"),
        (Recipe(calibration=Calibration(sequence_length=1)), "got 128 of 1"),
    ],
)
def test_check_refuses_what_no_model_could_make_right(recipe: Recipe, message: str) -> None:
    with pytest.raises(BadRecipe, match=message):
        check(recipe)


def test_check_lets_good_recipes_pass() -> None:
    check(Recipe())
    check(Recipe((QuantizeStep(bits=2, group_size="channel", targets=("re:x+", "(")),)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampening": 0.1}, "unknown key 'dampening'; did you mean 'damping'"),
        ({"damping": "much"}, "'damping' must be float, got 'much'"),
        ({"damping": True}, "'damping' must be float, got True"),
        ({"act_order": 1}, "'act_order' must be bool, got 1"),
    ],
)
def test_a_methods_options_are_checked_like_the_rest(options: dict[str, Any], message: str) -> None:
    from llmcomp.methods.gptq import GPTQConfig

    with pytest.raises(BadRecipe, match=message):
        build(GPTQConfig, options, "options of gptq")
    assert build(GPTQConfig, {"damping": 1}, "options of gptq") == GPTQConfig(damping=1)


# --- targets ---

Q = ("model.layers.3.self_attn.q_proj", "attention", 3)
DOWN = ("model.layers.10.mlp.down_proj", "mlp", 10)
HEAD = ("lm_head", "head", None)
EMBEDDINGS = ("model.embed_tokens", "embeddings", None)


@pytest.mark.parametrize(
    ("target", "meant"),
    [
        ("attention", (Q,)),
        ("mlp", (DOWN,)),
        ("head", (HEAD,)),
        ("embeddings", (EMBEDDINGS,)),
        ("blocks:3", (Q,)),
        ("blocks:10", (DOWN,)),
        ("blocks:1", ()),
        ("blocks:0-3", (Q,)),
        ("blocks:3-10", (Q, DOWN)),
        ("blocks:4-9", ()),
        ("blocks:10-3", ()),
        ("blocks:", ()),
        ("blocks:3-", ()),
        ("q_proj", (Q,)),
        ("self_attn.q_proj", (Q,)),
        ("model.layers.3.self_attn.q_proj", (Q,)),
        ("3.self_attn.q_proj", (Q,)),
        ("proj", ()),  # parts of a name are whole parts
        ("n.q_proj", ()),
        ("self_attn", ()),  # and the last ones
        ("lm_head", (HEAD,)),
        ("re:proj$", (Q, DOWN)),
        ("re:^lm", (HEAD,)),
        ("re:self_attn|lm_head", (Q, HEAD)),
        ("re:PROJ", ()),
        ("re:", (Q, DOWN, HEAD, EMBEDDINGS)),
        (".*", ()),  # no expression without its prefix
    ],
)
def test_a_target_means_these_modules(target: str, meant: tuple[Any, ...]) -> None:
    assert tuple(module for module in (Q, DOWN, HEAD, EMBEDDINGS) if matches(target, *module)) == meant


def test_the_later_of_two_overrides_wins_as_a_whole() -> None:
    wide, narrow = Override("mlp", bits=8, symmetric=False), Override("down_proj", bits=2)
    assert override_for(QuantizeStep(overrides=(wide, narrow)), *DOWN) is narrow
    assert override_for(QuantizeStep(overrides=(narrow, wide)), *DOWN) is wide
    assert override_for(QuantizeStep(overrides=(wide, narrow)), *Q) is None


def test_an_override_changes_what_it_names_and_nothing_else() -> None:
    step = QuantizeStep(bits=3, group_size=64, symmetric=True)
    assert scheme_for(step, None, 256) == Scheme(3, 64, True)
    assert scheme_for(step, Override("x", bits=8), 256) == Scheme(8, 64, True)
    assert scheme_for(step, Override("x", group_size="channel"), 256) == Scheme(3, None, True)
    assert scheme_for(step, Override("x", symmetric=False), 256) == Scheme(3, 64, False)
    assert scheme_for(QuantizeStep(symmetric=False), Override("x", symmetric=True), 256) == Scheme(
        4, 128, True
    )


@pytest.mark.parametrize(
    ("width", "size"), [(256, 128), (192, 64), (96, 32), (100, None), (128, 128), (32, 32)]
)
def test_the_default_group_size_is_the_largest_that_divides(width: int, size: int | None) -> None:
    assert scheme_for(QuantizeStep(), None, width).group_size == size


def test_an_explicit_group_size_stays_as_it_is() -> None:
    assert scheme_for(QuantizeStep(group_size=128), None, 100).group_size == 128
    assert scheme_for(QuantizeStep(group_size="64"), None, 100).group_size == 64
