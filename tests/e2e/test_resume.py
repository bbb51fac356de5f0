"""Killed runs go on where they were and end bit-identical; changed ones start afresh; nothing half-written."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from doomed import Doom
from e2e_runs import LENGTH, SAMPLES, Run, broken_run, hashes, quantize, recipe_of
from tiny import tiny

from llmcomp.cli.main import main
from llmcomp.formats.save import partial_of
from llmcomp.recipe import Recipe
from llmcomp.report.schema import Report

BLOCKS = 6
ENDS = ("attention", "mlp", "embeddings", "head")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resume") / "llama"
    return tiny("llama", directory, tokenizer=True, num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def recipe(text: Path) -> Recipe:
    return recipe_of(text, targets=ENDS)


@pytest.fixture(scope="module")
def unbroken(source: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return quantize(source, tmp_path_factory.mktemp("unbroken") / "q", recipe)


def command(source: Path, text: Path, output: Path, *more: str) -> list[str]:
    """The command line of `recipe`'s run."""
    targets = [part for role in ENDS for part in ("--target", role)]
    return [
        "quantize", str(source), "--calibration", str(text), "--samples", str(SAMPLES),
        "--sequence-length", str(LENGTH), *targets, "-o", str(output), "--no-evaluate", "--no-verify", *more,
    ]  # fmt: skip


def journal_lines(output: Path) -> int:
    journal = partial_of(output) / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0


# --- SIGKILL ---


@pytest.fixture(scope="module")
def doom(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doom]:
    yield Doom(tmp_path_factory.mktemp("doom"))


@pytest.fixture(scope="module")
def old(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Another checkpoint, which the killed runs are to replace."""
    recipe = recipe_of(text, method="rtn", bits=8)
    return quantize(source, tmp_path_factory.mktemp("old") / "q", recipe)


def assert_survives(doom: Doom, moment: int, arguments: list[str], output: Path, old: Run, unbroken: Run) -> None:
    """Kill a run at `moment`, look at what is there, run the same command again, and compare."""
    shutil.copytree(old.output, output)
    assert doom.run(arguments, output.name, moment) == -signal.SIGKILL
    aside = output.with_name(f".{output.name}.replaced")
    if output.exists():
        assert hashes(output) in (hashes(old.output), hashes(unbroken.output)), "half-written"
    else:
        assert hashes(aside) == hashes(old.output), "the old checkpoint is gone before the new one stands"
    assert main(arguments) == 0
    assert hashes(output) == hashes(unbroken.output)
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name]


def moments_of(doom: Doom, arguments: list[str], output: Path, old: Run) -> int:
    shutil.copytree(old.output, output)
    assert doom.run(arguments, output.name) == 0
    return doom.moments()


def test_killed_at_some_moments(
    doom: Doom, source: Path, text: Path, tmp_path: Path, old: Run, unbroken: Run
) -> None:
    """Spread over the run, and each of the last ones, where the new checkpoint takes the old one's place."""
    output = tmp_path / "count" / "doomed-q"
    count = moments_of(doom, command(source, text, output, "--overwrite"), output, old)
    assert count > 60
    some = [count // 7, 3 * count // 7, 5 * count // 7, count - 4, count - 3, count - 2]
    for moment in some:
        output = tmp_path / str(moment) / "doomed-q"
        assert_survives(doom, moment, command(source, text, output, "--overwrite"), output, old, unbroken)


@pytest.mark.slow
def test_killed_at_every_moment(
    doom: Doom, source: Path, text: Path, tmp_path: Path, old: Run, unbroken: Run
) -> None:
    output = tmp_path / "count" / "doomed-q"
    count = moments_of(doom, command(source, text, output, "--overwrite"), output, old)
    for moment in range(1, count + 1):
        output = tmp_path / str(moment) / "doomed-q"
        assert_survives(doom, moment, command(source, text, output, "--overwrite"), output, old, unbroken)
        shutil.rmtree(output.parent)


def stopped(arguments: list[str], output: Path, lines: int, number: signal.Signals) -> tuple[int, str]:
    """Start the real command, send it a signal once the journal has `lines`; its status and stderr."""
    child = subprocess.Popen(
        [sys.executable, "-m", "llmcomp", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while journal_lines(output) < lines and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(number)
    printed, said = child.communicate(timeout=60)
    assert printed == ""
    return child.returncode, said


def test_ctrl_c_then_sigkill_then_the_same_command(
    source: Path, text: Path, tmp_path: Path, unbroken: Run
) -> None:
    output = tmp_path / "q"
    arguments = command(source, text, output)
    status, said = stopped(arguments, output, 3, signal.SIGINT)
    assert status == 130
    last = said.splitlines()[-1]
    assert last == "llmcomp: Interrupted; the same command resumes where it stopped."
    assert "Traceback" not in said
    kept = journal_lines(output)
    assert not output.exists() and kept >= 3
    status, said = stopped(arguments, output, kept + 1, signal.SIGKILL)
    assert status == -signal.SIGKILL and "Resuming" in said
    assert not output.exists() and journal_lines(output) > kept
    assert main(arguments) == 0
    assert Report.read(output).resumed_blocks >= 2
    assert hashes(output) == hashes(unbroken.output)
    assert not partial_of(output).exists()


# --- what resumes, what does not ---


@pytest.mark.parametrize("after", [0, 1, 4, BLOCKS + 1, BLOCKS + 2])
def test_finished_parts_are_reused(
    after: int, source: Path, recipe: Recipe, tmp_path: Path, unbroken: Run
) -> None:
    """Parts are the embeddings, the blocks, the head, and the rest."""
    partial = broken_run(source, tmp_path / "q", recipe, after)
    run = quantize(source, tmp_path / "q", recipe)
    assert run.report.resumed_blocks == min(max(0, after - 1), BLOCKS)
    resumed = [note for note in run.report.notes if note.startswith("Resuming")]
    assert len(resumed) == (after > 0)
    assert hashes(run.output) == hashes(unbroken.output)
    assert [layer.name for layer in run.report.layers] == [layer.name for layer in unbroken.report.layers]
    assert [layer.error for layer in run.report.layers] == [layer.error for layer in unbroken.report.layers]
    assert not partial.exists()


def test_other_bits_start_afresh(source: Path, recipe: Recipe, tmp_path: Path, text: Path) -> None:
    broken_run(source, tmp_path / "q", recipe, 4)
    other = recipe_of(text, targets=ENDS, bits=3)
    assert_afresh(quantize(source, tmp_path / "q", other), quantize(source, tmp_path / "new", other))


def test_other_data_start_afresh(source: Path, recipe: Recipe, tmp_path: Path, text: Path) -> None:
    broken_run(source, tmp_path / "q", recipe, 4)
    path = tmp_path / "other.txt"
    path.write_text(text.read_text(encoding="utf-8")[5000:], encoding="utf-8")
    other = replace(recipe, calibration=replace(recipe.calibration, source=str(path)))
    assert_afresh(quantize(source, tmp_path / "q", other), quantize(source, tmp_path / "new", other))


def test_other_text_in_the_same_file_starts_afresh(
    source: Path, recipe: Recipe, tmp_path: Path, text: Path
) -> None:
    path = tmp_path / "data.txt"
    path.write_text(text.read_text(encoding="utf-8"), encoding="utf-8")
    recipe = replace(recipe, calibration=replace(recipe.calibration, source=str(path)))
    broken_run(source, tmp_path / "q", recipe, 4)
    path.write_text(text.read_text(encoding="utf-8")[5000:], encoding="utf-8")
    assert_afresh(quantize(source, tmp_path / "q", recipe), quantize(source, tmp_path / "new", recipe))


def test_another_model_under_the_same_name_starts_afresh(
    source: Path, recipe: Recipe, tmp_path: Path
) -> None:
    changing = tmp_path / "model"
    shutil.copytree(source, changing)
    broken_run(changing, tmp_path / "q", recipe, 4)
    shutil.rmtree(changing)
    tiny("llama", changing, seed=1, tokenizer=True, num_hidden_layers=BLOCKS)
    assert_afresh(quantize(changing, tmp_path / "q", recipe), quantize(changing, tmp_path / "new", recipe))


def assert_afresh(run: Run, new: Run) -> None:
    """`run` found another run's work and did not use it: it equals `new`, which found nothing."""
    assert run.report.resumed_blocks == 0
    said = [note for note in run.report.notes if "discarded" in note]
    assert said == [
        "An unfinished run of another recipe, model or data, on another device, or of another number of processes was "
        "discarded; starting afresh."
    ]
    assert hashes(run.output) == hashes(new.output)


def test_a_torn_journal_line_costs_one_part(
    source: Path, recipe: Recipe, tmp_path: Path, unbroken: Run
) -> None:
    journal = broken_run(source, tmp_path / "q", recipe, 4) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    run = quantize(source, tmp_path / "q", recipe)
    assert run.report.resumed_blocks == 2
    assert hashes(run.output) == hashes(unbroken.output)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_shard_is_redone(
    damage: str, source: Path, recipe: Recipe, tmp_path: Path, unbroken: Run
) -> None:
    shard = broken_run(source, tmp_path / "q", recipe, 4) / "blocks" / "block-00001.safetensors"
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(content[:-8])
    else:
        content[-1] ^= 1
        shard.write_bytes(content)
    run = quantize(source, tmp_path / "q", recipe)
    assert run.report.resumed_blocks == 2, "blocks 0 and 2 are whole"
    assert hashes(run.output) == hashes(unbroken.output)


# --- what the result depends on ---


def test_waiting_in_files_changes_nothing(
    source: Path, recipe: Recipe, tmp_path: Path, unbroken: Run
) -> None:
    run = quantize(source, tmp_path / "q", recipe, activation_memory=0)
    assert hashes(run.output) == hashes(unbroken.output)
    assert any("went to mapped files" in note for note in run.report.notes)
    assert not any("went to mapped files" in note for note in unbroken.report.notes)


def test_one_seed_one_result(source: Path, recipe: Recipe, tmp_path: Path, unbroken: Run) -> None:
    again = quantize(source, tmp_path / "again", recipe)
    assert hashes(again.output) == hashes(unbroken.output)
    other = quantize(source, tmp_path / "other", replace(recipe, seed=1))
    assert hashes(other.output) != hashes(unbroken.output)
