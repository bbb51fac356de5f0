"""Images and sound from folders and tables, through the processor, as the model reads them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import BEYOND_TEXT, IMAGE_TOKEN, PICTURE, build, tiny, write_tokenizer
from tiny_media import RATE, picture, write_data, write_processor, write_sound

from llmcomp.calibration import batching
from llmcomp.calibration.media import _sound as read_sound
from llmcomp.calibration.media import chosen_labels, is_media, media_samples, processor_of, read_media
from llmcomp.errors import BadData
from llmcomp.feeds import call


def samples(name: str, source: Path, directory: Path, count: int = 8, **overrides: Any) -> Any:
    model = build(name, **overrides).to("meta")
    read = read_media(str(source), "sound" if name == "whisper" else "images")
    return media_samples(read, model, processor_of(directory, model), count=count, seed=0, length=64)


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory a model, with its processor and data."""
    root = tmp_path_factory.mktemp("processors")
    for name in BEYOND_TEXT:
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


_CUT = "<fake_token_around_image><row_{}_col_{}>" + "<image>" * 4
_WHOLE = "\n<fake_token_around_image><global-img>" + "<image>" * 4 + "<fake_token_around_image>\n"
_IDEFICS = tuple(
    "".join("".join(_CUT.format(row, column) for column in range(1, wide + 1)) + "\n" for row in (1, 2)) + _WHOLE
    for wide in (2, 1)
)
_QWEN = tuple(f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>\n" for count in (2 * 3, 3 * 1))
_GEMMA = f"\n\n<start_of_image>{'<image_soft_token>' * 4}<end_of_image>\n\n\n"
# name → (what a wide image and a narrow one become, what is made beside pixels)
IMAGES = {
    **dict.fromkeys(("qwen2-vl", "qwen2.5-vl"), (_QWEN, {"image_grid_thw", "mm_token_type_ids"})),
    **dict.fromkeys(("idefics3", "smolvlm"), (_IDEFICS, {"pixel_attention_mask"})),
    "gemma3-vision": ((_GEMMA, _GEMMA), {"token_type_ids"}),
}


@pytest.mark.parametrize("name", list(IMAGES))
def test_images_of_every_size_stand_in_the_text_as_the_model_expects(name: str, processors: Path) -> None:
    """What surrounds an image and how many tokens it becomes, and that the model takes it."""
    import transformers

    model = build(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(processors / name)
    found = samples(name, processors / f"{name}-data" / "captions.jsonl", processors / name)
    texts = {tokenizer.decode(one.input_ids[0]).partition("This is number ")[0] for one in found}
    images, beside = IMAGES[name]
    assert texts == set(images)
    for one in found:
        assert one.context.keys() == {"pixel_values"} | beside
        assert batching.weight(one) == one.input_ids.shape[1]
        with torch.no_grad():
            logits = model(**call(model, one.input_ids, None, one.context)).logits
            other = {**one.context, "pixel_values": one.context["pixel_values"].flip(-1)}
            changed = model(**call(model, one.input_ids, None, other)).logits
        assert logits.shape[:2] == one.input_ids.shape and not torch.equal(logits, changed)


def test_positions_of_three_dimensions_follow_from_what_is_made(processors: Path) -> None:
    """Against Qwen2-VL's paper (arXiv:2409.12191, section 2.1): text counts in all three, an image's rows and columns
    count from where it begins, and text goes on behind the larger."""
    one = samples("qwen2-vl", processors / "qwen2-vl-data" / "captions.jsonl", processors / "qwen2-vl", count=1)[0]
    ids = one.input_ids[0].tolist()
    first, patches = ids.index(IMAGE_TOKEN), one.context["image_grid_thw"][0].tolist()
    rows, columns = patches[1] // 2, patches[2] // 2
    wanted = [[place] * 3 for place in range(first)]
    wanted += [[first, first + row, first + column] for row in range(rows) for column in range(columns)]
    wanted += [[first + max(rows, columns) + place] * 3 for place in range(len(ids) - len(wanted))]
    seen: dict[str, Any] = {}
    model = build("qwen2-vl")

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["ids"] = [*args, *kwargs.values()][1]

    model.model.language_model.rotary_emb.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        model(**call(model, one.input_ids, None, one.context))
    assert seen["ids"][:, 0].T.tolist() == wanted


def test_a_tokenizer_alone_is_no_processor(processors: Path, tmp_path: Path) -> None:
    """Which is what transformers gives where no file names a class."""
    write_tokenizer(tmp_path, encoder=False)
    with pytest.raises(BadData, match=r"no processor that makes .* \(there is a \w+ alone\); add its preprocessor"):
        samples("llava", processors / "llava-data" / "captions.jsonl", tmp_path)


def test_a_processor_that_needs_a_package_names_it(processors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(BadData, match="needs a package that is not installed here: Package `num2words` is required"):
        samples("smolvlm", processors / "smolvlm-data" / "captions.jsonl", processors / "smolvlm")


@pytest.mark.parametrize("name", ["qwen2-vl", "smolvlm"])
def test_images_need_nothing_that_reads_videos(name: str, processors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether torchvision is installed or not, as here."""
    import transformers

    monkeypatch.setattr(transformers.utils, "is_torchvision_available", lambda: False)
    found = processor_of(processors / name, build(name))
    assert found.video_processor is None
    assert type(found.image_processor).__name__.endswith("ImageProcessorPil")


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
        ("text", "no source of images; give a folder"),
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
