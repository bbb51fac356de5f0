"""The course of a training as the Trainer is told it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from llmcomp.training.settings import Optimization

_WARMUP, _LOGGED = 0.03, 50
# Megabytes of gradients that are exchanged together: all of them. torch's hook for compressed ones asks for a sum when
# the one before it is there, in threads of its own; beside another bucket, or DDP's own sum over parameters that a
# forward has not used, gloo's processes need not agree on the order: they hang, or take one for another.
_ONE_BUCKET = 1 << 20


def arguments(
    settings: Optimization, samples: int, folder: Path, learning_rate: float, device: str
) -> TrainingArguments:
    """What the Trainer is told."""
    per_step = settings.batch_size * settings.accumulate * process_count()
    steps = settings.steps or max(1, int(-(-samples // per_step) * settings.epochs))
    save = settings.save_every or max(1, steps // 10)
    best = settings.patience is not None
    if best and settings.evaluate_every is not None:
        save = settings.evaluate_every
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size, per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate, learning_rate=settings.learning_rate or learning_rate,
        max_steps=steps, lr_scheduler_type="cosine", warmup_steps=min(0.99, _WARMUP), seed=settings.seed,
        data_seed=settings.seed, bf16=settings.bf16, use_cpu=device == "cpu", weight_decay=settings.weight_decay,
        eval_strategy="no" if settings.evaluate_every is None else "steps", eval_steps=settings.evaluate_every,
        save_strategy="steps", save_steps=save, save_total_limit=2, load_best_model_at_end=best,
        metric_for_best_model="eval_loss" if best else None, greater_is_better=False if best else None,
        logging_steps=max(1, steps // _LOGGED), logging_nan_inf_filter=False, report_to=[], disable_tqdm=True,
        remove_unused_columns=False, gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        ddp_bucket_cap_mb=None if settings.powersgd is None else _ONE_BUCKET,
        ddp_find_unused_parameters=None if settings.powersgd is None else False, dataloader_pin_memory=False,
        label_names=["labels"], log_level="error",
    )  # fmt: skip


def step_samples(told: TrainingArguments) -> int:
    """Samples of an optimizer step, of all processes."""
    return int(told.per_device_train_batch_size * told.gradient_accumulation_steps * process_count())


def process_count() -> int:
    """How many train together."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def history(logged: list[dict[str, Any]]) -> list[dict[str, float]]:
    """By step the losses, of what the Trainer has logged."""
    names = ("loss", "eval_loss")
    return [{"step": one["step"], **{name: one[name] for name in names if name in one}}
            for one in logged if any(name in one for name in names)]  # fmt: skip
