"""What a killed run leaves: only whole shards count, only of the same run, whatever the last line looks like."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmcomp.formats.save import ShardWriter
from llmcomp.pipeline.journal import Journal, fingerprint
from llmcomp.report.schema import LayerReport


def layer(name: str) -> LayerReport:
    return LayerReport(name, 0, "mlp", (4, 8), "int4 g128", "gptq", 100, 20, error=0.25)


def started(partial: Path, parts: int, mark: str = "a") -> Journal:
    """A journal with finished parts 'p0', 'p1', …"""
    journal = Journal(partial, mark)
    writer = ShardWriter(partial)
    for n in range(parts):
        shard = writer.write(f"p{n}", {"x": torch.full((8,), float(n))})
        journal.add(f"p{n}", shard, [layer(f"layer{n}")])
    return journal


def test_a_new_run_finds_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "partial", "a")
    assert journal.done == {} and not journal.discarded


def test_what_was_added_is_found_again(tmp_path: Path) -> None:
    before = started(tmp_path / "partial", 3)
    after = Journal(tmp_path / "partial", "a")
    assert after.done == before.done and not after.discarded
    assert after.done["p1"].layers == [layer("layer1")]


def test_another_runs_work_is_discarded(tmp_path: Path) -> None:
    started(tmp_path / "partial", 2)
    journal = Journal(tmp_path / "partial", "b")
    assert journal.done == {} and journal.discarded
    assert not list((tmp_path / "partial").rglob("*.safetensors"))
    assert Journal(tmp_path / "partial", "b").discarded is False


def test_a_directory_without_a_journal_is_discarded(tmp_path: Path) -> None:
    (tmp_path / "partial" / "blocks").mkdir(parents=True)
    assert Journal(tmp_path / "partial", "a").discarded


@pytest.mark.parametrize("lost", [1, 10, 80])
def test_a_torn_line_is_left_out_and_the_next_starts_anew(lost: int, tmp_path: Path) -> None:
    path = tmp_path / "partial" / "journal.jsonl"
    started(tmp_path / "partial", 2)
    path.write_bytes(path.read_bytes()[:-lost])
    again = Journal(tmp_path / "partial", "a")
    # Without its line feed a line is still whole.
    assert set(again.done) == ({"p0", "p1"} if lost == 1 else {"p0"})
    shard = ShardWriter(tmp_path / "partial").write("p7", {"x": torch.ones(2)})
    again.add("p7", shard, [])
    assert set(Journal(tmp_path / "partial", "a").done) == set(again.done)


def test_a_torn_first_line_discards_all(tmp_path: Path) -> None:
    path = tmp_path / "partial" / "journal.jsonl"
    started(tmp_path / "partial", 0)
    path.write_bytes(path.read_bytes()[:7])
    journal = Journal(tmp_path / "partial", "a")
    assert journal.discarded and journal.done == {}


def test_a_shard_that_changed_does_not_count(tmp_path: Path) -> None:
    started(tmp_path / "partial", 3)
    shard = tmp_path / "partial" / "blocks" / "p1.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert set(Journal(tmp_path / "partial", "a").done) == {"p0", "p2"}


def test_a_redone_part_replaces_its_line(tmp_path: Path) -> None:
    journal = started(tmp_path / "partial", 1)
    shard = ShardWriter(tmp_path / "partial").write("p0", {"x": torch.zeros(3)})
    journal.add("p0", shard, [])
    found = Journal(tmp_path / "partial", "a").done["p0"]
    assert found.shard == shard and found.layers == []


def test_fingerprints_keep_their_parts_apart() -> None:
    assert fingerprint("a", "b") != fingerprint("b", "a")
    assert fingerprint("a", "b") == fingerprint("a", "b")
