"""The part of the Python API that trains: recovery, pruning in training, distillation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcomp.progress import Progress, Silent
from llmcomp.ranks import connected, joined
from llmcomp.run_options import CompressResult, RunOptions
from llmcomp.training.settings import Lora, Optimization, Plan, Teaching

if TYPE_CHECKING:
    from llmcomp.training.distill_plan import DistillPlan
    from llmcomp.training.pruning_plan import PruningPlan


def recover(
    directory: str | Path,
    data: str,
    *,
    method: str = "lora",
    learn_scales: bool = False,
    samples: int | None = None,
    sequence_length: int = 256,
    lora: Lora | None = None,
    teaching: Teaching | None = None,
    optimization: Optimization | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
    **run: Any,
) -> CompressResult:
    """Train what llmcomp has compressed, in the form that it has, verify the checkpoint, and measure what was won back.

    Removed weights stay removed, two factors stay two. Integers stay as they are, with an adapter beside them, or are
    trained on their grid (quantization-aware training) and packed again.
    In a process that torchrun or `accelerate launch --multi_gpu` started, all ranks call this and train together.

    Args:
        directory: a checkpoint that llmcomp has written.
        data: 'default', 'sample', a file of text or of rows with labels, or a Hub dataset; of an image classifier a
            folder or a table of images. `text_column` and `label_column` of the options are its columns, too.
        method: 'lora', 'full' or, of integers, 'qat'. learn_scales: of 'qat', whether scales are trained as well.
        samples: how many of the data at most. sequence_length: tokens of one.
        lora, teaching, optimization: see there; None is their defaults.
        options: how to run, None is the defaults; `run` overrides single fields, as in
            `recover(directory, data, overwrite=True)`. The device is where it is trained.
        progress: hears where the run stands.

    Raises:
        UserError: what was asked cannot be (exit status 2).
        RunError: something failed on the way; no output appears (exit status 1). Of several ranks, all fail.
    """
    from llmcomp import hub

    progress = progress or Silent()
    options = replace(options or RunOptions(), **run)
    with joined() as world:
        resolved = hub.resolve(str(directory), progress=progress if world.first else Silent())
        parts = lora or Lora(), teaching or Teaching(), optimization or Optimization()
        plan = Plan(data, samples, sequence_length, method, learn_scales, *parts)
        plan.check()
        from llmcomp.recovery import Recovering

        return CompressResult(*Recovering(str(directory), resolved.path, plan, options, progress, world).run())


def distill(plan: DistillPlan, progress: Progress | None = None) -> CompressResult:
    """Train a smaller model by a larger one, verify the checkpoint, and measure both.

        llmcomp.distill(llmcomp.DistillPlan("./my-classifier", "layers=3", data="train.jsonl", label_column="label"))

    With assistants it is several runs, one after the other; those that an earlier call has finished are not run again.
    In a process that torchrun or `accelerate launch --multi_gpu` started, all ranks call this and train together.

    Args:
        plan: teacher, student, what is learned and on what (docs/methods/distillation.md).
        progress: hears where the run stands.

    Raises:
        UserError: what was asked cannot be (exit status 2).
        RunError: something failed on the way; no output appears (exit status 1). Of several ranks, all fail.
    """
    plan.check()
    progress = progress or Silent()
    *assistants, last = plan.chain()
    for stage in assistants:
        _stage(stage, plan, progress, again=False)
    return _stage(last, plan, progress, again=True)


def _stage(plan: DistillPlan, whole: DistillPlan, progress: Progress, again: bool) -> CompressResult:
    """One run of a chain; with `again` also where its output is there, which is then refused or overwritten."""
    from llmcomp import hub

    with connected() as world:
        resolved = hub.resolve(plan.teacher, progress=progress if world.first else Silent())
        from llmcomp.distillation import Distilling, made_before

        found = None if again else made_before(plan, world)
        if found is None:
            found = Distilling(plan, resolved.path, progress, world, whole).run()
        elif world.first:
            progress.note(f"{plan.output} is there already, made by the same plan.")
        return CompressResult(*found)


def prune_in_training(plan: PruningPlan, progress: Progress | None = None) -> CompressResult:
    """Train a dense model while weights are removed, verify the checkpoint, and measure what it cost.

    In a process that torchrun or `accelerate launch --multi_gpu` started, all ranks call this and train together.

    Args:
        plan: what is trained, removed and written (docs/methods/training-time-pruning.md).
        progress: hears where the run stands.

    Raises:
        UserError: what was asked cannot be (exit status 2).
        RunError: something failed on the way; no output appears (exit status 1). Of several ranks, all fail.
    """
    from llmcomp import hub

    plan.check()
    progress = progress or Silent()
    with joined() as world:
        resolved = hub.resolve(plan.model, progress=progress if world.first else Silent())
        from llmcomp.pruned_training import PrunedTraining

        return CompressResult(*PrunedTraining(plan, resolved.path, progress, world).run())
