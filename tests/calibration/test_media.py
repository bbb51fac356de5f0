"""Images and sound from folders and tables, through the processor, as the model reads them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import IMAGE_TOKEN, PICTURE, build, tiny
from tiny_media import RATE, picture, write_data, write_processor, write_sound

from llmcomp.calibration.media import _sound as read_sound
from llmcomp.calibration.media import chosen_labels, is_media, media_samples, processor_of, read_media
from llmcomp.errors import BadData


def samples(name: str, source: Path, directory: Path, count: int = 8, **overrides: Any) -> Any:
    model = build(name, **overrides).to("meta")
    read = read_media(str(source), "sound" if name == "whisper" else "images")
    return media_samples(read, model, processor_of(directory, model), count=count, seed=0, length=64)


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory a model, with its processor and data."""
    root = tmp_path_factory.mktemp("processors")
    for name in ("vit-classifier", "whisper", "llava"):
        (root / name).mkdir()
        write_processor(name, root / name)
        write_data(name, root / f"{name}-data")
    return root


def test_images_are_what_the_processor_makes_of_them(processors: Path) -> None:
    import transformers

    found = samples("vit-classifier", processors / "vit-classifier-data", processors / "vit-classifier")
    own = transformers.AutoImageProcessor.from_pretrained(processors / "vit-classifier")
    numbers = (0, 3, 6, 1, 4, 7, 2, 5)  # by folder
    for number, one in zip(numbers, found, strict=True):
        wanted = own(images=[picture(number)], return_tensors="pt")["pixel_values"]
        assert wanted.shape == (1, 3, PICTURE, PICTURE)
        assert torch.equal(one.context["pixel_values"], wanted) and one.input_ids.shape == (1, 0)


def test_folders_are_labels(processors: Path) -> None:
    read = read_media(str(processors / "vit-classifier-data"), "images")
    assert read.labels == ["LABEL_0"] * 3 + ["LABEL_1"] * 3 + ["LABEL_2"] * 2 and read.texts is None
    assert chosen_labels(read, 4, 0) == [read.labels[n] for n in (0, 1, 3, 5)]


def test_images_with_text_hold_as_many_image_tokens_as_patches(processors: Path) -> None:
    for one in samples("llava", processors / "llava-data" / "captions.jsonl", processors / "llava"):
        assert int((one.input_ids == IMAGE_TOKEN).sum()) == 16
        assert one.context.keys() == {"pixel_values"} and one.input_ids.shape[1] > 20


def test_sound_and_its_transcript(processors: Path) -> None:
    import transformers

    found = samples("whisper", processors / "whisper-data", processors / "whisper")
    tokenizer = transformers.AutoTokenizer.from_pretrained(processors / "whisper")
    start = build("whisper").config.decoder_start_token_id
    for number, one in enumerate(found):
        assert one.context["input_features"].shape == (1, 16, 100)
        assert int(one.input_ids[0, 0]) == start
        assert f"number {number}," in tokenizer.decode(one.input_ids[0, 1:])


@pytest.mark.parametrize(("width", "channels"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_waves_of_every_width_are_the_sound_that_was_written(width: int, channels: int, tmp_path: Path) -> None:
    wanted = write_sound(tmp_path / "a.wav", 1, channels=channels, width=width)
    found = read_sound(tmp_path / "a.wav", RATE)
    assert found.dtype == np.float32 and np.abs(found - wanted).max() < 1.01 * 2.0 ** (1 - 8 * min(width, 3))


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_another_rate_is_resampled(rate: int, tmp_path: Path) -> None:
    """Against the same chord sampled at the processor's rate, noise and edges aside."""
    write_sound(tmp_path / "a.wav", 1, rate=rate)
    found = read_sound(tmp_path / "a.wav", RATE).astype(np.float64)
    time = np.arange(len(found)) / RATE
    wanted = 0.3 * np.sin(2 * np.pi * time * 330) + 0.3 * np.sin(2 * np.pi * time * 495)
    inner = slice(200, -200)
    assert len(found) == RATE // 2
    assert np.sqrt(np.mean((found - wanted)[inner] ** 2)) < 0.03


def test_images_that_lie_in_the_table(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    kept = io.BytesIO()
    picture(1).save(kept, "PNG")
    rows = {"image": [{"bytes": kept.getvalue(), "path": None}] * 2, "label": [0, 2]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    assert is_media(str(tmp_path / "a.parquet"))
    read = read_media(str(tmp_path / "a.parquet"), "images")
    assert read.labels == [0, 2] and isinstance(read.rows[0], bytes)
    write_processor("vit-classifier", tmp_path)
    model = build("vit-classifier")
    found = media_samples(read, model, processor_of(tmp_path, model), count=2, seed=0, length=8)
    assert torch.equal(found[0].context["pixel_values"], found[1].context["pixel_values"])


def _bad(directory: Path, kind: str) -> tuple[str, str]:
    """(source, kind) of data that cannot be."""
    cases: dict[str, Any] = {
        "empty": (directory, "images"),
        "default": ("default", "sound"),
        "text": (directory / "a.txt", "images"),
        "no column": (directory / "a.jsonl", "images"),
        "no such file": (directory / "b.jsonl", "images"),
    }
    (directory / "a.txt").write_text("words")
    (directory / "a.jsonl").write_text(json.dumps({"text": "words"}))
    (directory / "b.jsonl").write_text(json.dumps({"image": "nowhere.png"}))
    source, what = cases[kind]
    return str(source), what


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("empty", "holds no images .*give a folder of images, or a table"),
        ("default", "reads sound, of which none come with llmcomp; give a folder of .wav files"),
        ("text", "no source of images for calibration or evaluation; give a folder"),
        ("no column", "no column of images .*name one 'image'"),
        ("no such file", "names nowhere.png, which is no file"),
    ],
)
def test_sources_that_cannot_be(kind: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=said):
        read_media(*_bad(tmp_path, kind))


def test_a_broken_image_and_a_broken_sound_are_named(processors: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(BadData, match=r"a\.png is no readable image"):
        samples("vit-classifier", tmp_path, processors / "vit-classifier")
    (tmp_path / "a.wav").write_bytes(b"RIFF....WAVE")
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(BadData, match=r"a\.wav is no readable PCM \.wav file"):
        samples("whisper", tmp_path, processors / "whisper")


def test_a_processor_of_another_model_is_refused(processors: Path) -> None:
    with pytest.raises(BadData, match="makes 16 channels of sound and the model reads 20"):
        samples("whisper", processors / "whisper-data", processors / "whisper", num_mel_bins=20)


def test_a_model_without_a_processor(processors: Path, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"no processor .* add its preprocessor_config.json"):
        samples("whisper", processors / "whisper-data", tiny("whisper", tmp_path))
