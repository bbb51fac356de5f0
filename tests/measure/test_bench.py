"""Who takes turns with whom, what is measured by default, and what a broken checkpoint gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_figures import SAMPLE
from tiny import tiny

from llmcomp.errors import BadCheckpoint, BadData, RunError
from llmcomp.measure import bench as benching
from llmcomp.measure.bench import Settings, Subject, bench, shapes_of, take_turns
from llmcomp.measure.bench_process import Job
from llmcomp.progress import Silent

JOB = Job("m", 1, ((1, 8),), 2, 1)
A, B, C = (Subject(name, JOB) for name in "ABC")
SMALL = Settings((1,), (8,), (1,), new_tokens=2, rounds=1, repeats=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(subject, threads) of every process, none of which is started."""
    found: list[tuple[str, int]] = []

    def measure(subject: Subject, threads: int) -> object:
        found.append((subject.name, threads))
        if subject is C:
            raise RunError("Measuring C failed: gone")
        return SAMPLE

    monkeypatch.setattr(benching, "measure", measure)
    return found


def test_each_second_round_is_in_the_opposite_order(calls: list) -> None:
    taken = list(take_turns([A, B], (1, 2), 3, Silent()))
    there, back = [("A", 1), ("B", 1), ("A", 2), ("B", 2)], [("B", 1), ("A", 1), ("B", 2), ("A", 2)]
    assert calls == [*there, *back, *there]
    assert [(subject.name, threads) for subject, threads, _ in taken] == calls


def test_one_that_fails_ends_it(calls: list) -> None:
    with pytest.raises(RunError, match="Measuring C failed: gone"):
        list(take_turns([A, C, B], (1,), 2, Silent()))
    assert calls == [("A", 1), ("C", 1)]


def test_or_takes_no_further_part_where_others_go_on(calls: list) -> None:
    said: list[tuple[str, str]] = []
    taken = list(take_turns([A, C, B], (1, 2), 2, Silent(), lambda one, why: said.append((one.name, str(why)))))
    assert said == [("C", "Measuring C failed: gone")] and calls.count(("C", 1)) == 1 and ("C", 2) not in calls
    order = [("A", 1), ("B", 1), ("A", 2), ("B", 2)]
    assert [(one.name, count) for one, count, _ in taken[:4]] == order and len(taken) == 8


def test_progress_counts_the_processes(calls: list) -> None:
    said: list = []

    class Heard(Silent):
        def phase(self, name: str, total: int | None = None) -> None:
            said.append((name, total))

        def step(self, done: int = 1) -> None:
            said.append(done)

    list(take_turns([A, B], (1,), 2, Heard()))
    assert said == [("round 1 of 2", 2), 1, 1, ("round 2 of 2", 2), 1, 1]


@pytest.mark.parametrize(
    ("positions", "settings", "writes", "expected"),
    [
        (2048, Settings(), True, ((1, 128), (1, 512))),
        (256, Settings(), True, ((1, 128),)),
        (100, Settings(), True, ((1, 68),)),
        (512, Settings(), False, ((1, 128), (32, 128))),
        (64, Settings(), False, ((1, 64), (32, 64))),
        (512, Settings(prompt_tokens=(16, 480), batch_sizes=(2, 4)), True, ((2, 16), (2, 480), (4, 16), (4, 480))),
    ],
)
def test_shapes(positions: int, settings: Settings, writes: bool, expected: tuple, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"max_position_embeddings": {positions}}}')
    assert shapes_of([tmp_path], settings, writes) == expected


def test_the_shorter_of_two_models_decides(tmp_path: Path) -> None:
    for name, config in (("one", '{"n_positions": 100}'), ("other", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    both = [tmp_path / "other", tmp_path / "one"]
    assert shapes_of(both, Settings(), True) == ((1, 68),)
    assert shapes_of(both[:1], Settings(), True) == ((1, 128), (1, 512))  # nobody knows its limit
    with pytest.raises(BadData, match=r"100 positions hold no input of 70 tokens and 32 new ones; give fewer"):
        shapes_of(both, Settings(prompt_tokens=(8, 70)), True)


def test_a_writer_is_not_compared_with_an_encoder(tmp_path: Path) -> None:
    one, other = tiny("llama", tmp_path / "one"), tiny("bert", tmp_path / "other")
    with pytest.raises(BadData, match="cannot be compared: only one of them is a language model"):
        bench(one, against=other, settings=SMALL)


def test_a_broken_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(BadCheckpoint) as refused:
        bench(model, settings=SMALL)
    assert str(weights) in str(refused.value) and "\n" not in str(refused.value)


def test_a_model_beside_itself(tmp_path: Path) -> None:
    """Real processes: the same bytes twice, its own name each, and everything that a language model is asked for."""
    model = tiny("llama", tmp_path / "model")
    found = bench(model, against=model, settings=SMALL)
    own, other = found.results
    assert (own.name, other.name) == (str(model), f"{model} (against)") and own.threads == other.threads == 1
    names = [figure.name for figure in own.figures]
    assert names == [figure.name for figure in other.figures] and names[:3] == [
        "prefill 1 × 8", "first token after 1 × 8", "decode 1 × 2",
    ]  # fmt: skip
    assert found.machine.threads == 1 and found.capability and found.cache > 0
    ratios = {ratio.name: ratio.median for ratio in own.ratios}
    assert ratios["parameters and buffers"] == ratios["those of the blocks"] == 1.0 and not other.ratios
    assert all(figure.median > 0 for figure in own.figures if "memory" not in figure.name)
