"""The moving average of a student's own weights as its teacher (Mean Teacher, arXiv:1703.01780; of the same student
trained on labels alone, self-distillation):

    θ' ← a θ' + (1 - a) θ   after each step,   a = min(decay, 1 - 1/(step + 1))

so that it is the plain average at first, and not the weights that training started from.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from llmcomp.training.states import STATE

FILE = "past.safetensors"  # of a training state


class Past(TrainerCallback):  # type: ignore[misc]
    """Keeps the average, and writes it into training states: a run that resumes goes on with the same bits.

    Args:
        student: what is trained; modules that are put on it later are no part of its past.
        decay: how much of the past stays, from 0 (the student itself) to below 1.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.student, self.decay = student, decay
        self.model: Any = copy.deepcopy(student).eval().requires_grad_(False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if state.global_step:
            self._take(load_file(_file(args, state)), 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self._take(dict(self.student.named_parameters()), min(self.decay, 1 - 1 / (state.global_step + 1)))
        if control.should_save and state.is_world_process_zero:  # before the file that says a state is whole
            path = _file(args, state)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.cpu() for name, value in self.model.named_parameters()}, path)

    def _take(self, held: dict[str, Tensor], decay: float) -> None:
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                value.lerp_(held[name].to(value.device), 1 - decay)


def _file(args: Any, state: Any) -> Path:
    return Path(str(args.output_dir)) / f"{STATE}-{state.global_step}" / FILE
