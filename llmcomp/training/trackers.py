"""Who else hears of a training's losses: TensorBoard or Weights & Biases, by transformers' own callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from llmcomp.formats.save import output_of
from llmcomp.training.settings import WANDB


def tracker(name: str, folder: Path) -> TrainerCallback:
    """The callback of a tracker.

    Args:
        name: one of `settings.TRACKERS`.
        folder: of the training's states, in the partial directory of an output. TensorBoard's files lie beside that
            output, in runs/<output>/<training>, and outlive the run; TENSORBOARD_LOGGING_DIR says otherwise.
    """
    output = output_of(folder.parent)
    if name == WANDB:
        return _Named(f"{output.name}-{folder.name}")
    callback: Any = TensorBoardCallback()
    if callback.logging_dir is None:
        callback.logging_dir = str(output.parent / "runs" / output.name / folder.name)
    return callback


class _Named(WandbCallback):  # type: ignore[misc]
    """A run under the output's name; WANDB_PROJECT and the like are read as ever."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self._run = run

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        args.run_name = self._run
        super().setup(args, state, model, **kwargs)
