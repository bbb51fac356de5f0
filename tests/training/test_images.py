"""Images as samples: read when a batch is put together, known by their contents, with labels where they have them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PICTURE, build, tiny
from tiny_media import picture, write_data
from torch import Tensor

from llmcomp.calibration.media import examined, processor_of, read_media
from llmcomp.errors import BadData
from llmcomp.kept import Kept
from llmcomp.losses import IGNORED
from llmcomp.progress import Silent
from llmcomp.training.data import IMAGES, collator, key_of, rows_of
from llmcomp.training.distilling import METHODS, Distillation, Layers, Targets
from llmcomp.training.guides import once, watched
from llmcomp.training.images import Pictures, pictures_of
from llmcomp.training.reading import alike
from llmcomp.training.remembered import Asked, remembered
from llmcomp.training.taps import Taps

COUNT = 8


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("vit-classifier", tmp_path_factory.mktemp("vit"), tokenizer=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data("vit-classifier", tmp_path_factory.mktemp("images") / "data", COUNT)


MODEL = build("vit-classifier")


def pictures(vit: Path, source: Path, count: int | None = None, **changes: Any) -> Pictures:
    processor = processor_of(vit, MODEL)
    for name, value in changes.items():
        setattr(processor, name, value)
    media = read_media(str(source), "images", gaps=True)
    return pictures_of(media, processor, MODEL, count=count, taught=True, progress=Silent())


def test_a_batch_is_what_the_processor_makes(vit: Path, folder: Path) -> None:
    """With the subfolders' names as the model counts them."""
    found, processor = pictures(vit, folder), processor_of(vit, MODEL)
    batch = collator(IMAGES, processor)([found[number] for number in (5, 0)])
    files = sorted(folder.rglob("*.png"))
    numbers = [int(file.stem) for file in (files[5], files[0])]
    wanted = processor(images=[picture(number) for number in numbers], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], wanted) and wanted.shape == (2, 3, PICTURE, PICTURE)
    assert batch["labels"].tolist() == [number % 3 for number in numbers]
    assert batch["scored"].tolist() == [True, True] and next(iter(batch)) == "pixel_values"


def test_memory_holds_no_pixels(vit: Path, folder: Path) -> None:
    """Those of a few are made to see that the model takes them, then of each when it is asked for."""
    made: list[Any] = []
    found = pictures(vit, folder)

    def counted(row: Any) -> Tensor:
        made.append(row)
        return found.pixels(row)

    watching = replace(found, pixels=counted)
    rest, held_out = watching.held_out()
    assert (len(rest), len(held_out), len(watching.chosen([1, 4]))) == (COUNT - 1, 1, 2) and not made
    assert all(isinstance(row, Path) for row in watching.rows)
    assert torch.equal(rest[0]["pixel_values"], watching[0]["pixel_values"]) and len(made) == 2
    assert len(watching.first()["pixel_values"]) == 4 and len(made) == 6


def test_some_of_them_evenly_spaced(vit: Path, folder: Path) -> None:
    every, some = pictures(vit, folder), pictures(vit, folder, count=3)
    places = [list(every.rows).index(row) for row in some.rows]
    assert len(places) == 3 and max(b - a for a, b in pairwise(places)) <= 3
    assert every.labels is not None and some.labels is not None
    assert some.labels.tolist() == every.labels[places].tolist()
    assert len(pictures(vit, folder, count=100)) == COUNT


def test_images_without_labels(vit: Path, folder: Path, tmp_path: Path) -> None:
    """Of a folder those that lie in no subfolder; of a table those whose cell is empty."""
    part = tmp_path / "part"
    shutil.copytree(folder, part)
    picture(99).save(part / "99.png")
    rows = [{"image": str(file), "label": None if number < 2 else f"LABEL_{number % 3}"}
            for number, file in enumerate(sorted(folder.rglob("*.png")))]  # fmt: skip
    table = tmp_path / "rows.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    for source, without in ((part, 1), (table, 2)):
        found = pictures(vit, source)
        assert found.labels is not None and int((found.labels == IGNORED).sum()) == without
        known = found.labelled()
        assert len(known) == len(found) - without and isinstance(known, Pictures)
        assert known.labels is not None and bool((known.labels != IGNORED).all())
    assert pictures(vit, table).labels is not None
    flat = tmp_path / "flat"
    flat.mkdir()
    picture(0).save(flat / "0.png")
    bare = pictures(vit, flat)
    assert bare.labels is None and collator(IMAGES, None)([bare[0]])["labels"].tolist() == [IGNORED]
    with pytest.raises(BadData, match="put images into subfolders named by their labels"):
        pictures_of(
            read_media(str(flat), "images"), processor_of(vit, MODEL), MODEL, count=None, taught=False,
            progress=Silent(),
        )  # fmt: skip


def test_known_by_their_contents(vit: Path, folder: Path, tmp_path: Path) -> None:
    """Wherever they lie, and by what the processor does to them."""
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    one, other = pictures(vit, folder), pictures(vit, moved)
    assert one.fingerprint() == other.fingerprint()
    assert one.fingerprint() != pictures(vit, folder, image_mean=[0.4] * 3).fingerprint()
    picture(77).save(moved / "LABEL_1" / "1.png")
    assert one.fingerprint() != pictures(vit, moved).fingerprint()
    processor, its = processor_of(vit, MODEL), processor_of(vit, MODEL)
    assert alike(processor, its, IMAGES)
    its.image_std = [0.25] * 3
    assert not alike(processor, its, IMAGES)


def test_equal_bytes_of_other_shapes_have_other_keys() -> None:
    wide, high = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 4, 2)
    keys = {key_of(row) for value in (wide, high, wide + 1) for row in rows_of({"pixel_values": value})}
    assert len(keys) == 3
    assert key_of(rows_of({"pixel_values": wide})[0]) == key_of(rows_of({"pixel_values": wide.clone()})[0])


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_a_file_that_is_cut_is_no_readable_image(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"one.{kind}"
    picture(3).resize((400, 300)).save(file)
    known = examined(file)
    assert known == examined(file.read_bytes()) and len(known) == 16
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(BadData, match=f"one.{kind} is no readable image"):
        examined(file)
    file.write_bytes(b"something else")
    with pytest.raises(BadData, match="its format is not known"):
        examined(file)


def test_images_of_several_sizes_are_no_batch(vit: Path, folder: Path) -> None:
    found = pictures(vit, folder)
    sizes = replace(found, pixels=lambda row: torch.zeros(3, PICTURE, PICTURE + 8 * (row == found.rows[1])))
    assert len(sizes.first()["pixel_values"]) == 3
    with pytest.raises(BadData, match="images of several sizes"):
        collator(IMAGES, None)([sizes[0], sizes[1]])


def test_a_processor_of_another_model(vit: Path, folder: Path) -> None:
    with pytest.raises(BadData, match="makes images of 48 × 48 pixels, which ViTForImageClassification does not take"):
        pictures(vit, folder, size={"height": 48, "width": 48})


# --- what is learned of them ---


def outside(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in ("labels", "scored")}


@pytest.mark.parametrize("method", ["distilbert", "tinybert", "minilm", "attention-transfer"])
def test_parts_of_a_step_add_up(method: str, vit: Path, folder: Path) -> None:
    """Losses of a step that is cut into parts, by the counts of all, are that of one batch, with its gradients."""
    found, model, teacher = pictures(vit, folder), build("vit-classifier"), build("vit-classifier")
    with torch.no_grad():
        for value in teacher.parameters():
            value.add_(0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))
    blocks = [name for name, _ in model.named_modules() if name.startswith("vit.layers.") and name.count(".") == 2]
    weights, layers = METHODS[method], Layers(((0, 0), (1, 1)), (1, 1), range(4), 4)
    its, own = (Taps(one, blocks, layers.hidden(weights, 0), layers.attention(weights, 0)) for one in (teacher, model))
    objective = Distillation(guide=watched(teacher, its), student=own, weights=weights, layers=layers)
    collate = collator(IMAGES, None)
    whole, *parts = (collate([found[n] for n in numbers]) for numbers in (range(6), range(4), (4, 5)))
    counts = objective.counts(parts)
    assert counts.tolist() == [6, 6, 6, 6]
    losses, gradients = [], []
    for batches, divided in (([whole], None), (parts, counts)):
        model.zero_grad()
        total = torch.stack([objective.loss(model(**outside(one)).logits, one, divided) for one in batches]).sum()
        total.backward()
        losses.append(float(total.detach()))
        gradients.append(torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None]))
    assert losses[0] > 0 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6 * float(gradients[0].abs().max()) + 1e-8)


def test_a_cache_of_images(vit: Path, folder: Path, tmp_path: Path) -> None:
    """Found by pixel values; equal images are asked about once, and all when the processor is another one."""
    asked, rows = Asked(tmp_path / "cache", {"teachers": ["one"]}, 3), 0
    guide = watched(MODEL, Taps(MODEL, ()))

    def counted(inputs: Mapping[str, Tensor]) -> Targets:
        nonlocal rows
        rows += len(inputs["pixel_values"])
        return guide(inputs)

    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    shutil.copyfile(moved / "LABEL_1" / "1.png", moved / "LABEL_1" / "again.png")
    collate = collator(IMAGES, None)
    for source, changes, total in ((folder, {}, COUNT), (moved, {}, COUNT), (folder, {"image_mean": [0.4] * 3}, 16)):
        found = pictures(vit, source, **changes)
        recalled = remembered(counted, found, collate, asked, Silent())
        assert rows == total
        batch = collate([found[number] for number in (3, 1, 7)])
        said, wanted = recalled(outside(batch)).logits, guide(outside(batch)).logits
        assert isinstance(said, Kept) and isinstance(wanted, Tensor)
        assert torch.allclose(said.logs, wanted.log_softmax(-1), atol=1e-5)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2


def test_one_answer_for_one_batch(vit: Path, folder: Path) -> None:
    found, asked = pictures(vit, folder), 0

    def teach(inputs: Mapping[str, Tensor]) -> Targets:
        nonlocal asked
        asked += 1
        return Targets(inputs["pixel_values"].sum((1, 2, 3)))

    guide, batch = once(teach), outside(collator(IMAGES, None)([found[0]]))
    assert guide(batch) is guide(batch) and asked == 1
    guide(outside(collator(IMAGES, None)([found[0]])))
    assert asked == 2
