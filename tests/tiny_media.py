"""Images and sound made on the spot, and the processors of the tiny models that read them."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
from tiny import IMAGE_TOKEN, MEL_BINS, PICTURE, VISION_LANGUAGE, write_tokenizer

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
    tokenizer.add_special_tokens({"additional_special_tokens": list(_MARKS[name])})
    assert tokenizer.convert_tokens_to_ids(_MARKS[name][0]) == IMAGE_TOKEN
    if name != "llava":
        _write_others(name, directory, tokenizer)
        return
    square = {"height": PICTURE, "width": PICTURE}
    pictures = t.CLIPImageProcessorPil(size={"shortest_edge": PICTURE}, crop_size=square)
    t.LlavaProcessor(
        pictures, tokenizer, patch_size=PICTURE // 4, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(directory)  # fmt: skip


# The words that stand for images, in the order of their ids; the first is one image token.
_QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_IDEFICS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
_IDEFICS += tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2, 3))
_MARKS = {
    "llava": ("<image>",), "qwen2-vl": _QWEN, "qwen2.5-vl": _QWEN, "idefics3": _IDEFICS, "smolvlm": _IDEFICS,
    "gemma3-vision": ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
}  # fmt: skip


def _write_others(name: str, directory: Path, tokenizer: Any) -> None:
    """As their repositories keep them: some of these processors read videos, too, for which torchvision is needed."""
    import transformers as t
    from transformers.models.smolvlm import processing_smolvlm

    made: Any
    if name == "gemma3-vision":
        roles = zip(("image_token", "boi_token", "eoi_token"), _MARKS[name], strict=True)
        tokenizer = type(tokenizer).from_pretrained(directory, extra_special_tokens=dict(roles))
        made = t.Gemma3ImageProcessorPil(size={"height": PICTURE, "width": PICTURE})
        t.Gemma3Processor(made, tokenizer, image_seq_length=4).save_pretrained(directory)
        return
    tokenizer.save_pretrained(directory)
    if name.startswith("qwen"):
        made = t.Qwen2VLImageProcessorPil(patch_size=PICTURE // 4, min_pixels=16 * 16, max_pixels=4 * PICTURE * PICTURE)
        (directory / "preprocessor_config.json").write_text(made.to_json_string())
        return
    if name == "smolvlm":  # its processor spells out how many frames a video has by a package that is not here
        processing_smolvlm.num2words = processing_smolvlm.num2words or str
    kind = t.Idefics3ImageProcessorPil if name == "idefics3" else t.SmolVLMImageProcessorPil
    made = kind(size={"longest_edge": 2 * PICTURE}, max_image_size={"longest_edge": PICTURE})
    (directory / "preprocessor_config.json").write_text(made.to_json_string())
    named = {"processor_class": "Idefics3Processor" if name == "idefics3" else "SmolVLMProcessor"}
    (directory / "processor_config.json").write_text(json.dumps({"image_seq_len": 4, **named}))


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
        whole = picture(number)
        if number % 2 and name in VISION_LANGUAGE:  # where the number of patches may differ
            whole = whole.rotate(90, expand=True).crop((0, 0, 20, 50))
        whole.save(file)
        rows.append({"image": str(file.relative_to(directory)), "text": words})
    if name not in VISION_LANGUAGE:
        return directory
    (directory / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory / "captions.jsonl"
