"""Ranks: what a launcher says of them, how work is dealt, and what two of them exchange."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from crew import Crew
from hypothesis import given
from hypothesis import strategies as st

from llmcomp.calibration.stats import GramAccumulator
from llmcomp.errors import RunError, UserError
from llmcomp.ranks import ALONE, World, joined, launched

MEETING = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "rank", "size"),
    [
        ({}, 0, 1),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 0, 1),  # accelerate launch, asked for one process
        ({"WORLD_SIZE": "1", "RANK": "0"}, 0, 1),
        ({"WORLD_SIZE": "4", "RANK": "3", **MEETING}, 3, 4),
        ({"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_MIXED_PRECISION": "no", **MEETING}, 0, 2),
    ],
)
def test_what_a_launcher_says(environment: dict[str, str], rank: int, size: int) -> None:
    assert launched(environment) == World(rank, size)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", **MEETING}, "asked for several processes and started only one"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Started by MPI"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR, MASTER_PORT is not set"),
    ],
)
def test_launches_that_are_none(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        launched(environment)
    assert "torchrun --nproc_per_node" in str(refused.value) and "--multi_gpu" in str(refused.value)


def test_one_process_needs_no_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    tensor = torch.ones(3)
    with joined() as world:
        assert world is ALONE
        assert world.sum_(tensor) is tensor and world.from_first(tensor) is tensor
        assert world.join_rows(tensor, 3) is tensor
        assert world.total(7) == world.largest(7) == 7
        assert world.message(b"x") == world.conclude(b"x") == b"x"
        world.part()


@given(count=st.integers(1, 40), size=st.integers(1, 9))
def test_every_row_and_item_is_dealt(count: int, size: int) -> None:
    worlds = [World(rank, size) for rank in range(size)]
    assert sorted(item for world in worlds for item in world.share(range(count))) == list(range(count))
    piece = -(-count // size)
    for world in worlds:
        own = world.rows(count)
        assert 0 <= own.start < own.stop <= count and own.stop - own.start <= piece
        due = range(count)[world.rank * piece : (world.rank + 1) * piece]
        assert range(count)[own] == due or (not due and own.start == count - 1)


# --- two ranks ---

_ROWS = {"int8": (7, 5), "bfloat16": (7, 2), "float64": (1,), "float32": (4, 3)}


def _inputs(rank: int) -> torch.Tensor:
    """[tokens, 600]: more than one tile, another number of tokens on each rank."""
    return torch.randn(50 + 30 * rank, 600, generator=torch.Generator().manual_seed(rank))


def _whole(name: str) -> torch.Tensor:
    shape = _ROWS[name]
    return (100 * torch.randn(shape, generator=torch.Generator().manual_seed(5))).to(getattr(torch, name))


def _exchange(directory: str) -> int:
    with joined() as world:
        accumulator = GramAccumulator()
        accumulator.add(_inputs(world.rank))
        stats = accumulator.finish("x", world)
        strip = torch.arange(12.0).view(3, 4).t() * (world.rank + 1)  # not contiguous
        world.sum_(strip)
        rows = {name: world.join_rows(_whole(name)[world.rows(shape[0])], shape[0]) for name, shape in _ROWS.items()}
        given = torch.tensor([world.rank + 1.5], dtype=torch.bfloat16)
        facts = {
            "tokens": stats.tokens,
            "largest": world.largest(world.rank),
            "message": world.message(b"abc" if world.first else None).decode(),
            "nothing": world.message(b"" if world.first else None).decode(),
            "first": world.from_first(given).item(),
            "strip": strip.tolist(),
            "rows": [torch.equal(found, _whole(name)) for name, found in rows.items()],
        }
        torch.save((stats.gram, stats.absmax), f"{directory}/{world.rank}.pt")
        world.part()
        facts["end"] = world.conclude(b"done" if world.first else None).decode()
    with joined() as again:  # as a script does that compresses two models
        facts["again"] = again.total(10 + again.rank)
    Path(f"{directory}/{world.rank}.json").write_text(json.dumps(facts))
    return 0


def test_what_two_ranks_exchange(tmp_path: Path) -> None:
    ended = Crew(tmp_path).run(_exchange, [str(tmp_path)], [str(tmp_path)])
    assert [one.status for one in ended] == [0, 0], ended
    expected = {
        "tokens": 130, "largest": 1, "message": "abc", "nothing": "", "first": 1.5, "end": "done", "again": 21,
        "strip": (torch.arange(12.0).view(3, 4).t() * 3).tolist(), "rows": [True] * len(_ROWS),
    }  # fmt: skip
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected
    (gram, absmax), (other, _) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert gram.equal(other)
    whole = torch.cat([_inputs(0), _inputs(1)]).double()
    assert (gram.double() - whole.T @ whole).abs().max() < 1e-5 * len(whole)
    assert absmax.equal(whole.abs().amax(0).float())


def _fail(how: str) -> int:
    try:
        with joined() as world:
            world.total(1)
            if how == "after parting":
                world.part()
            if world.rank == {"alone": 1, "first": 0, "after parting": 0}.get(how, world.rank):
                raise RunError("the reason")
            if how == "after parting":
                world.conclude(None)
            world.total(1)
    except RunError as error:
        print(type(error).__name__, error, flush=True)
        return error.exit_code
    return 0


@pytest.mark.parametrize("how", ["alone", "first", "both", "after parting"])
def test_one_rank_says_why_all_end(how: str, tmp_path: Path) -> None:
    ended = Crew(tmp_path).run(_fail, [how], [how], limit=60)
    assert [one.status for one in ended] == [1, 1]
    speaking = [one for one in ended if one.out == "RunError the reason\n"]
    quiet = [one for one in ended if one.out.startswith("EndedElsewhere")]
    assert len(speaking) == len(quiet) == 1, ended


def _initialized() -> int:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()  # or the first may end, and the store with it, while the other still initializes
    try:
        with joined():
            return 1
    except UserError as error:
        print(error)
    return 0


def test_a_script_that_has_initialized_torch_distributed(tmp_path: Path) -> None:
    ended = Crew(tmp_path).run(_initialized, [], [])
    assert [one.status for one in ended] == [0, 0], ended
    assert all(one.out.startswith("torch.distributed is initialized already") for one in ended)
