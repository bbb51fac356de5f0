"""Students made from a teacher: fewer of its blocks, narrower ones, or any config; weights copied where shapes allow.

    layers=3                      blocks spread evenly from the first to the last, as DistilBERT takes them
                                  (arXiv:1910.01108; of 12 blocks six are 0, 2, 4, 7, 9, 11)
    blocks=0+2+5                  these
    layers=3,hidden=128,heads=4,mlp=512     narrower ones, as TinyBERT's (arXiv:1909.10351), which start afresh
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from llmcomp.adapters.base import Adapter
from llmcomp.adapters.discover import resized
from llmcomp.checkpoint import Checkpoint
from llmcomp.digests import BESIDE
from llmcomp.errors import BadCheckpoint, BadRecipe
from llmcomp.measure.load import quiet
from llmcomp.pipeline.pruning import WIDTHS, depth_changes, field_name, renumbered

_EXAMPLES = "layers=3, blocks=0+2+5 or layers=3,hidden=128,heads=4,mlp=512"
_NUMBERS = ("layers", "hidden", "heads", "mlp")


@dataclass(frozen=True)
class Cut:
    """What of a teacher a student has.

    Attributes:
        layers: how many blocks; blocks: or which ones; neither is all of them.
        hidden: width of the hidden states. heads: of attention. mlp: width of the MLP.
    """

    layers: int | None = None
    blocks: tuple[int, ...] = ()
    hidden: int | None = None
    heads: int | None = None
    mlp: int | None = None

    def kept(self, total: int) -> tuple[int, ...]:
        """The blocks of a teacher of `total` that it starts from, in order.

        Raises:
            BadRecipe: blocks that the teacher does not have.

        >>> Cut(layers=6).kept(12)
        (0, 2, 4, 7, 9, 11)
        """
        if self.blocks:
            if max(self.blocks) >= total or list(self.blocks) != sorted(set(self.blocks)):
                said = "+".join(map(str, self.blocks))
                raise BadRecipe(
                    f"--student blocks={said} cannot be: the teacher has blocks 0 to {total - 1}; name some in order."
                )
            return self.blocks
        count = total if self.layers is None else self.layers
        if count > total:
            raise BadRecipe(f"--student layers={count} cannot be: the teacher has {total}; take fewer of them.")
        return (0,) if count == 1 else tuple(round(i * (total - 1) / (count - 1)) for i in range(count))


@dataclass(frozen=True)
class Made:
    """A student before it is trained.

    Attributes:
        copied: parameters that have a teacher's values; of: all.
        kept: blocks of the teacher that were taken, none of a config of its own.
    """

    model: Any
    copied: int
    of: int
    kept: tuple[int, ...] = ()

    @property
    def described(self) -> str:
        """Such as 'blocks 0, 2, 5 of the teacher, all weights copied'."""
        blocks = "block" if len(self.kept) == 1 else "blocks"
        where = f"{blocks} {', '.join(map(str, self.kept))} of the teacher" if self.kept else "a config of its own"
        if self.copied == self.of:
            return f"{where}, all weights copied"
        return f"{where}, {100 * self.copied / self.of:.3g}% of the weights copied, the others drawn"


def parse_cut(said: str) -> Cut | None:
    """What `--student` says of a teacher's blocks; None where it names a checkpoint or config.

    Raises:
        BadRecipe: keys or numbers that cannot be.

    >>> parse_cut("layers=3,hidden=128"), parse_cut("./my-student")
    (Cut(layers=3, blocks=(), hidden=128, heads=None, mlp=None), None)
    """
    parts = [part.strip().partition("=") for part in said.split(",")]
    if not all(equals for _, equals, _ in parts) or not all(key.isidentifier() for key, _, _ in parts):
        return None
    found: dict[str, Any] = {}
    for key, _, value in parts:
        numbers = value.split("+") if key == "blocks" else [value]
        if key not in (*_NUMBERS, "blocks") or not all(one.isdigit() for one in numbers):
            raise BadRecipe(f"--student {said} cannot be: {key}={value} is none of what it takes, such as {_EXAMPLES}.")
        if key != "blocks" and int(value) < 1:
            raise BadRecipe(f"--student {said} cannot be: {key} is at least 1.")
        found[key] = tuple(map(int, numbers)) if key == "blocks" else int(value)
    if "layers" in found and "blocks" in found:
        raise BadRecipe(f"--student {said} says both how many blocks and which; leave layers or blocks out.")
    return Cut(**found)


def cut_student(teacher: Any, adapter: Adapter, cut: Cut, seed: int) -> Made:
    """A student of the teacher's class with fewer blocks or narrower ones.

    Args:
        teacher: the model. adapter: its structure, on meta.
        seed: of weights that are not copied.

    Raises:
        BadRecipe: sizes that transformers refuses, blocks that are not there or depend on their number.
    """
    kept = cut.kept(len(adapter.blocks))
    if any(block.applications > 1 for block in adapter.blocks):
        raise BadRecipe(f"{adapter.architecture} shares one block among its layers, so none can be taken out of it.")
    changes = {**depth_changes(adapter, kept), **_widths(adapter.config, cut)}
    try:
        resized(adapter.model, changes)
        config = type(teacher.config).from_dict({**teacher.config.to_dict(), **changes})
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadRecipe(f"transformers cannot build a {adapter.architecture} with {changes}: {reason}.") from error
    return _filled(teacher, adapter, config, kept, seed)


def configured_student(teacher: Any, adapter: Adapter, path: Path, seed: int) -> Made:
    """A student of a config.json, with fresh weights but for those that have the teacher's names and shapes.

    Raises:
        BadCheckpoint: no config that transformers builds a model from.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        config = type(teacher.config).from_dict(said)
        if (kind := said.get("model_type")) != (wanted := teacher.config.model_type):
            raise ValueError(f"it is of {kind} and the teacher of {wanted}")
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadCheckpoint(f"--student {path} is no config for {adapter.architecture}: {reason}.") from error
    return _filled(teacher, adapter, config, (), seed)


def headed_student(teacher: Any, path: Path, seed: int) -> Any:
    """An encoder without the teacher's task under a fresh head for it, such as what a masked language model was trained
    to be, which is then to classify.

    Raises:
        BadCheckpoint: a checkpoint of another family.
    """
    said = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if said.get("model_type") != (wanted := teacher.config.model_type):
        raise BadCheckpoint(f"--student {path} is of {said.get('model_type')} and its teacher of {wanted}.")
    config = type(teacher.config).from_pretrained(path)
    config.id2label, config.label2id = teacher.config.id2label, teacher.config.label2id
    config.problem_type = teacher.config.problem_type
    torch.manual_seed(seed)
    with quiet():
        return type(teacher).from_pretrained(path, config=config, local_files_only=True).eval()


def _filled(teacher: Any, adapter: Adapter, config: Any, kept: Sequence[int], seed: int) -> Made:
    config.architectures = [adapter.architecture]
    torch.manual_seed(seed)
    model: Any = type(teacher)._from_config(config, dtype=teacher.dtype)
    known, copied, total = teacher.state_dict(), 0, 0
    with torch.no_grad():
        for name, value in model.named_parameters():
            source = known.get(renumbered(name, adapter.blocks, kept) if kept else name)
            total += value.numel()
            if source is not None and source.shape == value.shape:
                value.copy_(source)
                copied += value.numel()
        for name, value in model.named_buffers():
            source = known.get(renumbered(name, adapter.blocks, kept) if kept else name)
            if source is not None and source.shape == value.shape:
                value.copy_(source)
    model.generation_config = getattr(teacher, "generation_config", None)
    return Made(model.eval(), copied, total, tuple(kept))


def _widths(config: Any, cut: Cut) -> dict[str, Any]:
    """Changes of config.json for what is narrower.

    Raises:
        BadRecipe: widths that do not divide.
    """
    found: dict[str, Any] = {}
    hidden, heads = cut.hidden or config.hidden_size, cut.heads or config.num_attention_heads
    if hidden % heads:
        raise BadRecipe(f"--student hidden={hidden} and heads={heads} cannot be: the heads divide the width.")
    if cut.hidden is not None:
        found[field_name(config, "hidden_size")] = hidden
    if cut.heads is not None:
        found[field_name(config, "num_attention_heads")] = heads
        groups = getattr(config, "num_key_value_heads", None)
        if groups is not None:
            found[field_name(config, "num_key_value_heads")] = max(1, heads * groups // config.num_attention_heads)
    if found and getattr(config, "head_dim", None) is not None and "head_dim" in config.to_dict():
        found["head_dim"] = hidden // heads
    if cut.mlp is not None:
        names = [name for name in dict.fromkeys(field_name(config, one) for one in WIDTHS) if hasattr(config, name)]
        if not names:
            raise BadRecipe("--student mlp=… cannot be: the teacher's config has no field for the width of an MLP.")
        found[names[0]] = cut.mlp
    return found


def written(model: Any, beside: Path, folder: Path) -> Path:
    """A student as a checkpoint, with the tokenizer and the like of the directory `beside`."""
    model.should_save_on_this_rank = lambda main: True  # each rank has a folder of its own, maybe on another host
    with quiet():
        model.save_pretrained(folder)
    _copy_beside(beside, folder)
    return folder


def _copy_beside(source: Path, target: Path) -> None:
    """Tokenizer and the like, which a student has from its teacher."""
    for file in Checkpoint.open(source).copied_files():
        copy = target / file.relative_to(source)
        if file.name in BESIDE or copy.exists() or file.is_dir():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
