"""The benchmark's tables on samples that are given, and who is in them."""

from dataclasses import replace
from pathlib import Path

import pytest

from evals import packed, packed_models
from evals.packed_models import BASE, OURS, SHAPES, contenders
from llmcomp.errors import RunError
from llmcomp.measure.bench import Subject
from llmcomp.measure.bench_process import Job, Sample, Timing
from llmcomp.measure.figures import figures
from llmcomp.measure.holding import Holding
from llmcomp.report.schema import Machine

MACHINE = Machine("cpu", 1, 2**34, "cpu", {})


def sample(decode: float, blocks: int | None = 40_000_000, ready: float = 2.0) -> Sample:
    """A process that wrote 32 tokens in `decode` seconds."""
    timings = (
        Timing("prefill", 1, 128, (1.0,)), Timing("prefill", 1, 512, (4.0,)), Timing("decode", 1, 32, (decode,)),
    )  # fmt: skip
    held = Holding(90_000_000, blocks, 80_000_000)
    return Sample(1.0, ready, timings, 1, 200_000_000, 3, held, 16e9, None, 1000, "AVX512", MACHINE)


def cells(table: str, name: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


SHOWN = packed.columns(SHAPES["llama"], 32)
FOUND = {
    BASE: figures([sample(4.0), sample(8.0)]),
    OURS["INT4"]: figures([sample(1.0, 10_000_000), sample(2.0, 10_000_000)]),
    "bitsandbytes nf4": figures([sample(2.0), sample(4.0)]),
    "bitsandbytes int8": figures([sample(3.0, ready=1.0), sample(3.0, ready=1.0)]),
    "llama.cpp, of INT4": figures([sample(0.5, None), sample(0.5, None)]),
}


def test_all_over_dense_bf16():
    table = packed.against_base(FOUND, SHOWN)
    assert cells(table, BASE)[1:] == ["6", "128", "128", "2", "200", "40", "3%"]
    ours = cells(table, OURS["INT4"])
    assert ours[1] == "24 (4.00 [4.00, 4.00])" and ours[2] == "128 (1.00 [1.00, 1.00])"
    assert ours[6] == "10 (0.25 [0.25, 0.25])" and ours[7] == "12%"
    assert cells(table, "llama.cpp, of INT4")[6] == "–"


def test_ours_over_the_best_peer_of_each_column():
    table = packed.against_peers(FOUND, SHOWN)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [OURS["INT4"], "the best peer"]
    best = cells(table, "the best peer")
    assert best[1] == "bitsandbytes nf4" and best[4] == "bitsandbytes int8"  # llama.cpp is no Python peer
    ours = cells(table, OURS["INT4"])
    assert ours[1] == "2.00 [2.00, 2.00]" and ours[4] == "2.00 [2.00, 2.00]" and ours[6] == "0.25 [0.25, 0.25]"


def test_without_a_peer_there_is_nothing_to_compare():
    table = packed.against_peers({BASE: FOUND[BASE], OURS["INT4"]: FOUND[OURS["INT4"]]}, SHOWN)
    assert set(cells(table, OURS["INT4"])[1:]) == {"–"}


def test_who_takes_part():
    llama, bert = (contenders(SHAPES[name], llama_cpp=True, onnx=True) for name in ("llama", "bert"))
    assert llama[0] == bert[0] == BASE
    assert set(llama) - set(bert) == {"gptqmodel INT4 g128", "llama.cpp, of INT4", "llama.cpp, of INT8"}
    assert not [name for name in contenders(SHAPES["llama"], False, False) if "llama.cpp" in name or "onnx" in name]
    assert set(packed_models.PEERS) <= set(llama) and set(OURS.values()) <= set(bert)


def test_one_that_fails_is_left_out_of_all_tables(tmp_path, monkeypatch):
    def measure(one: Subject, threads: int) -> Sample:
        if one.name == "b" and threads == 2:
            raise RunError("Measuring b failed: gone")
        return replace(sample(float(threads)), load_seconds=1.0)

    monkeypatch.setattr("llmcomp.measure.bench.measure", measure)
    (tmp_path / "model.safetensors").write_bytes(b"read before")
    job = Job(str(tmp_path), 1, ((1, 128),), 32, 1)
    found, refused = packed.gathered([Subject("a", job), Subject("b", job)], (1, 2), 2)
    assert {count: list(names) for count, names in found.items()} == {1: ["a"], 2: ["a"]}
    assert refused == {"b": "Measuring b failed: gone"}
    assert found[2]["a"][0].rounds == (128.0, 128.0)


@pytest.mark.parametrize(("name", "words"), [
    (OURS["INT4"], ["quantize", "--bits 4 --group-size 128", "--format llmcomp", "head bits=8 group_size=channel"]),
    (OURS["W8A8"], ["quantize", "--activations int8-dynamic", "--target head"]),
    ("bitsandbytes nf4", ["quantize", "--format bnb-nf4"]),
    ("gptqmodel INT4 g128", ["evals.peers.gptqmodel_run", "--method rtn"]),
    ("llama.cpp, of INT4", ["export", "--format gguf"]),
])  # fmt: skip
def test_checkpoints_are_made_by_their_tool_and_once(name, words, tmp_path, monkeypatch):
    commands = []

    def run(python: object, module: str, *arguments: object) -> None:
        commands.append(" ".join([module, *map(str, arguments)]))
        last = name.replace(" ", "-").replace(",", "")
        folder = next(Path(str(one)) for one in arguments[::-1] if str(one).endswith(last))
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    def make(folder: Path, layers: int, dtype: object) -> None:
        commands.append(f"make {layers} {dtype}")
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("LLMCOMP_EVAL_CACHE", str(tmp_path))
    monkeypatch.setattr(packed_models, "_run", run)
    monkeypatch.setattr(packed_models, "make_windows", lambda path: None)
    shape = replace(SHAPES["llama"], make=make)
    if name.startswith("llama.cpp"):
        source = tmp_path / "packed" / f"{shape.name}-2-layers" / "llmcomp-INT4-g128"
        source.mkdir(parents=True)
        (source / "config.json").write_text("{}")
    made = packed_models.checkpoint(name, shape, 2)
    assert made == packed_models.checkpoint(name, shape, 2) and made.is_dir()
    assert commands.count(commands[-1]) == 1 and all(part in commands[-1] for part in words)
    assert name.startswith("llama.cpp") or commands[0] == "make 2 torch.bfloat16"
