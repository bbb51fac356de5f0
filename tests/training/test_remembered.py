"""A teacher's answers from disk are those that it gave; what is damaged or missing is asked again, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, build
from torch import Tensor

from llmcomp import losses
from llmcomp.errors import UserError
from llmcomp.kept import Kept, keep
from llmcomp.progress import Silent
from llmcomp.training import remembered as module
from llmcomp.training.data import Batch, Windows, collator
from llmcomp.training.distilling import Guide, Targets
from llmcomp.training.guides import watched
from llmcomp.training.remembered import Asked, remembered
from llmcomp.training.taps import Taps


class Pretended:
    """A tokenizer as far as masking asks."""

    pad_token_id, mask_token_id, all_special_ids = 0, 4, (0, 4)

    def __len__(self) -> int:
        return VOCABULARY


def samples(count: int = 12, labels: bool = False) -> Windows:
    generator = torch.Generator().manual_seed(3)
    windows = [torch.randint(5, VOCABULARY, (3 + number % 7,), generator=generator) for number in range(count)]
    return Windows([*windows, windows[0]], torch.arange(count + 1) % 3 if labels else None)


class Teacher:
    """Counts the rows that it is asked about."""

    def __init__(self, name: str) -> None:
        model = build(name)
        self.rows, self.guide = 0, watched(model, Taps(model, ()))

    def __call__(self, inputs: Mapping[str, Tensor]) -> Targets:
        self.rows += len(inputs["input_ids"])
        return self.guide(inputs)


KINDS = {"bert-classifier": "sequence-classification", "bert": "masked-lm", "llama": "causal-lm"}


def asked(folder: Path, **changes: Any) -> Asked:
    return Asked(folder, {"teachers": ["one"]}, **{"classes": VOCABULARY, "count": 5, "temperature": 2.0, **changes})


def recall(guide: Guide, batch: Batch) -> Tensor | Kept:
    return guide({name: value for name, value in batch.items() if name not in ("labels", "scored")}).logits


@pytest.mark.parametrize("name", KINDS)
def test_what_was_said_is_what_is_read(name: str, tmp_path: Path) -> None:
    """For each task, in batches of other rows than it was asked with, of unequal lengths."""
    task, teacher, data = KINDS[name], Teacher(name), samples(labels=name == "bert-classifier")
    collate = collator(task, Pretended(), masks=7)
    few = task == "sequence-classification"
    guide = remembered(teacher, data, collate, asked(tmp_path, classes=3 if few else VOCABULARY), Silent())
    assert teacher.rows == len(data) - 1  # equal samples once
    for numbers in ([0, 5, 6], [11], [12, 2]):
        batch = collate([data[number] for number in numbers])
        found, logits = recall(guide, batch), recall(teacher.guide, batch)
        assert isinstance(found, Kept) and isinstance(logits, Tensor)
        wanted = keep(logits[batch["scored"]], 5, 2.0)
        assert torch.allclose(found.logs, wanted.logs, atol=2e-2, rtol=2e-3)
        assert (found.indices is None) == few
        loss = [float(losses.soft_targets(logits + torch.randn(logits.shape), one, batch["scored"], 2.0))
                for one in (found, wanted) if torch.manual_seed(0)]  # fmt: skip
        assert loss[0] == pytest.approx(loss[1], rel=1e-2, abs=1e-4)


def test_masks_are_a_samples_own() -> None:
    """Wherever it lies, whatever it is padded to; another seed masks otherwise."""
    data = Windows([torch.arange(5, 5 + length) for length in (90, 30, 60)])
    collate = collator("masked-lm", Pretended(), masks=1)
    alone, among = collate([data[1]]), collate([data[0], data[1], data[2]])
    for name in ("input_ids", "labels", "scored"):
        assert torch.equal(alone[name][0], among[name][1][:30]), name
    share = float(collate([Windows([torch.full((4000,), 9)])[0]])["scored"].float().mean())
    assert 0.12 < share < 0.18
    assert not torch.equal(alone["scored"], collator("masked-lm", Pretended(), masks=2)([data[1]])["scored"])
    assert not among["scored"][1][30:].any()


def test_samples_in_which_nothing_is_asked(tmp_path: Path) -> None:
    """As where no token was masked, at the end of a file or in all of it."""
    data = Windows([torch.arange(5, 5 + length) for length in (3, 4, 5)])

    def collate(rows: Sequence[Batch]) -> Batch:
        batch = collator("causal-lm", Pretended())(rows)
        return {**batch, "scored": batch["scored"] & (batch["input_ids"][:, :1] * 0 + asking > 0)}

    for asking in (0, 1):
        guide = remembered(Teacher("llama"), data, collate, asked(tmp_path / str(asking)), Silent())
        found = recall(guide, collate([data[2], data[0]]))
        assert isinstance(found, Kept) and len(found.logs) == asking * 6
    partly = {0: 2, 1: 3, 2: 0}

    def some(rows: Sequence[Batch]) -> Batch:
        batch = collator("causal-lm", Pretended())(rows)
        for number, row in enumerate(rows):
            batch["scored"][number, partly[len(row["input_ids"]) - 3] :] = False
        return batch

    guide = remembered(Teacher("llama"), data, some, asked(tmp_path / "some"), Silent())
    for numbers, count in (([2], 0), ([0, 2], 2), ([1, 0], 5)):
        found = recall(guide, some([data[number] for number in numbers]))
        assert isinstance(found, Kept) and len(found.logs) == count


def test_it_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run asks nothing; a killed one is gone on with; what another temperature wants is asked anew."""
    monkeypatch.setattr(module, "_OF_A_FILE", 20)
    collate, data, first = collator("causal-lm", Pretended()), samples(), Teacher("llama")
    write, count = module._write, 0

    def stop(*given: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        write(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_write", stop)
        remembered(first, data, collate, asked(tmp_path), Silent())
    done = first.rows
    assert 0 < done < 12
    second, third = Teacher("llama"), Teacher("llama")
    one = recall(remembered(second, data, collate, asked(tmp_path), Silent()), collate([data[0], data[9]]))
    assert second.rows == 12 - done
    two = recall(remembered(third, data, collate, asked(tmp_path), Silent()), collate([data[0], data[9]]))
    assert third.rows == 0 and isinstance(one, Kept) and isinstance(two, Kept) and torch.equal(one.logs, two.logs)
    longer = Windows([*data.windows, torch.arange(5, 30)])
    remembered(third, longer, collate, asked(tmp_path), Silent())
    assert 0 < third.rows < 12  # the files before the last one are those that are there
    remembered(second, data, collate, asked(tmp_path, temperature=1.0), Silent())
    assert second.rows == 24 - done and len(list(tmp_path.iterdir())) == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_file_is_made_anew(tmp_path: Path) -> None:
    collate, data = collator("causal-lm", Pretended()), samples()
    teacher = Teacher("llama")
    before = recall(remembered(teacher, data, collate, asked(tmp_path), Silent()), collate([data[4]]))
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    for broken in (whole[:-3], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        file.unlink()
        file.write_bytes(broken)
        asker, notes = Teacher("llama"), list[str]()
        listener = Silent()
        listener.note = notes.append  # type: ignore[method-assign]
        after = recall(remembered(asker, data, collate, asked(tmp_path), listener), collate([data[4]]))
        assert asker.rows == 12 and len(notes) == 1 and "is made anew" in notes[0]
        assert isinstance(before, Kept) and isinstance(after, Kept) and torch.equal(before.logs, after.logs)
        assert file.read_bytes() == whole


def test_scores_of_a_regressor(tmp_path: Path) -> None:
    data, said = Windows([torch.tensor([5, 6, 7]), torch.tensor([8, 9])]), torch.tensor([[0.5], [-1.25]])
    collate = collator("sequence-classification", Pretended(), regression=True)
    guide = remembered(lambda inputs: Targets(said.flip(0)), data, collate, asked(tmp_path, regression=True), Silent())
    found = recall(guide, collate([data[0], data[1]]))
    assert isinstance(found, Tensor) and torch.equal(found, said)  # asked in order of their lengths


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*; give a directory that can be"):
        asked(tmp_path / "cache").directory()
