"""Several ranks end to end: as good as one, killed and resumed to the bit, one sentence where they fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from crew import Crew, Ended
from e2e_command import edit_json
from e2e_runs import LENGTH, SAMPLES, hashes, tensors
from tiny import tiny, write_tokenizer

import llmcomp
from llmcomp import api, matmul
from llmcomp.cli.main import main
from llmcomp.formats.opening import open_checkpoint
from llmcomp.formats.save import partial_of
from llmcomp.measure.run import Settings
from llmcomp.report.schema import Report

# Rounded inputs, too: their scales travel with a resumed run.
ENDS = [
    "--activations", "int8-static", "--target", "attention", "--target", "mlp", "--target", "embeddings",
    "--target", "head",
]  # fmt: skip


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Crew:
    return Crew(tmp_path_factory.mktemp("crew"))


@pytest.fixture(scope="module")
def text() -> Path:
    """The text that ships: pydoc's, which other tests read, differs between releases of Python, and with 3.11.2's the
    learning of this model hangs on the last bits of sums."""
    return Path(llmcomp.__file__).parent / "samples" / "text" / "calibration.txt"


@pytest.fixture(scope="module")
def llama(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny("llama", tmp_path_factory.mktemp("words") / "llama")
    write_tokenizer(directory, encoder=False, text=[text.read_text(encoding="utf-8")[:100_000]])
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("ranks") / "llama", tokenizer=True, num_hidden_layers=6)


def command(source: Path | str, text: Path, output: Path, *more: str) -> list[str]:
    return [
        "quantize", str(source), "--calibration", str(text), "--samples", str(SAMPLES), "--sequence-length",
        str(LENGTH), "-o", str(output), "--no-evaluate", "--no-verify", *more,
    ]  # fmt: skip


def together(crew: Crew, arguments: list[str], size: int = 2) -> list[Ended]:
    return crew.run(main, *[[arguments]] * size)


# --- one result ---


@pytest.fixture(scope="module")
def unbroken(crew: Crew, source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("two") / "q"
    ended = together(crew, command(source, text, output, *ENDS))
    assert [one.status for one in ended] == [0, 0], ended
    assert ended[0].out and not ended[1].out and not ended[1].err, "one rank talks"
    assert sorted(path.name for path in output.parent.iterdir()) == ["q"]
    return output


def test_two_ranks_make_the_factors_of_one(crew: Crew, llama: Path, text: Path, tmp_path: Path) -> None:
    """Gram matrices of both inputs and the one between them are summed; the first rank's factors are everybody's."""
    more = ["--ranks", "balanced"]
    arguments = {name: ["factorize", *command(llama, text, tmp_path / name, *more)[1:]] for name in ("one", "two")}
    assert main(arguments["one"]) == 0
    ended = crew.run(without_narrow_units, *[[arguments["two"]]] * 2)
    assert [one.status for one in ended] == [0, 0], ended
    alone, shared = (dict(open_checkpoint(tmp_path / name).dense()) for name in ("one", "two"))
    for name in (layer.name for layer in Report.read(tmp_path / "one").layers if ".0." in layer.name):
        one, two = alone[f"{name}.weight"].float(), shared[f"{name}.weight"].float()
        assert float((one - two).norm() / one.norm()) < 0.02


@pytest.mark.parametrize("method", ["awq-gptq", "rtn"])
def test_three_ranks_make_what_one_makes(
    method: str, crew: Crew, llama: Path, text: Path, tmp_path: Path
) -> None:
    """Three divide neither windows nor rows evenly. Sums in another order differ in their last bits, so scales do, too,
    and a weight near a rounding edge may go the other way; what follows it in the model then differs more."""
    arguments = {name: command(llama, text, tmp_path / name, "--method", method) for name in ("one", "three")}
    assert main(arguments["one"]) == 0
    ended = together(crew, arguments["three"], size=3)
    assert [one.status for one in ended] == [0, 0, 0], ended
    alone, shared = tensors(tmp_path / "one"), tensors(tmp_path / "three")
    assert alone.keys() == shared.keys()
    for name in alone if method == "rtn" else [name for name in alone if "layers.0." in name]:
        if method == "rtn" or not alone[name].is_floating_point():
            assert float((alone[name] == shared[name]).double().mean()) > (1 - 1e-9 if method == "rtn" else 0.98)
        else:
            torch.testing.assert_close(shared[name], alone[name], rtol=1e-4, atol=0)
    reports = [Report.read(tmp_path / name) for name in ("one", "three")]
    # GPTQ measures some rows of each stack that is solved, so ranks measure other rows than one process does.
    errors = [[layer.error for layer in report.layers] for report in reports]
    assert errors[1] == (pytest.approx(errors[0], rel=0.15) if method == "awq-gptq" else errors[0])
    said = [layer.scaling for layer in reports[1].layers]
    assert said == [layer.scaling for layer in reports[0].layers]


def without_narrow_units(arguments: list[str]) -> int:
    """llmcomp's command line on a CPU that multiplies bf16 no faster."""
    matmul.multiplies = lambda dtype: dtype == torch.float32  # type: ignore[assignment]  # this process ends with it
    return main(arguments)


def test_ranks_learn_as_one_does(
    crew: Crew, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of learned rounding over all windows is the same step, whoever holds them; signs of gradients next to
    zero aside, which hang on the order of sums (and on much more where factors are rounded to bf16)."""
    monkeypatch.setattr(matmul, "multiplies", lambda dtype: dtype == torch.float32)
    learned = ["--method", "signround", "--bits", "3", "--option", "iterations=8", "--option", "batch_size=1000"]
    arguments = {name: command(llama, text, tmp_path / name, *learned) for name in ("one", "two")}
    assert main(arguments["one"]) == 0
    ended = crew.run(without_narrow_units, *[[arguments["two"]]] * 2)
    assert [one.status for one in ended] == [0, 0], ended
    alone, shared = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for name in [name for name in alone if "layers.0." in name and not alone[name].is_floating_point()]:
        assert float((alone[name] == shared[name]).double().mean()) > 0.95, name
    reports = [Report.read(tmp_path / name) for name in ("one", "two")]
    for one, two in zip(*(report.layers for report in reports), strict=True):
        assert two.block_error_start == pytest.approx(one.block_error_start, rel=0.02)
        assert two.block_error == pytest.approx(one.block_error, rel=0.1)  # blocks after the first differ by more
    assert all(layer.block_error < 0.7 * layer.block_error_start for layer in reports[1].layers)


def test_perplexity_of_two_ranks_is_that_of_one(crew: Crew, tmp_path: Path) -> None:
    """And it is verified by a fresh process, as always."""
    def arguments(name: str) -> list[str]:
        return ["quantize", "sample:lm", "--samples", "32", "--sequence-length", "128", "--no-evaluate",
                "-o", str(tmp_path / name)]  # fmt: skip

    assert main([*arguments("one"), "--no-verify"]) == 0
    ended = together(crew, arguments("two"))
    assert [one.status for one in ended] == [0, 0], ended
    assert Report.read(tmp_path / "two").verification.passed
    settings = Settings(windows=16, cost=False)
    found = api.evaluate(tmp_path / "two", against=tmp_path / "one", settings=settings)
    one, two = (found.before.quality.metrics["perplexity"], found.after.quality.metrics["perplexity"])
    assert two.value == pytest.approx(one.value, rel=1e-3)
    assert found.divergence.kl_mean.value < 1e-3


# --- nothing lost ---


def test_killed_ranks_and_the_same_command(
    crew: Crew, source: Path, text: Path, tmp_path: Path, unbroken: Path
) -> None:
    output = tmp_path / "q"
    journal = partial_of(output) / "journal.jsonl"
    arguments = [[command(source, text, output, *ENDS)]] * 2
    lines = 0
    for struck in (1, 0):
        wanted = lines + 2

        def reached(wanted: int = wanted) -> bool:
            return journal.is_file() and journal.read_bytes().count(b"\n") >= wanted

        ended = crew.run(main, *arguments, until=reached, struck=(struck,), limit=120)
        left = ended[1 - struck]
        assert ended[struck].status == -9 and left.status == 1, ended
        assert left.sentences == [
            "Another of the 2 ranks has ended without a word (killed, or out of memory); the same command resumes "
            "where it stopped."
        ]
        assert "Traceback" not in left.err and not output.exists()
        lines = journal.read_bytes().count(b"\n")
        assert lines >= wanted
    ended = crew.run(main, *arguments)
    assert [one.status for one in ended] == [0, 0], ended
    assert "Resuming" in ended[0].err and Report.read(output).resumed_blocks >= 2
    assert hashes(output) == hashes(unbroken)
    assert sorted(path.name for path in output.parent.iterdir()) == ["q"]


def test_a_launcher_stops_all(crew: Crew, source: Path, text: Path, tmp_path: Path) -> None:
    arguments, journal = [command(source, text, tmp_path / "q")], partial_of(tmp_path / "q") / "journal.jsonl"
    ended = crew.run(main, arguments, arguments, until=journal.is_file, struck=(0, 1), by=signal.SIGTERM)
    said = refused(ended, 143)
    assert said == "Stopped from outside, or because another process has ended; the same command resumes."
    assert partial_of(tmp_path / "q").exists()


# --- one sentence ---


def refused(ended: list[Ended], status: int) -> str:
    """The one sentence of all ranks."""
    assert [one.status for one in ended] == [status] * len(ended), ended
    sentences = [sentence for one in ended for sentence in one.sentences]
    assert len(sentences) == 1 and not any("Traceback" in one.err for one in ended), ended
    return sentences[0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--method", "gptq", "--samples", "1"], "1 calibration windows cannot feed 2 ranks: give more by --samples"),
        (["--format", "bnb-nf4"], "--format bnb-nf4 is made by transformers of the whole model in one process"),
        (["--bits", "5"], "bits"),
    ],
)
def test_what_ranks_refuse(
    more: list[str], said: str, crew: Crew, llama: Path, text: Path, tmp_path: Path
) -> None:
    data = [] if "--format" in more else ["--calibration", str(text)]
    assert said in refused(together(crew, ["quantize", str(llama), "-o", str(tmp_path / "q"), *data, *more]), 2)
    assert not (tmp_path / "q").exists() and not partial_of(tmp_path / "q").exists()


def test_what_only_the_first_rank_sees(crew: Crew, llama: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "config.json").write_text("{}")
    sentence = refused(together(crew, command(llama, text, tmp_path / "q")), 2)
    assert sentence.endswith("already exists; choose another --output or add --overwrite.")


def test_what_only_another_rank_has(crew: Crew, llama: Path, text: Path, tmp_path: Path) -> None:
    other = shutil.copytree(llama, tmp_path / "other")
    edit_json(other / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    arguments = [[command(model, text, tmp_path / "q")] for model in (llama, other)]
    sentence = refused(crew.run(main, *arguments), 2)
    assert sentence.startswith("Rank 1 has another model than rank 0; give all hosts the same")


def test_other_verbs_take_one_process(crew: Crew, source: Path) -> None:
    assert refused(together(crew, ["inspect", str(source)]), 2) == (
        "llmcomp inspect works in one process, and 2 were started; call it without a launcher."
    )


def test_number_of_ranks_is_part_of_a_run(crew: Crew, llama: Path, text: Path, tmp_path: Path) -> None:
    """Sums in another order are other bits, so a resumed run would mix them."""
    output, arguments = tmp_path / "q", command(llama, text, tmp_path / "q")
    journal = partial_of(output) / "journal.jsonl"
    crew.run(main, [arguments], [arguments], until=journal.is_file)
    ended = together(crew, arguments, size=3)
    assert [one.status for one in ended] == [0, 0, 0], ended
    assert "another number of processes was discarded; starting afresh" in ended[0].err
    assert Report.read(output).resumed_blocks == 0


# --- real launchers ---


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip


def test_a_launch_that_silently_became_one_process(llama: Path, text: Path, tmp_path: Path) -> None:
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "llmcomp"]
    done = launch(*launcher, *command(llama, text, tmp_path / "q"))
    said = [line for line in done.stderr.splitlines() if line.startswith("llmcomp: ")]
    assert done.returncode != 0 and len(said) == 1, done
    assert "started only one" in said[0] and "accelerate launch --multi_gpu --num_processes N" in said[0]
    assert not partial_of(tmp_path / "q").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "llmcomp"],
        ["torch.distributed.run", "--nproc_per_node", "2", "-m", "llmcomp"],
    ],
    ids=["accelerate", "torchrun"],
)
def test_launchers(launcher: list[str], source: Path, text: Path, tmp_path: Path, unbroken: Path) -> None:
    done = launch(*launcher, *command(source, text, tmp_path / "q", *ENDS))
    assert done.returncode == 0, done
    assert hashes(tmp_path / "q") == hashes(unbroken)
    again = launch(*launcher, *command(source, text, tmp_path / "q", *ENDS))
    said = [line for line in again.stderr.splitlines() if line.startswith("llmcomp: ")]
    assert again.returncode != 0 and len(said) == 1 and "already exists" in said[0], again
