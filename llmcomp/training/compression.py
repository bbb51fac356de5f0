"""Gradients that processes exchange as two thin matrices: PowerSGD (arXiv:1905.13727), by torch's communication hook.

What a compressed sum leaves out is added to the next step's gradient (error feedback), and the factors of a step start
from those of the one before. Both belong to a process and to how DDP has put its gradients together, which a resumed
run does anew in its first step. So they are dropped whenever a state is saved, also by a run that is not killed: then
both end with the same bits. The first two steps of a run, and those after a state, exchange whole gradients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from llmcomp.errors import BadRecipe
from llmcomp.training.course import process_count

_WHOLE = 2  # steps before the first compressed one; DDP puts gradients together anew after its first


class PowerSgd(TrainerCallback):  # type: ignore[misc]
    """Compresses the gradients of a Trainer's model.

    Args:
        rank: of the matrices. A gradient is exchanged whole where they would not halve it, as a vector is.

    Raises:
        BadRecipe: a single process, which exchanges nothing.
    """

    def __init__(self, rank: int) -> None:
        if process_count() == 1:
            raise BadRecipe(
                f"--powersgd {rank} is for gradients that processes exchange, and this is one process; leave it out, "
                "or start several by torchrun or `accelerate launch --multi_gpu`."
            )
        self.state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=_WHOLE)
        self._trainer: Any = None

    def join(self, trainer: Any) -> None:
        """Compress the gradients of this Trainer's model, once it is wrapped."""
        self._trainer = trainer
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        wrapped = self._trainer.model_wrapped
        if not isinstance(wrapped, DistributedDataParallel):
            raise BadRecipe("--powersgd compresses what DDP exchanges; leave it out where the model is sharded.")
        wrapped.register_comm_hook(self.state, powerSGD_hook)

    def on_save(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self.state.iter = 0
        self.state.rng = np.random.RandomState(0)
        for kept in (self.state.error_dict, self.state.p_memory_dict, self.state.q_memory_dict):
            kept.clear()
