"""Images as samples: a path or an encoded file each, which becomes pixel values when a batch is put together, and not
before, so that memory holds those of a batch however many there are. Nothing is drawn: an image is the same each time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmcomp.calibration.media import Media, examined, pixels_of
from llmcomp.errors import BadData, BadRecipe
from llmcomp.feeds import PIXELS, in_dtype
from llmcomp.progress import Progress
from llmcomp.training.data import Batch, Samples, evenly, labels_of

_WITNESSES = 4
_TOKENS = 64  # for which an image counts where samples share a forward or a file of a teacher's cache
_NAMES = ("image_processor_type", "feature_extractor_type", "processor_class")  # which say nothing of pixels


@dataclass(frozen=True)
class Pictures(Samples):
    """Images.

    Attributes:
        rows: as `Media` has them. digests: of their contents, as many.
        pixels: row → pixel values [channels, height, width]; settings: all that these depend on besides.
    """

    rows: Sequence[Any]
    digests: Sequence[bytes]
    pixels: Callable[[Any], Tensor]
    settings: str = ""
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Batch:
        return {PIXELS: self.pixels(self.rows[index])}

    @property
    def lengths(self) -> list[int]:
        """For how many tokens each counts."""
        return [_TOKENS] * len(self)

    def fingerprint(self) -> str:
        """Of what lies in the files, wherever they lie."""
        return hashlib.sha256(b"".join([self.settings.encode(), *self.digests])).hexdigest()

    def first(self) -> Batch:
        """The first of them that are of one size."""
        made = [self.read(index)[PIXELS] for index in range(min(_WITNESSES, len(self)))]
        return {PIXELS: torch.stack([one for one in made if one.shape == made[0].shape])}

    def chosen(self, numbers: Sequence[int]) -> Pictures:
        rows, digests = ([every[n] for n in numbers] for every in (self.rows, self.digests))
        return replace(self, rows=rows, digests=digests, labels=self._labels_of(numbers))


def pictures_of(
    media: Media, processor: Any, model: Any, *, count: int | None, taught: bool, progress: Progress
) -> Pictures:
    """Images for a classifier, each of which is decoded once to know that it can be.

    Args:
        processor: of `processor_of`. model: that reads what it makes.
        count: how many at most, evenly spaced; None for all.
        taught: by a teacher, who needs no labels.

    Raises:
        BadData: no readable image, labels that are missing or not the model's, a processor of another model.
    """
    if media.labels is None and not taught:
        raise BadData(
            f"{media.description} have no labels for a classifier to learn from; put images into subfolders named by "
            "their labels, give a table with --label-column, or give a --teacher."
        )
    labels = labels_of(media, model)
    numbers = evenly(len(media.rows), min(count or len(media.rows), len(media.rows)))
    rows = [media.rows[number] for number in numbers]
    progress.phase("read images", len(rows))
    digests = []
    for row in rows:
        digests.append(examined(row))
        progress.step()
    settings = json.dumps(settings_of(processor), sort_keys=True, default=str)
    found = Pictures(
        rows, digests, pixels_of(media, model, processor), settings, None if labels is None else labels[numbers]
    )
    require_taken(found.first(), model, media.description)
    return found


def settings_of(processor: Any) -> Mapping[str, Any]:
    """What a processor does to an image, as preprocessor_config.json says it."""
    return {name: value for name, value in processor.to_dict().items() if name not in _NAMES}


def require_taken(batch: Batch, model: Any, what: str) -> None:
    """Refuse images that a model does not take.

    Raises:
        BadData: they have another size than it reads.
    """
    pixels = batch[PIXELS][:1]
    try:
        with torch.no_grad():
            model(**in_dtype(model, {PIXELS: pixels.to(model.device)}))
    except (ValueError, RuntimeError) as error:
        size = " × ".join(map(str, pixels.shape[2:]))
        raise BadData(
            f"{what}: the processor makes images of {size} pixels, which {type(model).__name__} does not take "
            f"({' '.join(str(error).split())[:200]}); give the preprocessor_config.json that belongs to the model."
        ) from error


def require_same_patches(student: Any, teacher: Any) -> None:
    """Refuse configs whose models cut an image into other parts, where what lies inside them is compared.

    Raises:
        BadRecipe: they do.
    """
    own, its = (getattr(config, "patch_size", None) for config in (student, teacher))
    if own != its:
        raise BadRecipe(
            f"The student cuts images into patches of {own} pixels and its teacher of {its}, so their insides cannot "
            "be compared; give --method logits."
        )
