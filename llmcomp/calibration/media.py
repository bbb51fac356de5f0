"""Images and sound for calibration and evaluation, through the model's own processor.

Sources: a folder of images or of .wav files (in subfolders, whose names are then the labels; the text
of `name.png` is `name.txt`), a table with a column of paths (relative to it) or of encoded images, or a Hub dataset
with a column of images. Sound is read by Python's own `wave`: PCM of 8, 16 or 32 bits, all channels averaged,
resampled to what the processor wants.
"""

from __future__ import annotations

import hashlib
import io
import math
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmcomp.calibration import files
from llmcomp.calibration.data import Batch, window_starts
from llmcomp.calibration.hub_data import dataset_columns
from llmcomp.calibration.processors import load_processor, prompt
from llmcomp.errors import BadData
from llmcomp.feeds import PIXELS, SOUND, composite, decoder_start, main_input

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SOUNDS = (".wav",)
_COLUMNS = {"images": files.IMAGE_NAMES, "sound": ("audio", "sound", "wav", "path")}
_SUFFIXES = {"images": _IMAGES, "sound": _SOUNDS}


@dataclass
class Media:
    """What a source holds.

    Attributes:
        kind: 'images' or 'sound'.
        rows: a path, the bytes of an image file, or an image of Pillow.
        texts: one per row (transcripts, captions), or None.
        labels: one per row (None of a row without one, where that was allowed), or None.
        description: what was read, in words.
    """

    kind: str
    rows: list[Any]
    texts: list[str] | None
    labels: list[Any] | None
    description: str
    warnings: list[str] = field(default_factory=list)


def kind_of(model: Any) -> str | None:
    """What the model reads beside text, 'images' or 'sound'; None where it reads text alone."""
    if composite(model):
        return "images"
    return {PIXELS: "images", SOUND: "sound"}.get(main_input(model))


def is_media(source: str) -> bool:
    """Whether a source is a folder, or a table with a column of images."""
    path = Path(source).expanduser()
    if path.is_dir():
        return True
    table = path.is_file() and path.suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet")
    return table and any(name in _COLUMNS["images"] for name in files.read_columns(path))


def read_media(
    source: str, kind: str, *, text_column: str | None = None, label_column: str | None = None, split: str = "train",
    gaps: bool = False,
) -> Media:  # fmt: skip
    """Read images or sound.

    Args:
        source: see the head of this module.
        text_column, label_column: of tables; guessed from usual names where None.
        split: of a Hub dataset that names none. gaps: rows may lack a label that others have.

    Raises:
        BadData: nothing of that kind there; the message says what would work.
    """
    wanted = f"a folder of {'images' if kind == 'images' else '.wav files'}, or a table with a column of them"
    if source == "default" or source.startswith("sample"):
        raise BadData(f"The model reads {kind}, of which none come with llmcomp; give {wanted}.")
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, kind, wanted, gaps)
    if path.suffix.lower() in (*_IMAGES, *_SOUNDS, ".txt", ".safetensors"):
        raise BadData(f"{path} is no source of {kind}; give {wanted}.")
    if path.exists() or path.suffix.lower() in files.SUFFIXES:
        files.require(path)
        return _table(files.read_columns(path), kind, text_column, label_column, str(path), path.parent, gaps)
    if source.startswith((".", "/", "~")):
        raise BadData(f"{source} does not exist; give {wanted}.")
    name, config, named = [*source.split(":"), None, None][:3]
    columns = dataset_columns(str(name), config, named or split)
    return _table(columns, kind, text_column, label_column, f"{source} ({named or split})", Path(), gaps)


def media_samples(media: Media, model: Any, processor: Any, *, count: int, seed: int, length: int) -> list[Batch]:
    """At most `count` evenly spaced samples as the model reads them, each a batch of one.

    Args:
        model: may lie on meta.
        processor: of `processor_of`.
        length: of token ids at most, where the model reads any.

    Raises:
        BadData: a file that cannot be read, a sound without its transcript, or features of another shape than the
            model has.
    """
    chosen = window_starts(len(media.rows), min(count, len(media.rows)), 1, seed)
    make = _make(media, model, processor, length)
    return [make(media.rows[number], None if media.texts is None else media.texts[number]) for number in chosen]


def chosen_labels(media: Media, count: int, seed: int) -> list[Any] | None:
    """Labels of the rows that `media_samples` takes."""
    if media.labels is None:
        return None
    return [media.labels[n] for n in window_starts(len(media.rows), min(count, len(media.rows)), 1, seed)]


def pixels_of(media: Media, model: Any, processor: Any) -> Callable[[Any], torch.Tensor]:
    """What makes the pixel values [channels, height, width] of a row.

    Args:
        model: that reads images alone; may lie on meta. processor: of `processor_of`.
    """

    def made(row: Any) -> torch.Tensor:
        found = processor(images=[_image(row)], return_tensors="pt")
        return _shaped(found[PIXELS], model.config, media)[0]

    return made


def examined(row: Any) -> bytes:
    """A digest of an image's file, 16 bytes, after decoding it once: of a JPEG at the smallest size that its decoder
    gives, which reads all of the file.

    Raises:
        BadData: no readable image.
    """
    if not isinstance(row, (Path, bytes)):
        found = _image(row)
        return hashlib.blake2b(f"{found.size}".encode() + found.tobytes(), digest_size=16).digest()
    content = row if isinstance(row, bytes) else _content(row)
    _image(row, content, smallest=True)
    return hashlib.blake2b(content, digest_size=16).digest()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadData(f"{path} cannot be read: {error.strerror}.") from error


def processor_of(directory: Path, model: Any) -> Any:
    """What turns files into the model's inputs (`load_processor`).

    Raises:
        BadData: its files are not beside the weights, or it needs a package that is not installed.
    """
    return load_processor(directory, model, str(kind_of(model)))


def _make(media: Media, model: Any, processor: Any, length: int) -> Callable[[Any, str | None], Batch]:
    none = torch.zeros(1, 0, dtype=torch.int64)
    pixels = pixels_of(media, model, processor)

    def picture(row: Any, text: str | None) -> Batch:
        return Batch(none, None, {PIXELS: pixels(row)[None]})

    def captioned(row: Any, text: str | None) -> Batch:
        if text is None:
            raise BadData(f"{media.description} has images without text; give each its text, in a column or NAME.txt.")
        found = processor(images=[_image(row)], text=[prompt(text, processor, model.config)], return_tensors="pt")
        inputs = {name: value for name, value in found.items() if name not in ("input_ids", "attention_mask")}
        return Batch(found["input_ids"], None, inputs)

    def spoken(row: Any, text: str | None) -> Batch:
        if not text:
            raise BadData(
                f"{row if isinstance(row, Path) else media.description} has no transcript, which the decoder reads; "
                "put it beside the sound as NAME.txt, or give a table with the columns audio and text."
            )
        extractor, tokenizer = processor
        rate = int(extractor.sampling_rate)
        found = extractor(_sound(row, rate), sampling_rate=rate, return_tensors="pt")
        start = decoder_start(model.config)
        ids = tokenizer(text)["input_ids"]
        ids = (ids if ids[:1] == [start] else [start, *ids])[: min(length, model.config.max_target_positions)]
        features = _shaped(found[SOUND], model.config, media)
        return Batch(torch.tensor([ids], dtype=torch.int64), None, {SOUND: features})

    if media.kind == "sound":
        return spoken
    return captioned if composite(model) else picture


def _shaped(value: torch.Tensor, config: Any, media: Media) -> torch.Tensor:
    """The processor's answer, if it has as many channels or mel bins as the model."""
    wanted = getattr(config, "num_mel_bins" if media.kind == "sound" else "num_channels", None)
    if wanted is not None and value.shape[1] != wanted:
        raise BadData(
            f"The processor makes {value.shape[1]} channels of {media.kind} and the model reads {wanted}; give the "
            "processor that belongs to the model."
        )
    return value


def _image(row: Any, content: bytes | None = None, smallest: bool = False) -> Any:
    """An image of Pillow, of the content of a row where that is known."""
    from PIL import Image, UnidentifiedImageError

    content = row if isinstance(row, bytes) else content
    try:
        if isinstance(row, Image.Image):
            return row.convert("RGB")
        with Image.open(row if content is None else io.BytesIO(content)) as image:
            if smallest:
                image.draft("RGB", (1, 1))
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else error
        raise BadData(f"{_name(row)} is no readable image ({reason}); remove it or convert it to PNG.") from error


def _name(row: Any) -> str:
    return str(row) if isinstance(row, Path) else "A row of the table"


def _sound(row: Any, rate: int) -> np.ndarray:
    """Samples between -1 and 1, float32 [samples], at `rate`."""
    try:
        with wave.open(io.BytesIO(row) if isinstance(row, bytes) else str(row)) as file:
            width, channels, found = file.getsampwidth(), file.getnchannels(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise BadData(
            f"{_name(row)} is no readable PCM .wav file ({error}); convert it, as with ffmpeg -i IN OUT.wav."
        ) from error
    if width not in (1, 2, 4) or not content:
        raise BadData(f"{_name(row)} holds {8 * width}-bit sound or none at all; give PCM of 8, 16 or 32 bits.")
    values: np.ndarray = np.frombuffer(content, dtype={1: "u1", 2: "<i2", 4: "<i4"}[width]).astype(np.float32)
    values = (values - np.float32(128)) / 128 if width == 1 else values / np.float32(2.0 ** (8 * width - 1))
    mono: np.ndarray = values.reshape(-1, channels).mean(1)
    if found != rate:
        from scipy.signal import resample_poly

        common = math.gcd(found, rate)
        mono = resample_poly(mono, rate // common, found // common)
    return np.asarray(mono, dtype=np.float32)


def _folder(path: Path, kind: str, wanted: str, gaps: bool) -> Media:
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES[kind] and file.is_file())
    if not found:
        raise BadData(f"{path} holds no {kind} ({', '.join(_SUFFIXES[kind])}); the model reads {kind}: give {wanted}.")
    beside = [file.with_suffix(".txt") for file in found]
    texts = [files.read_text(text).strip() if text.is_file() else "" for text in beside]
    nested = [file.parent != path for file in found]
    labels: list[Any] | None = None
    if all(nested) or (gaps and any(nested)):
        labels = [file.parent.name if deep else None for file, deep in zip(found, nested, strict=True)]
    return Media(kind, found, texts if any(texts) else None, labels, f"{path}, {len(found):,} files of {kind}")


def _table(
    columns: Mapping[str, list[Any]], kind: str, text: str | None, label: str | None, where: str, folder: Path,
    gaps: bool,
) -> Media:  # fmt: skip
    name = next((name for name in _COLUMNS[kind] if name in columns), None)
    if name is None:
        raise BadData(
            f"{where} has no column of {kind} (columns: {', '.join(columns)}); name one {_COLUMNS[kind][0]!r}, with "
            "paths of files."
        )
    rows = [_row(value, folder, where) for value in columns[name]]
    others = {other: values for other, values in columns.items() if other != name}
    texts = files.text_column(others, text, where) if text or _has_text(others) else None
    labels = files.label_column(others, label, where, gaps)
    return Media(kind, rows, texts, labels, f"{where}, {len(rows):,} rows of {kind}")


def _has_text(columns: Mapping[str, list[Any]]) -> bool:
    return any(name in columns for name in ("text", "sentence", "caption", "transcription"))


def _row(value: Any, folder: Path, where: str) -> Any:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        path = folder / Path(value).expanduser()
        if not path.is_file():
            raise BadData(f"{where} names {value}, which is no file; paths count from where the table lies.")
        return path
    if isinstance(value, bytes) or hasattr(value, "convert"):
        return value
    raise BadData(f"{where} holds {type(value).__name__} where a path or an encoded file is expected.")
