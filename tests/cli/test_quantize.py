"""The verb: flags become a recipe, the recipe comes back to the bit, stdout is one table or one JSON object."""

from __future__ import annotations

import hashlib
import pydoc_data.topics
from pathlib import Path

import pytest
import yaml
from tiny import tiny

from llmcomp import api
from llmcomp.cli.main import main
from llmcomp.errors import RunError
from llmcomp.recipe import Override, Recipe, scheme_for
from llmcomp.report.schema import Report
from llmcomp.schemes import Scheme

QUICK = ["--no-evaluate", "--no-verify"]
SMALL = ["--samples", "8", "--sequence-length", "32"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("verb") / "my-llama", tokenizer=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(list(pydoc_data.topics.topics.values())[:6]), encoding="utf-8")
    return path


def asked(monkeypatch: pytest.MonkeyPatch, *flags: str) -> tuple[Recipe, api.RunOptions]:
    """The recipe and the options that `llmcomp quantize MODEL FLAGS` leads to."""
    calls: list[tuple[Recipe, api.RunOptions]] = []

    def compress(model: str, recipe: Recipe, *, options: api.RunOptions, progress: object) -> None:
        calls.append((recipe, options))
        raise RunError("asked")

    monkeypatch.setattr(api, "compress", compress)
    assert main(["quantize", "model", *flags]) == 1
    return calls[0]


def test_no_flag_is_the_default_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, options = asked(monkeypatch)
    assert recipe == Recipe()
    assert options == api.RunOptions()


def test_every_flag_reaches_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = asked(
        monkeypatch, "--bits", "3", "--group-size", "channel", "--method", "rtn-clip", "--asymmetric",
        "--target", "mlp", "--target", "head", "--override", "down_proj bits=8 group_size=32 symmetric=true",
        "--skip", "blocks:0-1", "--calibration", "my.txt", "--samples", "7", "--sequence-length", "9",
        "--seed", "5", "--format", "dense",
    )  # fmt: skip
    step = recipe.steps[0]
    assert (step.bits, step.group_size, step.method, step.symmetric) == (3, "channel", "rtn-clip", False)
    assert step.targets == ("mlp", "head")
    assert step.overrides == (
        Override("down_proj", bits=8, group_size=32, symmetric=True),
        Override("blocks:0-1", skip=True),
    )
    calibration = recipe.calibration
    assert (calibration.source, calibration.samples, calibration.sequence_length) == ("my.txt", 7, 9)
    assert (recipe.seed, recipe.format) == (5, "dense")


@pytest.mark.parametrize("flag", ["--activation-memory", "--seed"])
def test_a_negative_number_is_refused_before_a_model_is_looked_for(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "./nowhere", flag, "-1"]) == 2
    said = capsys.readouterr().err
    assert f"Invalid value for '{flag}'" in said and "nowhere" not in said


def test_flags_beside_a_recipe_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", "./nowhere", "--recipe", str(tmp_path / "r.yaml"), "--group-size", "64", "--skip", "mlp"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said == (
        "llmcomp: --recipe already says everything: drop --group-size, --skip, or change it in the file.\n"
    )


def test_settings_of_the_method_keep_their_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = asked(monkeypatch, "--option", "damping=0.05", "--option", "act_order=false", "--option", "steps=7")
    assert recipe.steps[0].options == {"damping": 0.05, "act_order": False, "steps": 7}
    assert {type(value) for value in recipe.steps[0].options.values()} == {float, bool, int}


def test_every_flag_reaches_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    _, options = asked(
        monkeypatch, "-o", "there", "--overwrite", "--no-evaluate", "--no-verify", "--activation-memory", "3",
        "--eval-data", "rows.csv", "--text-column", "t", "--label-column", "l", "--revision", "v1",
        "--trust-remote-code", "--allow-pickle", "--device", "cuda:1",
    )  # fmt: skip
    assert options == api.RunOptions(
        output=Path("there"), overwrite=True, evaluate=False, verify=False, activation_memory=3 * 2**20,
        eval_data="rows.csv", text_column="t", label_column="l", revision="v1", trust_remote_code=True,
        allow_pickle=True, device="cuda:1",
    )  # fmt: skip


def test_activations_bring_8_bits_per_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    for way in ("int8-dynamic", "int8-static"):
        recipe, _ = asked(monkeypatch, "--activations", way)
        assert (recipe.steps[0].bits, recipe.steps[0].activations) == (8, way)
        assert scheme_for(recipe.steps[0], None, 96) == Scheme(8, None, True, way)
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_a_number_as_group_size(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = asked(monkeypatch, "--group-size", "64")
    assert recipe.steps[0].group_size == 64


def weights(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.glob("*.safetensors"))
    }


def test_a_saved_recipe_makes_the_same_tensors(llama: Path, text: Path, tmp_path: Path) -> None:
    saved = tmp_path / "r.yaml"
    flags = ["--bits", "3", "--asymmetric", "--override", "down_proj bits=8", "--skip", "blocks:1", "--seed", "2"]
    first = ["quantize", str(llama), "--calibration", str(text), *SMALL, *flags, *QUICK]
    assert main([*first, "--save-recipe", str(saved), "-o", str(tmp_path / "one")]) == 0
    assert main(["quantize", str(llama), "--recipe", str(saved), *QUICK, "-o", str(tmp_path / "two")]) == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    travelled = (tmp_path / "two" / "llmcomp_recipe.yaml").read_text(encoding="utf-8")
    assert travelled == saved.read_text(encoding="utf-8")
    assert Report.read(tmp_path / "two").recipe == yaml.safe_load(travelled)


def test_json_is_one_report_and_nothing_else(
    llama: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(llama), "--calibration", str(text), *SMALL, *QUICK, "--json"]
    capfd.readouterr()
    assert main([*command, "-o", str(tmp_path / "q")]) == 0
    printed, said = capfd.readouterr()
    report = Report.from_json(printed)
    assert printed == report.to_json() == (tmp_path / "q" / "llmcomp_report.json").read_text(encoding="utf-8")
    assert report.command == "quantize" and report.output == str(tmp_path / "q")
    assert "\x1b" not in said
    assert [line.split("  ")[0] for line in said.splitlines() if line.startswith("block")] == [
        "block 1/2", "block 2/2",
    ]  # fmt: skip


def test_the_table_and_the_default_output(
    llama: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["quantize", str(llama), "--calibration", str(text), *SMALL, *QUICK, "--bits", "8"]
    capfd.readouterr()
    assert main(command) == 0
    printed, _ = capfd.readouterr()
    assert "my-llama-gptq-w8" in printed and "int8" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["my-llama-gptq-w8"]


def test_the_whole_line_with_measurements(
    llama: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Defaults: verified by a fresh process, then measured before and after."""
    command = ["quantize", str(llama), "--calibration", str(text), *SMALL, "--eval-data", str(text), "--json"]
    capfd.readouterr()
    assert main([*command, "-o", str(tmp_path / "q")]) == 0
    report = Report.from_json(capfd.readouterr().out)
    assert report.verification is not None and report.verification.passed
    assert report.before is not None and report.after is not None and report.divergence is not None
    before, after = report.before.quality, report.after.quality
    assert before is not None and after is not None
    assert before.metrics["perplexity"].value != after.metrics["perplexity"].value
    assert 0 < report.divergence.kl_mean.value < 1
    assert {"prepare", "solve", "save", "verify", "evaluate"} <= set(report.phases)
