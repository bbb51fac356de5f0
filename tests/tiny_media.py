"""Images and sound made on the spot, and the processors of the tiny models that read them."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
from tiny import IMAGE_TOKEN, MEL_BINS, PICTURE, write_tokenizer

RATE = 16_000


def write_processor(name: str, directory: Path) -> None:
    """What turns files into the inputs of the tiny model `name`, saved beside it."""
    import transformers as t

    if name == "vit-classifier":
        t.ViTImageProcessorPil(size={"height": PICTURE, "width": PICTURE}).save_pretrained(directory)
        return
    tokenizer = write_tokenizer(directory, encoder=False)
    if name == "whisper":
        t.WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=1).save_pretrained(directory)
        return
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    square = {"height": PICTURE, "width": PICTURE}
    pictures = t.CLIPImageProcessorPil(size={"shortest_edge": PICTURE}, crop_size=square)
    t.LlavaProcessor(
        pictures, tokenizer, patch_size=PICTURE // 4, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(directory)  # fmt: skip


def picture(number: int) -> Any:
    """Coloured squares, an image of Pillow wider than high."""
    from PIL import Image

    squares = np.random.default_rng(number).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(squares, np.ones((10, 10, 1), dtype=np.uint8)))


def write_sound(path: Path, number: int, rate: int = RATE, channels: int = 1, width: int = 2) -> np.ndarray:
    """A chord with some noise, half a second; what was written, float64 [samples] between -1 and 1."""
    generator, time = np.random.default_rng(number), np.arange(rate // 2) / rate
    found = 0.3 * np.sin(2 * np.pi * time * 110 * (number + 2)) + 0.3 * np.sin(2 * np.pi * time * 165 * (number + 2))
    found += generator.normal(0, 0.02, len(time))
    scale, kind, shift = {1: (2**7, "u1", 128), 2: (2**15, "<i2", 0), 4: (2**31, "<i4", 0)}[width]
    coded = (found * scale + shift).round().astype(kind)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, len(coded), "NONE", ""))
        file.writeframes(coded.repeat(channels).tobytes())
    return found


def write_data(name: str, directory: Path, count: int = 8) -> Path:
    """Calibration data for the tiny model `name`: images in folders named by label, sound with transcripts beside it,
    or a table of images and captions."""
    directory.mkdir(parents=True)
    rows = []
    for number in range(count):
        words = f"This is number {number}, and {number} words more say so at some length."
        if name == "whisper":
            write_sound(directory / f"{number}.wav", number)
            (directory / f"{number}.txt").write_text(words)
            continue
        file = directory / f"LABEL_{number % 3}" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        picture(number).save(file)
        rows.append({"image": str(file.relative_to(directory)), "text": words})
    if name != "llava":
        return directory
    (directory / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory / "captions.jsonl"
