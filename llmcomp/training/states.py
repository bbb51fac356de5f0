"""What a killed training goes on from: which state is whole, what of a model it holds, and whether training had ended.

A state is a folder `checkpoint-STEP` of the Trainer's with the trained weights in one file, exactly as they were.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from llmcomp.training import sharding
from llmcomp.training.pruning import mask_buffers

WEIGHTS, STATE = "trained.safetensors", "checkpoint"  # of a state the file, and how its folder is called


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are trained, each once."""
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)


def held_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what a training state holds of a model: trained parameters, and masks that change with them."""
    return {name: sharding.full(value.detach()).cpu().contiguous().clone()
            for name, value in [*trained(model), *mask_buffers(model)]}  # fmt: skip


def restore(model: nn.Module, folder: Path) -> None:
    """Put back what a training state holds."""
    put_back(model, load_file(folder / WEIGHTS))


def put_back(model: nn.Module, held: Mapping[str, Tensor]) -> None:
    """The inverse of `held_state`."""
    with torch.no_grad():
        for name, value in [*trained(model), *mask_buffers(model)]:
            value.copy_(sharding.like(held[name], value))


def last_whole(folder: Path) -> Path | None:
    """The newest state in a folder that was written to its end, which is its trainer_state.json; None without one."""
    for state in sorted(folder.glob(f"{STATE}-*"), key=step_of, reverse=True):
        try:
            json.loads((state / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # the run was killed while it wrote this one
            continue
        return state
    return None


def at_its_end(trainer: Trainer, model: nn.Module, last: Path, patience: int | None) -> bool:
    """Whether the run that left `last` had trained to its end, whose weights are then put back: the Trainer would take
    one step more."""
    state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
    if state.global_step < trainer.args.max_steps and not (patience and no_better(state.log_history, patience)):
        return False
    trainer.state = state
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    restore(model, Path(best) if best else last)
    return True


def no_better(logged: list[dict[str, Any]], patience: int) -> bool:
    """Whether the last `patience` evaluations were no better than the best before them."""
    found = [one["eval_loss"] for one in logged if "eval_loss" in one]
    return bool(found) and len(found) - 1 - found.index(min(found)) >= patience


def step_of(state: Path) -> int:
    """Of a state's folder; -1 of one that is none."""
    number = state.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
