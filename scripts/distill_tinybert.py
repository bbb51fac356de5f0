"""Train a small BERT in TinyBERT's two stages: by a masked language model on text, then by a classifier on its task.

    accelerate launch scripts/distill_tinybert.py --config examples/tinybert.yaml

The file has the keys of docs/methods/distillation.md twice, under `general` and under `task`; the task's student is
what the general stage made. A general stage whose output is there is not run again, and a killed one resumes. Under
`augment` it may say how many copies of each row of the task's data are made, with words replaced by what a masked
language model (`model`, else the general stage's teacher) finds likely: copies, share, candidates, seed. KEY=VALUE
after the file is the task's. Several processes: `accelerate launch --multi_gpu --num_processes 2 …` or torchrun.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llmcomp import CompressResult, distill
from llmcomp.augmentation import augment_rows
from llmcomp.building import build, read_settings, said
from llmcomp.cli.scripting import script
from llmcomp.errors import BadRecipe
from llmcomp.progress import Progress
from llmcomp.training.augmenting import Augmentation
from llmcomp.training.distill_plan import distill_plan


def work(config: Path, settings: Sequence[str], progress: Progress) -> CompressResult:
    data = read_settings(config)
    augmented = data.pop("augment", None)
    if set(data) != {"general", "task"} or not all(isinstance(stage, dict) for stage in data.values()):
        raise BadRecipe(f"{config} has the keys {', '.join(map(str, data))}; it needs the mappings general and task.")
    if "output" not in data["general"]:
        raise BadRecipe(f"{config} names no output of general; give one, from which the task's student is read.")
    general = distill_plan({"method": "tinybert", "hard_weight": 0.0, **data["general"]}, f"{config}, general")
    given = {"method": "tinybert", "student": general.output, **data["task"], **said(settings)}
    task = distill_plan(given, f"{config}, task")
    wanted = None if augmented is None else _augmentation(augmented, f"{config}, augment")
    if general.output is not None and not (Path(general.output) / "config.json").exists():
        distill(general, progress)
    if wanted is not None:
        found = augment_rows(
            task.data, augmented.get("model", general.teacher), f"{general.output}-augmented.jsonl", wanted,
            text_column=task.text_column, label_column=task.label_column, device=task.device, progress=progress,
        )  # fmt: skip
        task = replace(task, data=str(found))
    return distill(task, progress)


def _augmentation(said: object, where: str) -> Augmentation:
    if not isinstance(said, dict):
        raise BadRecipe(f"{where} must be a mapping such as {{copies: 20}}, got {said!r}.")
    settings: Augmentation = build(Augmentation, {key: said[key] for key in said if key != "model"}, where)
    settings.check()
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    return script("distill_tinybert", __doc__, work, argv)


if __name__ == "__main__":
    sys.exit(main())
